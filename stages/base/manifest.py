"""Which base model, exactly: the manifest `artifacts/base.json`, and the way from it to the files on this machine.

The manifest holds identity, never a machine's path. Where the files lie is the store's matter: a record per identity
names their folder. Every stage opens the base with `locate`, which refuses files that differ from the manifest.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic

from stages.base import store
from stages.files.hashes import digest_of, sha256
from stages.files.outputs import write_json

# What a model directory is read from: the same patterns choose what is downloaded, hashed and compared.
MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "model*.safetensors")
CODE_FILES = ("*.py",)
_TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model", "*.tiktoken",
)  # fmt: skip


class FileIdentity(pydantic.BaseModel):
    sha256: str
    size: int


class Manifest(pydantic.BaseModel):
    """The content of base.json."""

    source: str
    revision: str
    architecture: str
    dtype: str | None
    quantization: dict[str, Any] | None
    files: dict[str, FileIdentity]

    @property
    def identity(self) -> str:
        """Hex digest of all files' names and contents."""
        return digest_of({name: file.sha256 for name, file in self.files.items()})

    @property
    def tokenizer_identity(self) -> str:
        """Hex digest of the files that make the tokenizer."""
        return digest_of({name: file.sha256 for name, file in self.files.items() if _matches(name, _TOKENIZER_FILES)})

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def describe(
    directory: Path,
    *,
    source: str,
    revision: str | None,
    with_code: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Manifest:
    """The manifest of a model directory, every byte hashed. Without a `revision`, the files' own digest stands for it.

    Raises:
        ValueError: the directory lacks a config or weights, or its config is damaged.
    """
    check_complete(directory)
    names = sorted(model_files(directory, with_code=with_code))
    files = {
        name: FileIdentity(sha256=sha256(directory / name, advance), size=(directory / name).stat().st_size)
        for name in names
    }
    config = _read_object(directory / "config.json")
    text = config.get("text_config") or {}
    try:
        manifest = Manifest(
            source=source,
            revision=revision or "",
            architecture=config.get("model_type", "unknown"),
            dtype=config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"),
            quantization=config.get("quantization") or config.get("quantization_config"),
            files=files,
        )
    except (pydantic.ValidationError, AttributeError):
        raise ValueError(f"{directory / 'config.json'} is not a model's config: types are wrong") from None
    return manifest if revision else manifest.model_copy(update={"revision": f"sha256:{manifest.identity}"})


def check_complete(directory: Path) -> None:
    """Raise ValueError if a model directory lacks its config or weights."""
    names = set(model_files(directory))
    if "config.json" not in names:
        raise ValueError(f"{directory} is not a model directory: it has no config.json")
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{directory} is not a model directory: it has no model*.safetensors")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = _read_object(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map")
        if missing := sorted(set(map(str, shards.values())) - names):
            raise ValueError(f"{directory} lacks {', '.join(missing)}, which its index names")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    return content


def total_size(directory: Path) -> int:
    """Bytes that `describe` will hash."""
    return sum((directory / name).stat().st_size for name in model_files(directory, with_code=True))


def remember(manifest: Manifest, directory: Path) -> None:
    """Record in the store that `directory` holds the base model."""
    seen = {name: _stamp(directory / name) for name in manifest.files}
    write_json(_record(manifest), {"directory": str(directory.resolve()), "seen": seen})


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write base.json."""
    write_json(path, manifest.model_dump())


def quantization_label(manifest: Manifest) -> str:
    """`4 bits, groups of 32`, or the float type."""
    if not manifest.quantization:
        return f"none ({manifest.dtype})"
    bits, group = manifest.quantization.get("bits"), manifest.quantization.get("group_size")
    return f"{bits} bits, groups of {group}" if bits else str(manifest.quantization.get("quant_method", "yes"))


def read_manifest(path: Path) -> Manifest:
    """Read base.json.

    Raises:
        ValueError: it is missing or not a manifest.
    """
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: python -m stages.fetch") from None
    except pydantic.ValidationError:
        raise ValueError(f"{path}: not a base manifest; make it anew with: python -m stages.fetch") from None


def locate(manifest: Manifest) -> Path:
    """The base model's folder on this machine, its files checked against the manifest.

    A file whose size and time are as when it was last hashed is taken as unchanged; any other is hashed again.

    Raises:
        ValueError: the base is not on this machine, or a file differs, or there are more files than there were.
    """
    mend = "run: python -m stages.fetch"
    try:
        record = json.loads(_record(manifest).read_text(encoding="utf-8"))
        directory, seen = Path(record["directory"]), dict(record["seen"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise ValueError(f"the base model {manifest.source} is not on this machine; {mend}") from None
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} of the base model {manifest.source} is gone; {mend}")
        if seen.get(name) != _stamp(path) and sha256(path) != expected.sha256:
            raise ValueError(f"{path} differs from the base model in base.json; {mend}")
    # More weights or a chat template put there since would be read with the rest.
    with_code = any(_matches(name, CODE_FILES) for name in manifest.files)
    if new := sorted(set(model_files(directory, with_code=with_code)) - set(manifest.files)):
        raise ValueError(f"{directory} holds {', '.join(new)}, which the base model in base.json lacks; {mend}")
    return directory


def _record(manifest: Manifest) -> Path:
    return store.root() / "bases" / f"{manifest.identity}.json"


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def model_files(directory: Path, *, with_code: bool = False) -> Iterator[str]:
    """Names of the files that make the model, of all that a directory holds."""
    patterns = MODEL_FILES + (CODE_FILES if with_code else ())
    for path in directory.iterdir():
        if path.is_file() and not path.name.startswith(".") and _matches(path.name, patterns):
            yield path.name


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
