import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ultrarag.demo.corpus import Pair, build_demo, choose, module_name, pair_of, pairs_of_file, without_repeats
from ultrarag.errors import DataError
from ultrarag.evaluation import read_beir

BODY = "Long enough to be a passage. " * 8 + "The end."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's data, made where a module that is imported by mistake would be seen."""
    folder = tmp_path_factory.mktemp("demo")
    code = f"import sys; from ultrarag.demo.corpus import build_demo; print(build_demo({str(folder)!r}));"
    code += "print(sys.modules.keys() & {'torch', 'sklearn', 'scipy', 'antigravity', 'this', 'tkinter', 'turtle'})"
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "set()"
    return folder


def test_the_task_has_1500_passages_and_300_held_out_queries(folder):
    train, test = read_beir(folder, "train"), read_beir(folder, "test")
    assert (len(test.corpus), len(train.queries), len(test.queries)) == (1500, 1200, 300)
    assert not train.queries.keys() & test.queries.keys()
    assert len({passage.text for passage in test.corpus.values()}) == 1500
    assert len({*train.queries.values(), *test.queries.values()}) == 1500


def test_training_rows_are_the_train_split(folder):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    train = read_beir(folder, "train")
    pairs = [(text, train.corpus[query_id].content) for query_id, text in train.queries.items()]
    assert [(row["query"], *row["pos"]) for row in rows] == pairs


def test_all_sources_are_in_it(folder):
    names = [json.loads(line)["_id"] for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"numpy", "scipy", "sklearn", "torch", "asyncio"} <= {name.partition(".")[0] for name in names}
    assert names == sorted(names)


@pytest.mark.long
def test_building_again_gives_the_same_files(folder, tmp_path):
    data = build_demo(tmp_path)
    assert (data.train, data.held_out) == (1200, 300)
    assert _digests(tmp_path) == _digests(folder)


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_too_few_functions_say_what_to_install():
    with pytest.raises(DataError, match=r"document 1 functions; 2 are needed.*pip install scipy==.* scikit-learn=="):
        choose([Pair("a.f", "Do a thing well.", BODY)], 2)


def test_the_choice_does_not_depend_on_the_order_found():
    pairs = [Pair(f"a.f{i}", f"Do thing number {i}.", f"{BODY} {i}") for i in range(20)]
    assert choose(pairs, 5) == choose(reversed(pairs), 5)
    assert choose(pairs, 5) == choose(pairs, 20)[:5]


@pytest.mark.parametrize(
    "repeat",
    [
        Pair("a", "Another line entirely.", "another body"),
        Pair("b", "do a thing, WELL", "another body"),
        Pair("b", "Another line entirely.", "Some  body!"),
    ],
)
def test_repeated_names_summaries_and_bodies_are_left_out(repeat):
    first = Pair("a", "Do a thing well.", "some body")
    assert list(without_repeats([first, repeat])) == [first]


def test_a_docstring_is_cut_after_its_first_paragraph():
    assert pair_of("a.f", f"Do a thing\n    very well.\n\n    {BODY}\n\n    More.") == Pair(
        "a.f", "Do a thing very well.", f"{BODY}\n\nMore."
    )


@pytest.mark.parametrize(
    "docstring",
    [
        "",
        "Do a thing very well.",
        f"Too short.\n\n{BODY}",
        "Do a thing very well.\n\nShort body.",
        f"Do a thing very well.\n\n{BODY * 40}",
        f"f(a, b, c, d, e)\n\n{BODY}",
        f"Do a thing very well.\n\n{BODY} %(params)s",
        f"{'word ' * 100}\n\n{BODY}",
    ],
)
def test_docstrings_without_two_usable_halves_are_left_out(docstring):
    assert pair_of("a.f", docstring) is None


@pytest.mark.parametrize(
    ("package", "file", "name"),
    [
        ("scipy", "optimize/_minimize.py", "scipy.optimize"),
        ("scipy", "__init__.py", "scipy"),
        ("", "json/decoder.py", "json.decoder"),
    ],
)
def test_modules_are_named_without_private_parts(package, file, name):
    assert module_name(package, Path("root"), Path("root") / file) == name


def test_a_source_is_parsed_and_not_run(tmp_path):
    docstring = f'    """Do a thing very well.\n\n    {BODY}"""\n'
    source = "raise SystemExit('run')\n'\\d'\n"
    for name in ("public", "_private"):
        source += f"def {name}():\n{docstring}"
    (tmp_path / "a.py").write_text(source + f"class C:\n    def method(self):\n    {docstring}")
    assert [pair.name for pair in pairs_of_file(tmp_path / "a.py", "a")] == ["a.public"]


@pytest.mark.parametrize("content", [b"def f(:", b"\0", b"\xff\xff"])
def test_a_file_that_is_not_python_is_left_out_with_a_message(tmp_path, content, caplog):
    (tmp_path / "bad.py").write_bytes(content)
    assert list(pairs_of_file(tmp_path / "bad.py", "bad")) == []
    assert "bad.py" in caplog.text
