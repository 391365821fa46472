"""The HTML report: whole, self-contained, escaped, and right about what it shows."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from ultrarag.evaluation.metrics import metrics, per_query
from ultrarag.evaluation.results import Evaluation, Measured
from ultrarag.report.page import line_chart
from ultrarag.report.rendering import Page, evaluation_curve, loss_curve, render
from ultrarag.types import Passage

EVIL = "<script>alert('x')</script> & \"q\" \ud800\x00"
QRELS = {"gains": {"a": 1}, "loses": {"b": 1}, "same": {"c": 1}}
NAMES = ("nDCG@10", "MRR@10")
VOID = {"meta", "link", "br", "img", "hr"}


def side(run: dict[str, dict[str, float]]) -> Evaluation:
    return Evaluation(metrics(QRELS, run, NAMES), per_query(QRELS, run, NAMES), run)


@pytest.fixture
def measured() -> Measured:
    before = side({"gains": {"x": 0.9, "a": 0.8}, "loses": {"b": 0.9, "x": 0.8}, "same": {"c": 0.5}})
    after = side({"gains": {"a": 0.9, "x": 0.8}, "loses": {"x": 0.9}, "same": {"c": 0.6}})
    queries = {"gains": f"why {EVIL}", "loses": "how?", "same": "what?"}
    passages = {id: Passage(id, f"text of {id} {EVIL}", title=f"title {EVIL}") for id in ("a", "b", "x")}
    return Measured("nDCG@10", before, after, queries, QRELS, passages, "3 queries on the index")


class Outline(HTMLParser):
    """The elements of a page, with an error where one is not closed as it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def full(measured: Measured | None) -> str:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_ndcg@10": 0.5}]
    return render(
        Page(f"Refresh {EVIL}", EVIL, True, history=history, measured=measured, facts=[("x", EVIL)], notes=[EVIL])
    )


def test_the_page_is_well_formed_and_loads_nothing(measured):
    html = full(measured)
    outline = Outline(html)
    tags = {tag for tag, _ in outline.found}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    attributes = {name for _, values in outline.found for name in values}
    assert not attributes & {"src", "href", "srcset", "style"}
    assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html


def test_every_text_is_escaped_and_can_be_written(measured):
    html = full(measured)
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") >= 8
    assert "\x00" not in html
    html.encode("utf-8")


def test_gained_and_lost_queries_are_shown_side_by_side_with_the_right_passage_marked(measured):
    html = full(measured)
    assert "1 queries gained, 1 lost, 1 did not change" in html
    gained = html.partition("Gained most")[2].partition("Lost most")[0]
    before, after = gained.partition("<h3>After</h3>")[::2]
    right = re.compile(r'<li class="right">.*?<span class="rank">(\d)\.</span> .*?✓ right.*?<code>(\w+)</code>')
    assert right.findall(before) == [("2", "a")]
    assert right.findall(after) == [("1", "a")]
    assert "0.631 → 1.000" in gained


def test_a_right_passage_that_is_not_among_the_hits_is_named(measured):
    del measured.before.run["loses"]["b"]
    measured.before.per_query["loses"]["nDCG@10"] = 0.5
    assert "<code>b</code> (not among 1 hits before, not among 1 hits after)" in full(measured)


def test_metrics_stand_with_their_interval_and_what_it_means(measured):
    assert "may be chance" in full(measured)
    better = side({query_id: {next(iter(judged)): 1.0} for query_id, judged in QRELS.items()})
    none = side({query_id: {} for query_id in QRELS})
    html = full(Measured("nDCG@10", none, better, measured.queries, QRELS, {}, "3 queries"))
    assert "+1.0000 to +1.0000" in html
    assert '<span class="up">better</span>' in html
    assert "no hits" in html


def test_without_an_index_it_shows_what_it_has():
    values = {"before": {"nDCG@10": 0.25}, "after": {"nDCG@10": 0.5}}
    html = render(Page("Fine-tuning", "done", True, metrics=values))
    Outline(html)
    assert '<span class="up">+0.2500</span>' in html
    assert "<svg" not in html
    assert "Queries" not in html


def test_what_is_kept_on_disk_gives_the_same_page(measured):
    assert full(Measured.from_dict(measured.to_dict())) == full(measured)


def test_a_chart_is_well_formed_and_within_its_frame():
    chart = ET.fromstring(line_chart([(1, 3.0), (2, 1.0), (3, 2.0)], "step", "loss"))
    points = [tuple(map(float, pair.split(","))) for pair in chart.find("polyline").get("points").split()]
    _, _, width, height = map(float, chart.get("viewBox").split())
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] < points[2][1] < points[1][1]  # y grows downwards
    assert "from 3 to 2 over 3 points" in chart.get("aria-label")


def test_many_points_get_a_moving_average_that_is_calmer_than_they_are():
    chart = ET.fromstring(line_chart([(step, float(step % 2)) for step in range(20)], "step", "loss"))
    raw, average = chart.findall("polyline")
    heights = [[float(pair.split(",")[1]) for pair in line.get("points").split()] for line in (raw, average)]
    assert len(heights[0]) == len(heights[1]) == 20
    assert max(heights[1]) - min(heights[1]) < 0.5 * (max(heights[0]) - min(heights[0]))


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, float("nan")), (2, 1.0)]])
def test_too_few_points_give_no_chart(points):
    assert line_chart(points, "step", "loss") == ""


@pytest.mark.parametrize("values", [(5.0, 5.0), (0.0, 0.0), (1e-7, 2e-7), (1e9, 3e9)])
def test_flat_tiny_and_huge_values_give_a_chart(values):
    assert "<polyline" in line_chart(list(enumerate(values)), "step", "loss")


def test_curves_take_their_entries_from_the_log():
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_ndcg@10": 0.5}, {"step": 3, "loss": 1.0}]
    assert "over 2 points" in loss_curve(history)
    assert evaluation_curve(history) == ""
    assert "nDCG@10 by step" in evaluation_curve([*history, {"step": 4, "eval_ndcg@10": 0.75}])
