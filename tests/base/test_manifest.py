"""The manifest, and the way from it to files that are what it says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.base import store
from stages.base.manifest import (
    Manifest,
    check_token_id,
    describe,
    locate,
    quantization_label,
    read_manifest,
    remember,
    stamps,
    total_size,
    write_manifest,
)
from tests.support.tiny import write_llama

FILES = {
    "config.json": json.dumps({"model_type": "llama", "torch_dtype": "float16"}),
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_text(content)
    return directory


@pytest.fixture
def known(folder: Path) -> Manifest:
    """The model of `folder`, remembered."""
    manifest = describe(folder, source="directory:model", revision=None)
    remember(manifest, folder, stamps(folder))
    return manifest


def test_undisturbed_model_is_located(folder: Path, known: Manifest) -> None:
    assert locate(known) == folder


def test_edited_weights_are_refused(folder: Path, known: Manifest) -> None:
    (folder / "model.safetensors").write_text("WEIGHTS")
    with pytest.raises(ValueError, match=r"model\.safetensors differs from the base model in base\.json \(sha256 "):
        locate(known)


def test_touched_but_equal_file_is_accepted(folder: Path, known: Manifest) -> None:
    os.utime(folder / "model.safetensors", (1, 1))
    assert locate(known) == folder


def test_replaced_but_equal_file_is_accepted(folder: Path, known: Manifest) -> None:
    (folder / "copy").write_text("weights")
    (folder / "copy").replace(folder / "model.safetensors")
    assert locate(known) == folder


def test_untouched_file_is_not_hashed_again(folder: Path, known: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.base.manifest.sha256", lambda path: pytest.fail(f"{path} was hashed"))
    assert locate(known) == folder


def test_edited_file_of_the_same_size_and_time_as_another_inode_is_refused(folder: Path, known: Manifest) -> None:
    path = folder / "model.safetensors"
    stat = path.stat()
    (folder / "copy").write_text("WEIGHTS")
    (folder / "copy").replace(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="differs"):
        locate(known)


def test_deleted_file_is_named(folder: Path, known: Manifest) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json of the base model directory:model is gone"):
        locate(known)


@pytest.mark.parametrize("name", ["model-extra.safetensors", "chat_template.jinja", "generation_config.json"])
def test_file_added_to_the_model_is_refused(folder: Path, known: Manifest, name: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=f"holds {name}, which the base model in base.json lacks"):
        locate(known)


@pytest.mark.parametrize("name", ["README.md", ".hidden.json", "modeling.py", "pytorch_model.bin"])
def test_file_that_is_no_part_of_the_model_does_not_matter(folder: Path, known: Manifest, name: str) -> None:
    (folder / name).write_text("{}")
    assert locate(known) == folder


def test_code_added_to_a_model_with_code_is_refused(folder: Path) -> None:
    (folder / "modeling.py").write_text("")
    manifest = describe(folder, source="x", revision=None, with_code=True)
    remember(manifest, folder, stamps(folder))
    (folder / "helper.py").write_text("")
    with pytest.raises(ValueError, match=r"holds helper\.py"):
        locate(manifest)


def test_model_of_another_machine_is_refused(folder: Path) -> None:
    manifest = describe(folder, source="org/name", revision="abc")
    with pytest.raises(ValueError, match=r"org/name is not on this machine; run: python -m stages\.fetch"):
        locate(manifest)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"directory": 3, "with_code": 0, "seen": {}}',
        '{"directory": "/", "with_code": 0, "seen": 3}',
    ],
)
def test_damaged_record_counts_as_not_on_this_machine(known: Manifest, content: str) -> None:
    (record,) = (store.root() / "bases" / known.identity).iterdir()
    record.write_text(content)
    with pytest.raises(ValueError, match="is not on this machine"):
        locate(known)


def test_deleted_folder_is_refused(folder: Path, known: Manifest) -> None:
    folder.rename(folder.with_name("moved"))
    with pytest.raises(ValueError, match=r"is gone; .*run: dvc repro"):
        locate(known)


def test_identity_depends_on_contents_and_names_only(folder: Path, known: Manifest) -> None:
    renamed = describe(folder, source="another", revision="another")
    assert renamed.identity == known.identity
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    assert describe(folder, source="another", revision="another").identity != known.identity


def test_tokenizer_identity_ignores_weights(folder: Path, known: Manifest) -> None:
    (folder / "model.safetensors").write_text("other")
    assert describe(folder, source="x", revision=None).tokenizer_identity == known.tokenizer_identity


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja", "a.model",
     "special_tokens_map.json", "added_tokens.json", "a.tiktoken"],
)  # fmt: skip
def test_tokenizer_identity_depends_on_each_file_of_the_tokenizer(folder: Path, known: Manifest, name: str) -> None:
    (folder / name).write_text('{"changed": 1}')
    assert describe(folder, source="x", revision=None).tokenizer_identity != known.tokenizer_identity


def test_revision_that_the_source_gives_is_kept(folder: Path) -> None:
    assert describe(folder, source="x", revision="abc").revision == "abc"


def test_revision_of_files_alone_is_their_digest(known: Manifest) -> None:
    assert known.revision == f"sha256:{known.identity}"


def test_every_byte_is_reported_as_hashed(folder: Path) -> None:
    counts: list[int] = []
    describe(folder, source="x", revision=None, advance=counts.append)
    assert sum(counts) == sum(map(len, FILES.values())) == total_size(folder)


def test_float_type_is_found_inside_a_text_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"text_config": {"torch_dtype": "bfloat16"}}')
    assert describe(folder, source="x", revision=None).dtype == "bfloat16"


def test_text_config_may_be_null(folder: Path) -> None:
    (folder / "config.json").write_text('{"text_config": null, "dtype": "float32"}')
    assert describe(folder, source="x", revision=None).dtype == "float32"


@pytest.mark.parametrize(
    ("quantization", "label"),
    [
        (None, "none (float16)"),
        ({"bits": 4, "group_size": 32}, "4 bits, groups of 32"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"odd": 1}, "yes"),
    ],
)
def test_quantization_is_labelled(known: Manifest, quantization: dict[str, object] | None, label: str) -> None:
    assert quantization_label(known.model_copy(update={"quantization": quantization})) == label


def test_manifest_survives_writing_and_reading(tmp_path: Path, known: Manifest) -> None:
    write_manifest(tmp_path / "base.json", known)
    assert read_manifest(tmp_path / "base.json") == known


def test_missing_manifest_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file; make it with: python -m stages\.fetch"):
        read_manifest(tmp_path / "base.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"base\.json:1: damaged: not JSON"),
        ('{\n"source": <<<<', r"base\.json:2: damaged: not JSON"),
        ("[]", r"base\.json: damaged: not a JSON object"),
        ("[" * 100_000, r"base\.json: damaged: not JSON"),
        ("{}", r"base\.json: not a base manifest \(source: Field required\)"),
        ('{"source": 3}', r"base\.json: not a base manifest \(source: Input should be a valid string\)"),
    ],
)
def test_file_that_is_no_manifest_says_how_to_make_one(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "base.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{said}.*; make it with: python -m stages\.fetch"):
        read_manifest(tmp_path / "base.json")


@pytest.mark.parametrize("other", [lambda s: s.upper(), lambda s: s + " "])
def test_two_models_are_remembered_side_by_side(
    folder: Path, known: Manifest, tmp_path: Path, other: Callable[[str], str]
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    for name, content in FILES.items():
        (second / name).write_text(content if name == "config.json" else other(content))
    manifest = describe(second, source="x", revision=None)
    remember(manifest, second, stamps(second))
    assert (locate(known), locate(manifest)) == (folder, second)


def copy_of(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("copy")))


@pytest.fixture
def second(folder: Path, known: Manifest) -> Path:
    """Another folder with the same bytes, remembered last."""
    copy = copy_of(folder)
    remember(known, copy, stamps(copy))
    return copy


def test_of_two_folders_of_one_model_the_intact_one_is_taken(folder: Path, known: Manifest, second: Path) -> None:
    assert locate(known) == second
    (second / "model.safetensors").write_text("WEIGHTS")
    assert locate(known) == folder


def test_an_untouched_folder_is_taken_before_any_is_hashed(
    folder: Path, known: Manifest, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(second / "model.safetensors", (1, 1))
    monkeypatch.setattr("stages.base.manifest.sha256", lambda path: pytest.fail(f"{path} was hashed"))
    assert locate(known) == folder


def test_with_no_folder_intact_the_last_one_is_named(folder: Path, known: Manifest, second: Path) -> None:
    (folder / "model.safetensors").write_text("WEIGHTS")
    (second / "config.json").unlink()
    with pytest.raises(ValueError, match=r"copy/config\.json of the base model directory:model is gone"):
        locate(known)


def test_edited_file_of_the_same_size_and_time_is_refused(folder: Path, known: Manifest) -> None:
    path = folder / "model.safetensors"
    stat = path.stat()
    path.write_text("WEIGHTS")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="differs"):
        locate(known)


def test_file_edited_while_it_is_hashed_is_not_taken_as_seen(folder: Path) -> None:
    seen = stamps(folder)
    manifest = describe(folder, source="x", revision=None)
    (folder / "model.safetensors").write_text("WEIGHTS")
    remember(manifest, folder, seen)
    with pytest.raises(ValueError, match="differs"):
        locate(manifest)


def test_changed_local_directory_is_told_that_its_past_is_gone(folder: Path, known: Manifest) -> None:
    (folder / "model.safetensors").write_text("WEIGHTS")
    with pytest.raises(
        ValueError, match=r"cannot be had back here: .*or go on with the folder as it is now"
    ) as failure:
        locate(known)
    wanted, found = (hashlib.sha256(content).hexdigest()[:12] for content in (b"weights", b"WEIGHTS"))
    assert f"(sha256 {wanted} wanted, {found} found)" in str(failure.value)


def tensor_file(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors header alone."""
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    content = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "transformer.wte.weight", "backbone.embeddings.weight"])
def test_rows_of_the_embedding_are_those_of_the_weights(folder: Path, name: str) -> None:
    (folder / "config.json").write_text('{"vocab_size": 999}')
    tensor_file(folder / "model.safetensors", {name: [258, 32], "model.norm.weight": [32], "lm_head.weight": [300, 32]})
    assert describe(folder, source="x", revision=None).embedding_rows == 258


