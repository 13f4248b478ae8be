"""Files and directories that appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.files import hashes, outputs
from tests.support.imports import ROOT


def write_file(path: Path, content: str) -> None:
    path.write_text(content)


def write_folder(path: Path, content: str) -> None:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "content").write_text(content)


def content_of(path: Path) -> str:
    return (path / "sub" / "content" if path.is_dir() else path).read_text()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


BOTH = pytest.mark.parametrize("write", [write_file, write_folder])
Write = Callable[[Path, str], None]


@BOTH
def test_target_is_written(tmp_path: Path, write: Write) -> None:
    with outputs.replacing(tmp_path / "new" / "folder" / "target") as draft:
        write(draft, "content")
    assert content_of(tmp_path / "new" / "folder" / "target") == "content"


@BOTH
def test_target_is_replaced_whole(tmp_path: Path, write: Write) -> None:
    write_folder(tmp_path / "target", "old")
    (tmp_path / "target" / "only before").touch()
    with outputs.replacing(tmp_path / "target") as draft:
        write(draft, "new")
    assert content_of(tmp_path / "target") == "new"
    assert not (tmp_path / "target" / "only before").exists()
    assert names_in(tmp_path) == ["target"]


@BOTH
def test_target_may_have_been_a_file(tmp_path: Path, write: Write) -> None:
    write_file(tmp_path / "target", "old")
    with outputs.replacing(tmp_path / "target") as draft:
        write(draft, "new")
    assert content_of(tmp_path / "target") == "new"
    assert names_in(tmp_path) == ["target"]


@BOTH
@pytest.mark.parametrize("before", [write_file, write_folder])
def test_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path, write: Write, before: Write) -> None:
    before(tmp_path / "elsewhere", "old")
    (tmp_path / "target").symlink_to("elsewhere")
    with outputs.replacing(tmp_path / "target") as draft:
        write(draft, "new")
    assert content_of(tmp_path / "elsewhere") == "old"
    assert content_of(tmp_path / "target") == "new"
    assert not (tmp_path / "target").is_symlink()


@BOTH
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_target_stays_as_it_was_if_writing_fails(tmp_path: Path, write: Write, error: type[BaseException]) -> None:
    write(tmp_path / "target", "old")
    with pytest.raises(error), outputs.replacing(tmp_path / "target") as draft:
        write(draft, "half")
        raise error
    assert content_of(tmp_path / "target") == "old"
    assert names_in(tmp_path) == ["target"]


@BOTH
def test_nothing_appears_if_writing_fails(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ValueError), outputs.replacing(tmp_path / "target") as draft:
        write(draft, "half")
        raise ValueError
    assert names_in(tmp_path) == []


@BOTH
def test_target_is_not_to_be_seen_before_it_is_whole(tmp_path: Path, write: Write) -> None:
    with outputs.replacing(tmp_path / "target") as draft:
        write(draft, "half")
        assert not (tmp_path / "target").exists()


@BOTH
def test_target_stays_as_it_was_if_nothing_was_written(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "target", "old")
    with pytest.raises(FileNotFoundError, match="nothing was written"), outputs.replacing(tmp_path / "target"):
        pass
    assert content_of(tmp_path / "target") == "old"
    assert names_in(tmp_path) == ["target"]


def test_folder_comes_back_if_its_successor_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "target", "old")
    rename = Path.rename

    def fail_for_drafts(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_drafts)
    with pytest.raises(OSError, match="the disk is gone"), outputs.replacing(tmp_path / "target") as draft:
        write_folder(draft, "new")
    assert content_of(tmp_path / "target") == "old"
    assert names_in(tmp_path) == ["target"]


def test_folder_of_another_process_that_was_quicker_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename
    rivals = iter(["rival"])

    def rival_first(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp" and (rival := next(rivals, None)):
            write_folder(tmp_path / "target", rival)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rival_first)
    with outputs.replacing(tmp_path / "target") as draft:
        write_folder(draft, "ours")
    assert next(rivals, None) is None
    assert content_of(tmp_path / "target") == "ours"
    assert names_in(tmp_path) == ["target"]


# --- what a killed process leaves behind ---

# Writes a folder over `target` and is killed: in the middle of writing, or between the two renames.
KILLED = """
import os, pathlib, signal, sys
from stages.files import outputs
target, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
rename = pathlib.Path.rename
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def killing_rename(path, to):
    if path.suffix == ".tmp":
        kill()
    return rename(path, to)
pathlib.Path.rename = killing_rename
with outputs.replacing(target) as draft:
    draft.mkdir()
    (draft / "half").write_text("half")
    if moment == "writing":
        kill()
