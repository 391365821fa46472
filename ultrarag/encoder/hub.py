"""Pushing a checkpoint to a model hub: checked as a copy, loaded again, and sent in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import MANIFEST, Manifest, copy_checkpoint, largest_difference, probe_vectors, read_manifest
from ultrarag.encoder.encoder import Encoder
from ultrarag.errors import CheckpointError, ResourceError, UltraragError, UsageError

#: The branch that a repository has from its beginning.
MAIN = "main"


@dataclass(frozen=True)
class Pushed:
    """What was pushed, and where it is."""

    repo: str
    revision: str
    #: the commit with all files of the checkpoint
    commit: str
    url: str
    fingerprint: str
    files: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        size = f"{self.files} files, {self.bytes / 1e6:.1f} MB"
        return f"pushed {self.fingerprint[:12]} to {self.repo} ({self.revision}, {size})\n{self.url}"


def push_to_hub(
    path: str | PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Pushed:
    """Push a checkpoint to the model hub; it is there whole, by one commit, or not at all.

    A copy of it is made, whose checksums must be the manifest's; loaded again it must have the manifest's fingerprint
    and give the vectors of the original on probe texts. Files of the repository that the checkpoint has not are removed
    by the same commit.

    Args:
        repo: such as "me/model"; it is made where it does not exist.
        private: refuse a repository that others may read; a new one is made so that they may not.
        revision: a branch, made for this push; default: main.
        token: default: the variable HF_TOKEN, or what `hf auth login` has kept.
        trust_remote_code: run Python code that comes with the checkpoint, to load it again.

    Raises:
        UsageError: HF_HUB_OFFLINE is set, there is no token, the hub refuses it or the name, the revision holds
            something, or the repository is not private.
        CheckpointError: it is no checkpoint of ultrarag's, is damaged, or gives other vectors when it is loaded again.
        ResourceError: the hub cannot be reached, or stopped in between; nothing was published.
    """
    manifest = _checked(Path(path))
    _refuse_offline()
    hub = _Hub(repo, revision or MAIN, token)
    with tempfile.TemporaryDirectory(prefix="ultrarag-push-") as place:
        copy = Path(place) / "checkpoint"
        copy_checkpoint(Path(path), manifest, copy)
        _compare(Path(path), copy, manifest, trust_remote_code)
        return hub.push(copy, manifest, private, message)


def _checked(path: Path) -> Manifest:
    if not path.is_dir():
        raise UsageError(f"'{path}' is no folder; name a checkpoint")
    manifest = read_manifest(path)
    if manifest is None:
        raise CheckpointError(f"'{path}' has no {MANIFEST}: load the model and save it by ultrarag before it is pushed")
    pickled = sorted(name for name in manifest.files if Path(name).match("pytorch_model*.bin"))
    if pickled or not any(name.endswith(".safetensors") for name in manifest.files):
        what = f"weights in {pickled[0]}" if pickled else "no weights in safetensors"
        raise CheckpointError(
            f"'{path}' has {what}, and other files can run code when they are loaded: load the model and save it anew"
        )
    return manifest


def _refuse_offline() -> None:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise UsageError("HF_HUB_OFFLINE is set, so nothing may be sent to the hub: unset it to push")


def _compare(path: Path, copy: Path, manifest: Manifest, trust_remote_code: bool) -> None:
    """Load both; the copy must be the model that the manifest names, and give the vectors that the original gives."""
    options: dict[str, Any] = {"device": "cpu", "engine": "torch", "trust_remote_code": trust_remote_code}
    original, reloaded = (Encoder.load(folder, **options) for folder in (path, copy))
    found = reloaded.identity().fingerprint
    if manifest.fingerprint not in ("", found):
        raise CheckpointError(
            f"'{path}' is the model {found[:12]} when it is loaded, and {manifest.fingerprint[:12]} by its manifest: "
            "save it again; nothing was pushed"
        )
    for head, difference in largest_difference(probe_vectors(original), probe_vectors(reloaded)).items():
        if difference != 0:
            raise CheckpointError(
                f"'{path}' gives other vectors when its copy is loaded (head '{head}' by {difference:.3g}); nothing "
                "was pushed"
            )


class _Hub:
    """One revision of one repository."""

    def __init__(self, repo: str, revision: str, token: str | None) -> None:
        from huggingface_hub import HfApi, get_token

        self.repo, self.revision = repo, revision
        self.token = token or get_token()
        if not self.token:
            raise UsageError(
                "pushing needs a token of the hub: set HF_TOKEN, give --token_file FILE, or run hf auth login; it is "
                "never printed"
            )
        self.api = HfApi(token=self.token)

    def push(self, folder: Path, manifest: Manifest, private: bool, message: str | None) -> Pushed:
        files = [*manifest.files, MANIFEST]
        with self._told():
            head = self._prepare(private)
            commit = self.api.create_commit(
                self.repo,
                self._operations(folder, files),
                commit_message=message or f"ultrarag checkpoint {manifest.fingerprint[:12]}",
                revision=self.revision,
                parent_commit=head,
            )
        size = sum((folder / name).stat().st_size for name in files)
        return Pushed(
            self.repo, self.revision, commit.oid, str(commit.commit_url), manifest.fingerprint, len(files), size
        )

    def _prepare(self, private: bool) -> str:
        """Make the repository and the revision, where they are missing; returns the commit that they are at."""
        self.api.create_repo(self.repo, private=private or None, exist_ok=True)
        info = self.api.model_info(self.repo)
        if private and not info.private:
            raise UsageError(
                f"'{self.repo}' is there already, and not private: make it so on the hub, or name another; nothing was "
                "pushed"
            )
        if self.revision == MAIN:
            return str(info.sha)
        self.api.create_branch(self.repo, branch=self.revision, exist_ok=True)
        there = str(self.api.model_info(self.repo, revision=self.revision).sha)
        if there != info.sha:
            raise UsageError(
                f"'{self.repo}' has a revision '{self.revision}' that is not main's: name another one, or delete it on "
                "the hub; nothing was pushed"
            )
        return there

    def _operations(self, folder: Path, files: list[str]) -> list[Any]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        there = set(self.api.list_repo_files(self.repo, revision=self.revision)) - {".gitattributes"}
        return [
            *(CommitOperationAdd(name, str(folder / name)) for name in files),
            *(CommitOperationDelete(name) for name in sorted(there - set(files))),
        ]

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the hub's client in words, without the token."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # HTTPError: of its httpx

        try:
            yield
        except UltraragError:
            raise
        except HFValidationError as error:
            raise UsageError(f"'{self.repo}' is no name of a repository: {self._plain(error)}") from None
        except HfHubHTTPError as error:
            raise self._refused(error) from None
        except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: an upload, whatever ended it
            if isinstance(error.__cause__, HfHubHTTPError):
                raise self._refused(error.__cause__) from None
            raise ResourceError(
                f"the hub could not be reached, or the connection broke ({type(error).__name__}: "
                f"{self._plain(error)}): nothing was published; push again"
            ) from None
        except ValueError as error:  # the card's metadata, refused by the hub
            raise CheckpointError(f"the hub refuses the checkpoint's card: {self._plain(error)}") from None

    def _refused(self, error: Any) -> Exception:
        status = error.response.status_code if error.response is not None else 0
        if status == 401:
            return UsageError("the hub refuses the token (401): make one with the right to write, and set HF_TOKEN")
        if status == 403:
            return UsageError(f"the token may not write to '{self.repo}' (403)")
        if status in (409, 412):
            return ResourceError(f"somebody else pushed to '{self.repo}' meanwhile ({status}): push again")
        return ResourceError(f"the hub answered {status}: {self._plain(error)}; nothing was published: push again")

    def _plain(self, error: Exception) -> str:
        assert self.token is not None
        lines = [line.strip() for line in str(error).replace(self.token, "***").splitlines() if line.strip()]
        return "; ".join(lines[:3])