@pytest.mark.parametrize("config", [{"vocab_size": 300}, {"text_config": {"vocab_size": 300}}])
def test_rows_of_an_embedding_of_unknown_name_are_those_of_the_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    tensor_file(folder / "model.safetensors", {"strange.weight": [258, 32]})
    assert describe(folder, source="x", revision=None).embedding_rows == 300


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 20, (4).to_bytes(8, "little") + b"[1]", b"\2" + b"\0" * 7 + b"{}"]
)
def test_weights_without_a_header_tell_nothing(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert describe(folder, source="x", revision=None).embedding_rows is None


def test_rows_of_a_packed_embedding_are_tokens(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "packed", quantize=True)
    assert describe(model, source="x", revision=None).embedding_rows == 258


def test_token_without_a_row_is_refused_with_both_sizes(known: Manifest) -> None:
    base = known.model_copy(update={"embedding_rows": 258})
    check_token_id(base, 257, tokenizer_size=300, place="rows.jsonl:3")
    with pytest.raises(
        ValueError, match=r"^rows\.jsonl:3: token 258 has no row .* 300 tokens \(ids to 299\), .* 258 rows \(to 257\)"
    ):
        check_token_id(base, 258, tokenizer_size=300, place="rows.jsonl:3")


def test_without_a_known_size_no_token_is_refused(known: Manifest) -> None:
    assert known.embedding_rows is None
    check_token_id(known, 10**6, tokenizer_size=10**6, place="rows.jsonl:3")
