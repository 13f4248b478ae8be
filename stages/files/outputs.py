"""Files that appear whole or not at all, and JSON read back from them."""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def refuse_foreign(out: Path, made: Iterable[str], *, inputs: Iterable[Path] = ()) -> None:
    """Check, before a stage works, that its output folder holds nothing that the stage did not make.

    `made` are patterns of the names that it makes. The folder will be replaced as a whole, with all that is in it.

    Raises:
        ValueError: `out` is a file, holds other files, or is one of the inputs or a folder around one.
    """
    where = out.resolve()
    if any(path.resolve() == where or where in path.resolve().parents for path in inputs):
        raise ValueError(f"--out {out} would replace the input; name another folder")
    if out.is_file():
        raise ValueError(f"--out {out} is a file; name a folder")
    if not out.is_dir():
        return
    patterns = list(made)
    foreign = [path.name for path in out.iterdir() if not any(fnmatch.fnmatch(path.name, each) for each in patterns)]
    if foreign:
        raise ValueError(f"--out {out} holds {sorted(foreign)[0]}, which this stage did not make; name another folder")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or a directory to; it takes the target's place if the block succeeds.

    First it clears away what a killed process left there; a directory that such a process had set aside, without
    putting its own in place, comes back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    draft = _beside(target, "tmp")
    try:
        yield draft
        _replace(draft, target)
    finally:
        _remove(draft)


def _beside(target: Path, kind: str) -> Path:
    """The name says whose file it is: processes in two containers that share a folder may have the same number."""
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}.{kind}")


def _host() -> str:
    return platform.node().split(".")[0] or "localhost"


def _replace(draft: Path, target: Path) -> None:
    if not draft.exists():
        raise FileNotFoundError(errno.ENOENT, "nothing was written to take its place", str(target))
    if not draft.is_dir() and (target.is_symlink() or not target.is_dir()):
        draft.replace(target)
        return
    # A directory cannot be renamed over one that is not empty, nor over a file.
    old = _beside(target, "old")
    while True:
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            draft.rename(target)
        except BaseException as error:
            if getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST):
                _remove(old)  # another process put its own there in between: try again
                continue
            _restore(old, target)
            raise
        _remove(old)
        return


def _restore(old: Path, target: Path) -> None:
    if not os.path.lexists(target):
        with suppress(FileNotFoundError):
            old.rename(target)


def _clear_leftovers(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.([^.]+)-(\d+)\.(tmp|old)")
    for path in sorted(target.parent.iterdir()):
        if (match := pattern.fullmatch(path.name)) and _is_abandoned(path, host=match[1], pid=int(match[2])):
            if match[3] == "old":
                _restore(path, target)
            _remove(path)


def _is_abandoned(path: Path, *, host: str, pid: int) -> bool:
    """True if no process works on a draft; another machine's processes cannot be seen, so its drafts get a day."""
    if host != _host():
        with suppress(FileNotFoundError):
            return time.time() - path.lstat().st_mtime > 24 * 60 * 60
        return False
    if pid == os.getpid():  # an earlier process of the same number, as in a container that was started again
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # another process may be clearing away the same leftovers
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `\\n` line ends, whole or not at all."""
    with replacing(path) as draft:
        draft.write_bytes(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON, keys in the order given.

    Raises:
        ValueError: a NaN or an infinity, on which `dvc metrics` breaks.
    """
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Read a file that holds one JSON object; `hint` says what to do about a bad one.

    Raises:
        ValueError: it is missing or no JSON object; the message names the file and ends in the hint.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {hint}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: damaged: not JSON ({error.msg}); {hint}") from None
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path}: damaged: not JSON in UTF-8; {hint}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged: not a JSON object; {hint}")
    return content
