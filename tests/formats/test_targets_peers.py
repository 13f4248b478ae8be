"""One base and one adapter in every program that we export to (`make test-peers`): the same model says the same.

Held against our own base with our own adapter on it: the Kullback-Leibler divergence of next tokens over held-out rows,
and a greedy answer, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from stages.base.manifest import read_manifest
from stages.decoding.decode import load_decoder, stream_tokens
from stages.fetch import fetch
from stages.formats.base import Base
from stages.formats.export import export
from stages.formats.gguf_adapter import export_adapter
from stages.formats.gguf_model import export_model
from stages.lora import adapter, adapter_files
from stages.merge import merge
from stages.model.load import load_base
from stages.prepare import prepare
from stages.templating.tokenizer import load_tokenizer
from stages.tokenize import tokenize
from stages.tokens.parquet import read_tokens
from tests.support.adapters import configure, fill
from tests.support.gguf_models import write_exportable
from tests.support.gguf_tokenizers import CORPUS
from tests.support.llama_cpp import serving
from tests.support.tiny import small_params

# What these libraries deprecate in each other is theirs to correct.
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
ANSWER_TOKENS = 20


@dataclass(frozen=True)
class Said:
    """What a program says: log-probabilities before each token of the rows but the first, (L - 1, V) each, and the
    tokens of its greedy answer."""

    rows: list[np.ndarray]
    answer: list[int]


@dataclass(frozen=True)
class World:
    """A folder with base, adapter, artifacts/merged and all exports; the rows' tokens, and the prompt's."""

    folder: Path
    rows: list[list[int]]
    prompt: list[int]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("targets")
    base = write_exportable(folder / "base", "llama")
    _train(base)
    (folder / "data" / "raw").mkdir(parents=True)
    (folder / "params.yaml").write_text(small_params(source="base"), encoding="utf-8")
    rows = [
        {"question": f"{a} + {b}? 바다는", "answer": f"{a + b}: in the sea there is"}
        for a in range(5)
        for b in range(4)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "data" / "raw" / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in (fetch, prepare, tokenize):
            stage()
        manifest = read_manifest(Path("artifacts/base.json"))
        model = load_base(base)[0]
        config = configure(model, targets=["all-linear"], layers="all", alpha=0.15)
        adapter.attach(model, config, seed=0)
        fill(model)
        adapter.save(folder / "adapter", model, config, base=manifest.weights_identity)
        merge(Path("adapter"))
        test = read_tokens(Path("data/tokens/test.parquet"), tokenizer=manifest.tokenizer_identity)
    saved = adapter_files.read(folder / "adapter")
    export(saved, folder / "peft", "peft", Base(model=load_base(base)[0]))
    export_model(base, folder / "base.gguf", dtype="f32")
    export_model(folder / "artifacts" / "merged", folder / "merged.gguf", dtype="f32")
    export_adapter(folder / "adapter", base, folder / "adapter.gguf")
    prompt = load_tokenizer(base).encode("바다는 왜 파란가요? The quick brown")
    yield World(folder, [row.input_ids.tolist() for row in test][:3], prompt)


def _train(base: Path) -> None:
    """Teach a random base some text, in full: it then says more than one token for ever."""
    model = load_base(base)[0]
    model.unfreeze()
    ids = [token for text in CORPUS[:4] for token in load_tokenizer(base).encode(text, add_special_tokens=False)]
    rows = mx.array([ids[start : start + 33] for start in range(0, len(ids) - 33, 8)])

    def loss(model: Any) -> mx.array:
        return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:]).mean()

    optimizer = optim.Adam(learning_rate=5e-3)
    for _ in range(60):
        optimizer.update(model, nn.value_and_grad(model, loss)(model)[1])
        mx.eval(model.parameters(), optimizer.state)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(base / "model.safetensors"), weights, metadata={"format": "pt"})


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def divergence(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Mean KL(ours ‖ theirs) in nats a token."""
    # What llama.cpp tells is rounded, so that its probabilities do not quite sum to one.
    p, q = (log_softmax(np.concatenate(list(rows))) for rows in (ours, theirs))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


