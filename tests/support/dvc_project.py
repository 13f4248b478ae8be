"""The project on a tiny model as a DVC repository of its own, and the commands to work on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.imports import ROOT


def make_project(folder: Path, source: str) -> Path:
    """Lay out the project with this base model, nothing reproduced yet; git knows all files, and has no commit."""
    from tests.support.tiny import small_params

    folder.mkdir(parents=True)
    for name in ("stages", ".dvc/config", ".dvc/.gitignore", ".gitignore", ".dvcignore", "dvc.yaml", "versions.yaml"):
        origin = ROOT / name
        (folder / name).parent.mkdir(exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(origin, folder / name)
    (folder / "params.yaml").write_text(small_params(source=source), encoding="utf-8")
    (folder / "data" / "raw").mkdir(parents=True)
    lines = [f'{{"question": "{i} 더하기 {i}는?", "answer": "{2 * i}이다."}}\n' for i in range(60)]
    (folder / "data" / "raw" / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "data" / "prompts.jsonl").write_text('{"question": "9 더하기 9는?"}\n', encoding="utf-8")
    general = ['{"language": "en", "text": "It rains."}\n', '{"language": "ko", "text": "비가 온다."}\n']
    (folder / "data" / "general.jsonl").write_text("".join(general), encoding="utf-8")
    git(folder, "init", "--quiet")
    return folder


def commit(folder: Path, message: str) -> str:
    """Commit all files; the hash of the commit."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD").strip()


def environment(folder: Path) -> dict[str, str]:
    """`python` is this one; git needs a name to commit with; the store is the one beside the project."""
    who = {f"GIT_{role}_{what}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | who | {"PATH": path, "LORABUILD_STORE": str(folder.parent / "store")}


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment(folder), capture_output=True, text=True, check=True
    )
    return done.stdout


def python(folder: Path, *arguments: str, status: int = 0) -> str:
    """The output of `python -m …`, which must end with this status."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def dvc(folder: Path, *arguments: str, status: int = 0) -> str:
    """The output of a DVC command, errors and warnings with it."""
    return python(folder, "dvc", *arguments, status=status)


def ran(output: str) -> list[str]:
    """The stages that a command of DVC ran."""
    return re.findall(r"^Running stage '(\w+)'", output, flags=re.MULTILINE)


def adapter(folder: Path) -> bytes:
    return (folder / "artifacts" / "adapter" / "adapters.safetensors").read_bytes()
