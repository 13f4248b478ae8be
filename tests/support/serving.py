"""A folder with all that answers: a base model, two adapters of different shapes, a merged model; and its commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.imports import ROOT
from tests.support.tiny import small_params, write_llama

CHAT = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHAPES = {"one": {}, "two": {"rank": 2, "type": "dora", "layers": 3, "keys": ("self_attn.k_proj", "mlp.down_proj")}}


def write_models(folder: Path) -> Path:
    """Write `base`, `merged`, the adapters `one` and `two`, and params.yaml, under which the chat template asks."""
    from stages.lora import adapter
    from stages.model.load import load_base
    from tests.support.adapters import config, fill

    for name, seed in (("base", 0), ("merged", 3)):
        _make_legible(write_llama(folder / name, seed=seed))
        (folder / name / "chat_template.jinja").write_text(CHAT)
    for name, changes in SHAPES.items():
        model, shape = load_base(folder / "base")[0], config(**changes)
        adapter.attach(model, shape, seed=0)
        fill(model)
        adapter.save(folder / name, model, shape)
    text = small_params(source="base")
    start, end = text.index("  template: "), text.index("  valid_fraction")
    (folder / "params.yaml").write_text(text[:start] + "  template: null\n" + text[end:], encoding="utf-8")
    run(folder, "fetch")
    return folder


def _make_legible(folder: Path) -> None:
    """Let a random model say printable characters alone, and none so surely that no penalty would tell."""
    import mlx.core as mx
    from safetensors.numpy import load_file

    weights = {name: mx.array(array) for name, array in load_file(folder / "model.safetensors").items()}
    rows = weights["model.embed_tokens.weight"]
    # The byte tokenizer's first 94 tokens are those of ! to ~; the head is the embedding.
    weights["model.embed_tokens.weight"] = mx.where(mx.arange(len(rows))[:, None] < 94, 0.3 * rows, 0)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


def environment(folder: Path, **more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "LORABUILD_STORE": str(folder / "store"), "COLUMNS": "100"} | more


def run(folder: Path, *arguments: str, typed: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command with something on its standard input."""
    command = [sys.executable, "-m", "stages", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(folder), input=typed, capture_output=True, text=True, timeout=120,
        check=check,
    )  # fmt: skip


@contextmanager
def served(folder: Path, *arguments: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server on a free port: its address, and its process, which is ended in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "serve", "--port", "0", *arguments],
        cwd=folder, env=environment(folder, **variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("http://"), process.communicate(timeout=20)
        yield line.split()[0], process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