# --- What each program says


def by_mlx(model: Any, folder: Path, world: World) -> Said:
    rows = [log_softmax(np.array(model(mx.array([row])))[0, :-1]) for row in world.rows]
    decoder = load_decoder(folder, {})
    pieces = stream_tokens(model, decoder, world.prompt, max_tokens=ANSWER_TOKENS, temperature=0.0, seed=0)
    return Said(rows, [token for _, token in pieces])


def ours(world: World) -> Said:
    model = load_base(world.folder / "base")[0]
    adapter.load(model, world.folder / "adapter")
    model.eval()
    return by_mlx(model, world.folder / "base", world)


def in_mlx_lm(world: World) -> Said:
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model = load(str(world.folder / "artifacts" / "merged"))[0]
    rows = [log_softmax(np.array(model(mx.array([row])))[0, :-1]) for row in world.rows]
    steps = generate_step(mx.array(world.prompt), model, max_tokens=ANSWER_TOKENS)
    return Said(rows, [int(token) for token, _ in steps])


def by_torch(model: Any, world: World) -> Said:
    import torch

    model.eval()
    with torch.no_grad():
        rows = [log_softmax(model(torch.tensor([row])).logits[0, :-1].numpy()) for row in world.rows]
        prompt = torch.tensor([world.prompt])
        options = {"do_sample": False, "max_new_tokens": ANSWER_TOKENS, "attention_mask": torch.ones_like(prompt)}
        answer = model.generate(input_ids=prompt, **options)
    return Said(rows, answer[0, len(world.prompt) :].tolist())


def _torch_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def in_transformers(world: World) -> Said:
    return by_torch(_torch_model(world.folder / "artifacts" / "merged"), world)


def in_peft(world: World) -> Said:
    from peft import PeftModel

    return by_torch(PeftModel.from_pretrained(_torch_model(world.folder / "base"), world.folder / "peft"), world)


def in_llama_cpp(world: World, name: str, adapter_name: str | None = None) -> Said:
    lora = world.folder / adapter_name if adapter_name else None
    with serving(world.folder / name, adapter=lora) as llama:
        rows = [np.array([llama.next_token(row[:end]) for end in range(1, len(row))]) for row in world.rows]
        return Said(rows, llama.generate(world.prompt, tokens=ANSWER_TOKENS)[0])


TARGETS: dict[str, Callable[[World], Said]] = {
    "mlx-lm, merged": in_mlx_lm,
    "transformers, merged": in_transformers,
    "PEFT, base + adapter": in_peft,
    "llama.cpp, merged GGUF": lambda world: in_llama_cpp(world, "merged.gguf"),
    "llama.cpp, base GGUF + adapter GGUF": lambda world: in_llama_cpp(world, "base.gguf", "adapter.gguf"),
}
# Nats a token. Rounding in float32 costs 1e-12 to 1e-10 here; half of the adapter lost would cost more than 0.1.
MOST = 1e-9


@pytest.fixture(scope="module")
def expected(world: World) -> Said:
    return ours(world)


def test_the_adapter_changes_what_the_base_says_and_the_answer_is_no_single_token(world: World, expected: Said) -> None:
    base = by_mlx(load_base(world.folder / "base")[0], world.folder / "base", world)
    assert divergence(expected.rows, base.rows) > 0.1
    assert base.answer != expected.answer
    assert len(expected.answer) == ANSWER_TOKENS
    assert len(set(expected.answer)) >= ANSWER_TOKENS // 2


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_says_what_our_adapter_says(world: World, expected: Said, name: str) -> None:
    said = TARGETS[name](world)
    assert divergence(expected.rows, said.rows) <= MOST
    assert said.answer == expected.answer
