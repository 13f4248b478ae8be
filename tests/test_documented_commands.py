"""The commands on the pages about using and exporting a model run, page by page, in one tiny trained project."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stages import __main__ as commands
from stages.baseline import baseline
from stages.fetch import fetch
from stages.formats.gguf_model import export_model
from stages.merge import merge
from stages.prepare import prepare
from stages.tokenize import tokenize
from stages.train import train
from tests.support.gguf_models import write_exportable
from tests.support.imports import ROOT
from tests.support.serving import environment
from tests.support.tiny import small_params

# gguf.md comes last: it makes a .gguf the base model.
PAGES = ("from-train-lora.md", "formats.md", "using.md", "gguf.md")
# What is shown beside commands, and commands that need what a test has not got.
NOT_RUN = {
    "mlx → peft: artifacts/peft, 120 modules, read back: every number is the same": "what convert prints",
    'python lora.py --model BASE --adapter-file artifacts/npz/adapters.npz --lora-layers 8 --prompt "…"': (
        "a script of mlx-examples, which is no package"
    ),
    "llama-server -m gguf/model.gguf": "llama.cpp's program; tests/formats/*_peers.py run its server as a library",
    "llama-server -m base.gguf --lora gguf/adapter.gguf": "the same",
    "llama-quantize model.gguf model-q4_k_m.gguf Q4_K_M": "llama.cpp's program",
    "lms import gguf/model.gguf": "LM Studio's program",
    "ollama create mine -f gguf/Modelfile": "Ollama's program",
}
# Parts of commands, and what takes their place: shorter runs, folders that are here.
INSTEAD = {
    "train.iters=600": "train.iters=6",
    "--max-tokens 200": "--max-tokens 20",
    "--model BASE": "--model base",
}


def documented(page: str) -> list[str]:
    """The lines of a page's code but for Python, without comments, and the commands of its table "there, here"."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^\|.*\| `(python -m stages[^`]*)` \|$", text, flags=re.MULTILINE)
    for block in re.findall(r"(?:^ {4}.*\n)+", text, flags=re.MULTILINE):
        if not re.match(r" +(from|import) ", block):
            whole = re.sub(r"\\\n", " ", block)
            found += [re.sub(r"\s{2,}# .*$", "", line.strip()) for line in whole.splitlines()]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project after its stages, as the working directory, with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("documented")
    base = write_exportable(folder / "base", "llama")
    (folder / "data" / "raw").mkdir(parents=True)
    text = small_params(source="base")
    # The scale of an .npz is 20, and the adapter in it must be that of the parameters.
    text = re.sub(r"^  alpha: 8", "  alpha: null", text, flags=re.MULTILINE)
    text = re.sub(r"^  scale:.*", "  scale: 20.0", text, flags=re.MULTILINE)
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    rows = [f'{{"question": "{a} + {b}?", "answer": "{a + b}."}}\n' for a in range(4) for b in range(5)]
    (folder / "data" / "raw" / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "data" / "prompts.jsonl").write_text(rows[0], encoding="utf-8")
    (folder / "data" / "general.jsonl").write_text('{"language": "en", "text": "It rains."}\n', encoding="utf-8")
    (folder / "questions.jsonl").write_text('{"question": "1 + 1?"}\n', encoding="utf-8")
    (folder / "questions.txt").write_text("1 + 1?\n2 + 2?\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORABUILD_STORE", str(folder / "store"))
        for stage in (fetch, prepare, tokenize, baseline, train, merge):
            stage()
        for other in ("runs/old/adapter", "path/to/adapter"):
            shutil.copytree("artifacts/adapter", other)
        run("python -m stages convert --to peft --out path/to/peft")
        run("python -m stages convert --to npz --out made")
        shutil.copy("made/adapters.npz", "FILE.npz")
        (folder / "models").mkdir()
        export_model(base, Path("models/base.gguf"), dtype="f32")
        yield folder


@pytest.fixture
def project(trained: Path, own_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained project with its store, of which each other test has one of its own."""
    monkeypatch.setenv("LORABUILD_STORE", str(trained / "store"))
    return trained


def run(line: str) -> None:
    """Run a command as a shell would, but for Python's in this process, which has MLX already."""
    for written, short in INSTEAD.items():
        line = line.replace(written, short)
    line, _, file = line.partition(" < ")
    said, pipe, rest = line.rpartition(" | ")
    typed = Path(file).read_text(encoding="utf-8") if file else (shlex.split(said)[1] if pipe else "")
    words = shlex.split(rest)
    if words[0] == "mlx_lm.generate":
        _run_mlx_lm(words)
        return
    match = re.match(r"python -m stages(?:\.(\w+))?\b", rest)
    assert match, f"{line}: run it here, or name it in NOT_RUN"
    arguments = [*([match[1]] if match[1] else []), *words[3:]]
    done = CliRunner().invoke(commands.app, arguments, input=typed)
    assert done.exit_code == 0, (line, done.output, done.exception)


def _run_mlx_lm(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        import_module(words[0]).main()


def serves(line: str) -> bool:
    return "stages serve" in line or line.startswith("curl ")


@contextmanager
def started(folder: Path, line: str) -> Iterator[subprocess.Popen[str]]:
    """A documented server on a free port."""
    words = [sys.executable if word == "python" else word for word in shlex.split(line.replace("--port 8000", ""))]
    process = subprocess.Popen(
        ["env", *words, "--port", "0"], cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_documented_servers_start_and_the_documented_request_is_answered(project: Path) -> None:
    lines = [line for line in documented("using.md") if serves(line)]
    (request,) = (line for line in lines if line.startswith("curl "))
    with ExitStack() as stack:
        servers = [stack.enter_context(started(project, line)) for line in lines if line != request]
        addresses = [server.stdout.readline().split("/v1")[0] for server in servers if server.stdout]
        assert len(addresses) > 2 and all(address.startswith("http://") for address in addresses)
        words = shlex.split(request.replace("http://127.0.0.1:8080", addresses[0]))
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0 and "data: [DONE]" in answer.stdout, answer


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(project: Path, page: str) -> None:
    lines = [line for line in documented(page) if line not in NOT_RUN and not serves(line)]
    assert len(lines) > 2
    for line in lines:
        run(line)


def test_what_is_not_run_is_still_on_a_page() -> None:
    lines = {line for page in PAGES for line in documented(page)}
    assert NOT_RUN.keys() <= lines
    assert {part for part in INSTEAD if not any(part in line for line in lines)} == set()
