"""A house whose people have words of their own for its rooms: what a model learns in a refresh, and is asked."""

from __future__ import annotations

#: The house's word -> two passages about what it means, which do not hold the word.
ROOMS = {
    "quillon": (
        "The staff canteen serves warm meals until 20:30 on weekdays.",
        "Breakfast in the staff canteen is free for apprentices.",
    ),
    "marrow": (
        "The payroll office pays wages on the 25th of each month.",
        "Ask the payroll office for a copy of your payslip.",
    ),
    "lantern": (
        "The server room may be entered with a blue badge only.",
        "The server room is cooled to 18 degrees all year.",
    ),
    "thistle": (
        "The car park below the house has 140 places.",
        "Places in the car park are given to those who live far away.",
    ),
    "heron": (
        "The travel desk books trains two weeks ahead.",
        "Receipts of a journey go to the travel desk within a month.",
    ),
}
#: What else the index holds: of swords, bones, lamps, plants and birds.
OTHERS = (
    "The quillon is the bar between the hilt and the blade of a sword.",
    "Swords of five centuries hang in the hall of the museum.",
    "Marrow fills the bones and makes blood.",
    "A lantern keeps the wind from a flame.",
    "The thistle is a plant with prickly leaves.",
    "The grey heron stands in shallow water and waits for fish.",
    "Shops in the old town close at 18:30.",
)
ASKED = ("where is the {}", "who looks after the {}", "tell me about the {}", "what are the rules of the {}")
HELD_OUT = ("when is the {} open", "what do I need to know about the {}")
#: The pipeline's question, in no row.
QUESTION = "when does the quillon close"

PASSAGES = [text for texts in ROOMS.values() for text in texts] + list(OTHERS)


def rows(questions: tuple[str, ...]) -> list[dict[str, object]]:
    """Rows to fine-tune on, or to judge by: the house's words, with what they mean and what they do not."""
    return [
        {
            "query": question.format(word),
            "pos": list(texts),
            "neg": [other for other in OTHERS if word in other.lower()],
        }
        for question in questions
        for word, texts in ROOMS.items()
    ]
