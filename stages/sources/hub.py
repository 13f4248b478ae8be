"""A base model out of the Hugging Face Hub, or of the cache that its client keeps."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.base.manifest import CODE_FILES, MODEL_FILES, check_complete, model_files
from stages.sources.copies import CARD, Copy, license_of, unlink_through

_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def from_hub(repo: str, revision: str | None, *, with_code: bool, refresh: bool, pinned: bool) -> Copy:
    """The snapshot of a revision, out of the cache if it is there; `refresh` asks the Hub where a branch stands now.

    Of a `pinned` revision, which base.json names and params.yaml may not, errors say so.
    """
    from huggingface_hub import HfApi, snapshot_download

    patterns = list(MODEL_FILES + (CODE_FILES if with_code else ()))

    def snapshot(revision: str | None, *, local: bool) -> Path:
        # Without the second pattern, `*.json` would also bring every subfolder's. A cache may do without the card.
        wanted = patterns if local else [*patterns, CARD]
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=wanted, ignore_patterns="*/*", local_files_only=local
            )
        )

    name = repo if revision is None else f"{repo} at {revision}{', which base.json pins' * pinned}"
    with _explaining_hub(name):
        if refresh:
            HfApi().model_info(repo, revision=revision)  # else an unreachable Hub would pass for an unmoved branch
        known, whole = (None, True) if refresh else _cached(snapshot, revision)
        directory = known or snapshot(revision, local=False)
        if directory.is_dir() and not (_is_whole(directory, with_code=with_code) and whole):
            # What is lacking comes from the same commit, though the branch may have moved since.
            directory = snapshot(directory.name, local=False)
    if not directory.is_dir() or not any(model_files(directory, with_code=with_code)):
        raise ValueError(f"{name}: holds no config.json and no model*.safetensors; other formats cannot be read")
    return Copy(
        directory, repo, directory.name, _expected_by_etag(directory, with_code=with_code), license_of(directory)
    )


def _cached(snapshot: Callable[..., Path], revision: str | None) -> tuple[Path | None, bool]:
    """The cache's folder for a revision, if there is one, and whether the Hub client finds no file missing from it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot(revision, local=True), True
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)
        return (Path(partial), False) if partial else (None, True)


@contextmanager
def _explaining_hub(name: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a ValueError of one line."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of its HTTP library, no public name
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"model.source: {error}") from None
    except GatedRepoError:
        raise ValueError(f"{name}: the Hub wants you to accept its licence first, then: hf auth login") from None
    except RevisionNotFoundError:
        raise ValueError(
            f"{name}: the Hub has no such revision; correct model.revision, "
            "or take what the Hub has now with: python -m stages.fetch --refresh"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{name}: the Hub has no such model (or it is private: hf auth login)") from None
    except (OSError, HTTPError, RuntimeError) as error:
        raise ValueError(f"{name}: not on this machine, and the Hub did not give it ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    """The first line of what the innermost library said."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _is_whole(directory: Path, *, with_code: bool) -> bool:
    """True if a snapshot has its config and all weights, and its small files are undamaged; damaged ones are deleted.

    The Hub's cache names each blob by its ETag, for a small file the sha1 of the git blob.
    """
    whole = True
    for name in list(model_files(directory, with_code=with_code)):
        path = directory / name
        etag = _blob_name(path)
        if _GIT_SHA1.fullmatch(etag) and _git_sha1(path) != etag:
            unlink_through(path)
            whole = False
    try:
        check_complete(directory)
    except ValueError:
        return False
    return whole


def _expected_by_etag(directory: Path, *, with_code: bool) -> dict[str, str]:
    """The sha256 of each large file, which the Hub's cache uses as the blob's name."""
    blobs = {name: _blob_name(directory / name) for name in model_files(directory, with_code=with_code)}
    return {name: blob for name, blob in blobs.items() if _SHA256.fullmatch(blob)}


def _blob_name(path: Path) -> str:
    """The name of the blob that a snapshot's link points to.

    One link deep: the blob may be a link in turn, to a file that several repositories share under another hash.
    """
    return path.readlink().name if path.is_symlink() else ""


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
