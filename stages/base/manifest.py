"""The manifest `artifacts/base.json`, which identifies the base model, and the way from it to files on this machine.

The manifest holds identity, never a machine's path, and git tracks it: it pins the base model of a commit. Where the
files lie is the store's matter. Every stage opens the base with `locate`, which refuses files that differ.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic

from stages.base.records import Record, Stamp, read_records, stamp, write_record
from stages.base.weights import embedding_rows
from stages.files.hashes import digest_of, sha256
from stages.files.outputs import read_json, write_json

# What a model directory is read from: the same patterns choose what is downloaded, hashed and compared.
MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "model*.safetensors")
CODE_FILES = ("*.py",)
_TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model", "*.tiktoken",
)  # fmt: skip
LOCAL = "directory:"  # before the name of a local directory, in a manifest's source
_WHOLE_COPY = "the folder needs a whole copy of the model"


class FileIdentity(pydantic.BaseModel):
    sha256: str
    size: int


class Manifest(pydantic.BaseModel):
    """The content of base.json: `requested` is what params.yaml asked for, `revision` what that was."""

    source: str
    requested: str | None
    revision: str
    architecture: str
    dtype: str | None
    quantization: dict[str, Any] | None
    embedding_rows: int | None
    license: str | None = None  # as the source names it: apache-2.0, say
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
    def weights_identity(self) -> str:
        """Hex digest of what an adapter is trained on: the weights and the config, whatever the tokenizer's files."""
        return digest_of(
            {n: file.sha256 for n, file in self.files.items() if n.endswith(".safetensors") or n == "config.json"}
        )

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def describe(
    directory: Path,
    *,
    source: str,
    revision: str | None,
    requested: str | None = None,
    license: str | None = None,
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
    config = read_json(directory / "config.json", _WHOLE_COPY)
    text = config.get("text_config") or {}
    weights = [directory / name for name in names if name.endswith(".safetensors")]
    try:
        manifest = Manifest(
            source=source,
            requested=requested,
            revision=revision or "",
            architecture=config.get("model_type", "unknown"),
            dtype=config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"),
            quantization=config.get("quantization") or config.get("quantization_config"),
            embedding_rows=embedding_rows(weights, config),
            license=license,
            files=files,
        )
    except (pydantic.ValidationError, AttributeError):
        raise ValueError(
            f"{directory / 'config.json'} is not a model's config: types are wrong; {_WHOLE_COPY}"
        ) from None
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
        shards = read_json(index, _WHOLE_COPY).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map; {_WHOLE_COPY}")
        if missing := sorted(set(map(str, shards.values())) - names):
            raise ValueError(f"{directory} lacks {', '.join(missing)}, which its index names")


def check_tokenizer(manifest: Manifest, directory: Path) -> None:
    """Raise ValueError if a file of the tokenizer should be a JSON object and is none."""
    for name in manifest.files:
        if name.endswith(".json") and _matches(name, _TOKENIZER_FILES):
            read_json(directory / name, _WHOLE_COPY)


def check_token_id(manifest: Manifest, token_id: int, *, tokenizer_size: int, place: str) -> None:
    """Raise ValueError if the base model's embedding has no row for a token that its tokenizer makes."""
    rows = manifest.embedding_rows
    if rows is not None and token_id >= rows:
        raise ValueError(
            f"{place}: token {token_id} has no row in the embedding of the base model {manifest.source}: its tokenizer "
            f"has {tokenizer_size} tokens (ids to {tokenizer_size - 1}), its embedding {rows} rows (to {rows - 1}); "
            "take a checkpoint whose embedding was resized with its tokenizer, or keep the token out of rows and chat "
            "template"
        )


def total_size(directory: Path) -> int:
    """Bytes that `describe` will hash."""
    return sum((directory / name).stat().st_size for name in model_files(directory, with_code=True))


def stamps(directory: Path) -> dict[str, Stamp]:
    """The stamp of each file that may be the model's: taken before the files are hashed, for `remember`."""
    return {name: stamp(directory / name) for name in model_files(directory, with_code=True)}


def remember(manifest: Manifest, directory: Path, seen: dict[str, Stamp], *, with_code: bool = False) -> None:
    """Record in the store that `directory` holds the base model, as its files were when they had these stamps."""
    write_record(manifest.identity, Record(directory, with_code, {name: seen[name] for name in manifest.files}))


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
    hint = "make it with: python -m stages.fetch"
    content = read_json(path, hint)
    try:
        return Manifest.model_validate(content)
    except pydantic.ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ValueError(f"{path}: not a base manifest ({where}: {error.errors()[0]['msg']}); {hint}") from None


def locate(manifest: Manifest) -> Path:
    """A folder of the base model on this machine, its files checked against the manifest.

    A file with the stamp that it had when it was last hashed is taken as unchanged; any other is hashed again. Of
    several folders, one that is intact is taken.

    Raises:
        ValueError: the base is not on this machine, or a file differs, or there are more files than there were.
    """
    records = read_records(manifest.identity)
    if not records:
        raise ValueError(f"the base model {manifest.source} is not on this machine; run: python -m stages.fetch")
    problems = []
    for record in sorted(records, key=lambda record: not _is_untouched(manifest, record)):
        if (problem := difference(manifest, record)) is None:
            return record.directory
        problems.append(problem)
    hint = "run: dvc repro (or python -m stages.fetch alone)"
    if manifest.source.startswith(LOCAL):
        hint = (
            f"what it was cannot be had back here: put it back yourself, or go on with the folder as it is now, {hint}"
        )
    raise ValueError(f"{problems[0]}; {hint}")


def difference(manifest: Manifest, record: Record) -> str | None:
    """The first thing in a folder that is not as the manifest has it; None if it holds the base model."""
    for name, expected in manifest.files.items():
        path = record.directory / name
        if not path.is_file():
            return f"{path} of the base model {manifest.source} is gone"
        if record.seen.get(name) != stamp(path) and (found := sha256(path)) != expected.sha256:
            return (
                f"{path} differs from the base model in base.json "
                f"(sha256 {expected.sha256[:12]} wanted, {found[:12]} found)"
            )
    # More weights or a chat template put there since would be read with the rest.
    with_code = any(_matches(name, CODE_FILES) for name in manifest.files)
    if new := sorted(set(model_files(record.directory, with_code=with_code)) - set(manifest.files)):
        return f"{record.directory} holds {', '.join(new)}, which the base model in base.json lacks"
    return None


def _is_untouched(manifest: Manifest, record: Record) -> bool:
    paths = {name: record.directory / name for name in manifest.files}
    return all(path.is_file() and record.seen.get(name) == stamp(path) for name, path in paths.items())


def model_files(directory: Path, *, with_code: bool = False) -> Iterator[str]:
    """Names of the files that make the model, of all that a directory holds."""
    patterns = MODEL_FILES + (CODE_FILES if with_code else ())
    for path in directory.iterdir():
        if path.is_file() and not path.name.startswith(".") and _matches(path.name, patterns):
            yield path.name


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
