"""Pushing to a model hub: by the hub's own client, to a small hub on this machine; whole or not at all."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests import forked
from tests.encoder import hub_server
from tests.encoder.hub_server import START, TOKEN, Hub
from ultrarag import Encoder
from ultrarag.checkpoint import read_manifest
from ultrarag.cli import main
from ultrarag.encoder import push_to_hub
from ultrarag.errors import CheckpointError, ResourceError, UsageError
from ultrarag.testing.tiny import tiny_bert

#: of the hub's client, about its own upload
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "model").mkdir()
    tiny_bert(folder / "model")
    return Encoder.load(folder / "model", "bge", device="cpu").save(folder / "checkpoint")


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with hub_server.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def tree(hub: Hub, revision: str = "main", repo: str = "me/model") -> dict[str, bytes]:
    found = hub.repos[repo]
    return found.commits[found.branches[revision]]


def test_what_is_pushed_is_what_lies_there_and_loads_from_the_hub(hub, checkpoint, tmp_path) -> None:
    pushed = push_to_hub(checkpoint, "me/model", private=True)
    manifest = read_manifest(checkpoint)
    assert hub.repos["me/model"].private
    there = {name: data for name, data in tree(hub).items() if name != ".gitattributes"}
    assert there == {str(f.relative_to(checkpoint)): f.read_bytes() for f in checkpoint.rglob("*") if f.is_file()}
    assert (pushed.fingerprint, pushed.files, pushed.revision) == (manifest.fingerprint, len(there), "main")
    assert pushed.commit == hub.repos["me/model"].branches["main"]
    assert sum("/commit/" in line for line in hub.asked) == 1
    from ultrarag.hookspecs import LoadOptions

    loaded = Encoder.load("me/model", device="cpu", options=LoadOptions(cache_dir=str(tmp_path / "cache")))
    assert loaded.fingerprint == manifest.fingerprint


def test_a_second_push_replaces_all_files_in_one_commit(hub, checkpoint) -> None:
    push_to_hub(checkpoint, "me/model")
    repo = hub.repos["me/model"]
    first = repo.branches["main"]
    repo.commits[first]["left.over"] = b"of an older model"
    second = push_to_hub(checkpoint, "me/model")
    assert second.commit != first
    assert "left.over" not in tree(hub)


def test_a_revision_is_a_branch_that_nobody_has_written_to(hub, checkpoint) -> None:
    push_to_hub(checkpoint, "me/model", revision="v1")
    assert hub.repos["me/model"].branches["main"] == START
    assert "model.safetensors" in tree(hub, "v1")
    with pytest.raises(UsageError, match=r"has a revision 'v1' that is not main's: name another one"):
        push_to_hub(checkpoint, "me/model", revision="v1")


@pytest.mark.parametrize(
    ("part", "status", "error", "message"),
    [
        ("repos/create", 401, UsageError, r"refuses the token \(401\)"),
        ("repos/create", 403, UsageError, r"may not write to 'me/model' \(403\)"),
        ("/preupload/", 500, ResourceError, r"nothing was published"),
        ("/lfs-store/", 400, ResourceError, r"the hub answered 400"),
        ("/commit/", 500, ResourceError, r"the hub answered 500.*nothing was published: push again"),
        ("/commit/", 0, ResourceError, r"connection broke.*nothing was published; push again"),
    ],
)
def test_what_fails_leaves_nothing_on_the_branch(part, status, error, message, hub, checkpoint, monkeypatch) -> None:
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its own retries
    hub.failing[part] = status
    with pytest.raises(error, match=message) as caught:
        push_to_hub(checkpoint, "me/model")
    assert TOKEN not in str(caught.value)
    assert all(set(repo.commits) == {START} for repo in hub.repos.values())
    hub.failing.clear()
    push_to_hub(checkpoint, "me/model")
    assert "ultrarag.json" in tree(hub)


def test_who_pushes_meanwhile_is_not_overwritten(hub, checkpoint) -> None:
    push_to_hub(checkpoint, "me/model")
    repo = hub.repos["me/model"]

    def another() -> None:
        repo.commits["f" * 40] = {"theirs": b"x"}
        repo.branches["main"] = "f" * 40

    hub.on["/preupload/"] = another
    with pytest.raises(ResourceError, match=r"somebody else pushed to 'me/model' meanwhile \(412\)"):
        push_to_hub(checkpoint, "me/model")
    assert set(tree(hub)) == {"theirs"}


def test_a_public_repository_gets_nothing_private(hub, checkpoint) -> None:
    hub.repos["me/model"] = hub_server.Repo(private=False)
    with pytest.raises(UsageError, match="is there already, and not private"):
        push_to_hub(checkpoint, "me/model", private=True)
    assert set(tree(hub)) == {".gitattributes"}


def test_a_damaged_checkpoint_is_not_sent(hub, checkpoint) -> None:
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors' is not what the checkpoint's manifest says"):
        push_to_hub(checkpoint, "me/model")
    assert hub.asked == []


def test_another_model_than_the_manifests_is_not_sent(hub, checkpoint) -> None:
    path = checkpoint / "ultrarag.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"by its manifest: save it again; nothing was pushed"):
        push_to_hub(checkpoint, "me/model")
    assert hub.asked == []


def test_what_is_no_checkpoint_of_ours_is_refused(hub, checkpoint, made) -> None:
    with pytest.raises(CheckpointError, match=r"has no ultrarag.json"):
        push_to_hub(made.parent / "model", "me/model")
    with pytest.raises(UsageError, match="is no folder"):
        push_to_hub(checkpoint / "nowhere", "me/model")
    with pytest.raises(UsageError, match="is no name of a repository"):
        push_to_hub(checkpoint, "me/mod el")


def test_the_hubs_word_on_the_card_is_told(hub, checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(hub_server, "faults", lambda card: ['"license" must be one of ...'])
    with pytest.raises(CheckpointError, match=r"the hub refuses the checkpoint's card: .*license"):
        push_to_hub(checkpoint, "me/model")
    assert set(hub.repos["me/model"].commits) == {START}


def test_without_a_token_or_offline_nothing_is_asked(hub, checkpoint, monkeypatch, tmp_path) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(UsageError, match="pushing needs a token of the hub: set HF_TOKEN"):
        push_to_hub(checkpoint, "me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set, so nothing may be sent"):
        push_to_hub(checkpoint, "me/model", token=TOKEN)
    assert hub.asked == []


def test_the_command_reads_a_token_file(hub, checkpoint, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    words = ["checkpoint", "push", str(checkpoint), "me/model", "--token-file", str(tmp_path / "token"), "--json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["commit"] == hub.repos["me/model"].branches["main"]
    assert TOKEN not in out + err
    assert main([*words[:5], str(tmp_path / "nowhere")]) == 2
    assert "--token_file" in capsys.readouterr().err


PUSHING = """
from huggingface_hub import constants
constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = {url!r}, False, True
from ultrarag.encoder import push_to_hub
push_to_hub({path!r}, "me/model")
"""


def test_killed_while_it_uploads_nothing_is_visible(hub, checkpoint) -> None:
    """By SIGKILL, when the weights are there and the commit is not."""
    child = forked.Popen(["-c", PUSHING.format(url=hub.url, path=str(checkpoint))])
    hub.on["/commit/"] = lambda: child.send_signal(signal.SIGKILL)
    hub.failing["/commit/"] = 0
    child.communicate(timeout=120)
    assert child.returncode == -9
    assert any("/lfs-store/" in line for line in hub.asked)
    assert set(hub.repos["me/model"].commits) == {START}