"""


def run_killed(target: Path, moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_folder_that_a_killed_process_had_set_aside_comes_back(tmp_path: Path) -> None:
    write_folder(tmp_path / "target", "old")
    run_killed(tmp_path / "target", "renaming")
    assert not (tmp_path / "target").exists()
    with pytest.raises(ValueError), outputs.replacing(tmp_path / "target"):
        raise ValueError("this process fails as well")
    assert content_of(tmp_path / "target") == "old"
    assert names_in(tmp_path) == ["target"]


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_leftovers_of_a_killed_process_are_cleared_away(tmp_path: Path, moment: str) -> None:
    write_folder(tmp_path / "target", "old")
    run_killed(tmp_path / "target", moment)
    assert len(names_in(tmp_path)) == 2
    with outputs.replacing(tmp_path / "target") as draft:
        write_folder(draft, "new")
    assert content_of(tmp_path / "target") == "new"
    assert names_in(tmp_path) == ["target"]


def leftover(target: Path, kind: str, *, pid: int, host: str | None = None) -> Path:
    host = platform.node().split(".")[0] if host is None else host
    path = target.with_name(f".{target.name}.{host}-{pid}.{kind}")
    write_folder(path, "leftover")
    return path


def test_draft_of_an_earlier_process_of_the_same_number_is_not_taken_over(tmp_path: Path) -> None:
    leftover(tmp_path / "target", "tmp", pid=os.getpid())
    with outputs.replacing(tmp_path / "target") as draft:
        draft.mkdir()
    assert list((tmp_path / "target").iterdir()) == []


def test_draft_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    theirs = leftover(tmp_path / "target", "tmp", pid=os.getppid())
    with outputs.replacing(tmp_path / "target") as draft:
        write_folder(draft, "ours")
    assert content_of(theirs) == "leftover"


def test_draft_of_another_machine_is_left_alone_for_a_day(tmp_path: Path) -> None:
    theirs = leftover(tmp_path / "target", "tmp", pid=1, host="elsewhere")
    with outputs.replacing(tmp_path / "target") as draft:
        write_folder(draft, "ours")
    assert theirs.exists()
    day = 24 * 60 * 60
    os.utime(theirs, (time.time() - day - 60,) * 2)
    with outputs.replacing(tmp_path / "target") as draft:
        write_folder(draft, "ours")
    assert names_in(tmp_path) == ["target"]


def test_leftovers_of_another_target_are_left_alone(tmp_path: Path) -> None:
    theirs = leftover(tmp_path / "target.json", "old", pid=os.getpid())
    with outputs.replacing(tmp_path / "target") as draft:
        write_folder(draft, "ours")
    assert theirs.exists()


# --- JSON, text, hashes ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_no_number(tmp_path: Path, value: float) -> None:
    outputs.write_json(tmp_path / "metrics.json", {"loss": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        outputs.write_json(tmp_path / "metrics.json", {"nested": [{"loss": value}]})
    assert (tmp_path / "metrics.json").read_text() == '{\n  "loss": 1.5\n}\n'


def test_json_keeps_keys_in_order_and_text_readable(tmp_path: Path) -> None:
    outputs.write_json(tmp_path / "x.json", {"나": 1, "가": 2})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "나": 1,\n  "가": 2\n}\n'.encode()


def test_text_keeps_its_line_ends(tmp_path: Path) -> None:
    outputs.write_text(tmp_path / "x.txt", "a\nb\r\n")
    assert (tmp_path / "x.txt").read_bytes() == b"a\nb\r\n"


def test_text_that_has_no_utf8_leaves_the_old_text(tmp_path: Path) -> None:
    outputs.write_text(tmp_path / "x.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        outputs.write_text(tmp_path / "x.txt", "\ud800")
    assert (tmp_path / "x.txt").read_text() == "old"
    assert names_in(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_sha256_covers_every_byte_and_reports_it(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "x").write_bytes(content)
    counts: list[int] = []
    assert hashes.sha256(tmp_path / "x", counts.append) == hashlib.sha256(content).hexdigest()
    assert sum(counts) == size


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": [1, 2]}, {"a": [2, 1]}, False),
        ({"a": 1}, {"a": "1"}, False),
        ({"a": 1}, {"b": 1}, False),
    ],
)
def test_digest_depends_on_the_value_and_not_on_its_order_of_keys(one: Any, other: Any, same: bool) -> None:
    assert (hashes.digest_of(one) == hashes.digest_of(other)) is same


def test_an_output_folder_with_anything_else_in_it_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    outputs.refuse_foreign(out, ["*.jsonl"])
    out.mkdir()
    (out / "train.jsonl").write_text("made")
    outputs.refuse_foreign(out, ["*.jsonl"])
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis.txt, which this stage did not make"):
        outputs.refuse_foreign(out, ["*.jsonl"])
    with pytest.raises(ValueError, match=r"is a file; name a folder"):
        outputs.refuse_foreign(out / "thesis.txt", ["*.jsonl"])


@pytest.mark.parametrize("given", ["data", "data/raw", "data/raw/rows.jsonl", "data/../data/raw"])
def test_an_output_that_would_replace_an_input_is_refused(tmp_path: Path, given: str) -> None:
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="would replace the input"):
        outputs.refuse_foreign(
            tmp_path / given,
            ["*"],
            inputs=[tmp_path / "data" / "raw" / "rows.jsonl"][:1]
            if given.endswith("jsonl")
            else [tmp_path / "data" / "raw"],
        )


def test_a_json_object_is_read(tmp_path: Path) -> None:
    outputs.write_json(tmp_path / "json", {"글": [1, None]})
    assert outputs.read_json(tmp_path / "json", "") == {"글": [1, None]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "json:1: damaged: not JSON (Expecting value)"),
        (b'{\n"a": 1,\n}', "json:3: damaged: not JSON"),
        (b"\xff\xfe{}", "json: damaged: not JSON in UTF-8"),
        (b"[" * 100_000, "json: damaged: not JSON"),
        (b"[]", "json: damaged: not a JSON object"),
        (b"null", "json: damaged: not a JSON object"),
        (None, "json: no such file"),
    ],
)
def test_what_is_no_json_object_is_named_with_the_way_out(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "json").write_bytes(content)
    with pytest.raises(ValueError, match=r"; make it anew$") as failure:
        outputs.read_json(tmp_path / "json", "make it anew")
    assert said in str(failure.value) and "\n" not in str(failure.value)
