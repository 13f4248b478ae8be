"""The memory estimate: what it counts, what it advises, when it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from stages.lora import adapter
from stages.lora.execution import narrow_head, use_kernels
from stages.model.load import load_base
from stages.tokens.row import TokenRow
from stages.training import memory
from tests.support.adapters import config
from tests.support.rows import token_row
from tests.support.tiny import write_llama

OPTIONS: dict[str, Any] = {
    "batch_size": 4,
    "batch_tokens": None,
    "grad_checkpoint": False,
    "fused_loss": False,
}
ADVICE: dict[str, Any] = {"batch_size": 4, "batch_tokens": None, "grad_checkpoint": False}


@pytest.fixture
def adapted(model: Any) -> Any:
    adapter.attach(model, config(), seed=0)
    return model


def estimated(model: Any, rows: list[TokenRow], **changes: Any) -> memory.Estimate:
    return memory.estimate(model, rows, **(OPTIONS | changes))


def test_weights_are_counted_to_the_byte(adapted: Any, rows: list[TokenRow]) -> None:
    found = estimated(adapted, rows)
    everything = sum(array.nbytes for _, array in tree_flatten(adapted.parameters()))
    trainable = sum(array.nbytes for array in adapter.weights(adapted).values())
    assert found.weights == everything - trainable
    assert found.adapter == 4 * trainable  # weights, gradients and two moments


def test_activations_grow_with_the_batch_the_length_and_the_adapted_layers(
    adapted: Any, rows: list[TokenRow], tiny_llama: Path
) -> None:
    plain = estimated(adapted, rows)
    assert estimated(adapted, rows, batch_size=8).activations > plain.activations
    assert estimated(adapted, rows[:6]).activations < plain.activations
    assert estimated(adapted, rows, grad_checkpoint=True).activations < plain.activations
    deeper = load_base(tiny_llama)[0]
    adapter.attach(deeper, config(layers=3), seed=0)
    assert estimated(deeper, rows).activations > plain.activations


def test_an_adapted_embedding_sends_gradients_through_every_layer(
    adapted: Any, rows: list[TokenRow], tiny_llama: Path
) -> None:
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(keys=("model.embed_tokens",)), seed=0)
    plain = estimated(adapted, rows).activations  # through two of the three layers
    assert estimated(model, rows).activations == pytest.approx(1.5 * plain, rel=0.2)


def test_the_head_grows_with_trained_tokens_and_vocabulary(tmp_path: Path, rows: list[TokenRow]) -> None:
    heads = []
    for number, vocabulary in enumerate((258, 516)):
        model = load_base(write_llama(tmp_path / str(number), vocab_size=vocabulary))[0]
        adapter.attach(model, config(), seed=0)
        heads.append(estimated(model, rows).head)
    assert heads[1] == 2 * heads[0] > 0


def test_the_fused_head_is_a_chunk_at_most(
    adapted: Any, rows: list[TokenRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = estimated(adapted, rows)
    assert estimated(adapted, rows, fused_loss=True).head == few.head
    monkeypatch.setattr(memory, "chunk_length", lambda vocabulary: 2)
    assert estimated(adapted, rows, fused_loss=True).head == 13 * 2 * 258 * 4 < few.head


def test_what_fits_needs_no_advice(adapted: Any, rows: list[TokenRow]) -> None:
    assert memory.advice(estimated(adapted, rows), **ADVICE) is None


def test_what_may_not_fit_is_told_with_what_helps(adapted: Any, rows: list[TokenRow]) -> None:
    found = estimated(adapted, rows)
    tight = replace(found, available=found.weights + 1)
    told = memory.advice(tight, **ADVICE)
    assert told is not None
    assert "train.batch_size below 4" in told and "train.grad_checkpoint: true" in told
    again = memory.advice(tight, **ADVICE | {"batch_size": 1, "grad_checkpoint": True})
    assert again is not None and "batch_size" not in again and "grad_checkpoint" not in again
    by_tokens = memory.advice(tight, **ADVICE | {"batch_size": None, "batch_tokens": 512})
    assert by_tokens is not None and "train.batch_tokens below 512" in by_tokens


def test_a_budget_of_tokens_is_the_widest_batch(adapted: Any, rows: list[TokenRow]) -> None:
    longest = max(len(row.input_ids) for row in rows)
    by_rows, by_tokens = (
        estimated(adapted, rows, batch_size=size, batch_tokens=tokens)
        for size, tokens in ((2, None), (None, 2 * longest))
    )
    assert by_tokens.activations == by_rows.activations
    assert by_rows.head <= by_tokens.head <= 3 * 4 * 258 * 2 * longest


def test_weights_beyond_the_memory_are_refused(adapted: Any, rows: list[TokenRow]) -> None:
    found = estimated(adapted, rows)
    with pytest.raises(ValueError, match=r"weights take .* choose a smaller or a quantised model"):
        memory.advice(replace(found, available=found.weights - 1), **ADVICE)


def test_available_memory_is_this_machines() -> None:
    assert 2**28 < memory.available_memory() < 2**50


def test_buffers_over_the_limit_are_let_go() -> None:
    array = mx.zeros((1 << 20,))
    mx.eval(array)
    del array
    held = mx.get_cache_memory()
    assert held > 0
    memory.trim_cache(None)
    memory.trim_cache(held)
    assert mx.get_cache_memory() == held
    memory.trim_cache(held - 1)
    assert mx.get_cache_memory() == 0


def test_a_head_by_parts_takes_megabytes(tiny_llama: Path) -> None:
    """Whatever the vocabulary."""
    model, _ = load_base(tiny_llama)
    rows = [token_row(i, 60, trained=40) for i in range(4)]
    options: dict[str, Any] = {"batch_size": 4, "batch_tokens": None, "grad_checkpoint": False, "fused_loss": True}
    model.args.vocab_size = 10**6
    plain = memory.estimate(model, rows, **options).head
    use_kernels(model, rows)
    narrow_head(model)
    assert memory.estimate(model, rows, **options).head <= 2 * 8 * 2**20 < plain
