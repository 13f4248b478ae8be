"""Training held against other people's trainers: mlx-lm, and PyTorch with PEFT (`make test-peers`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss, iterate_batches

from stages.lora import adapter
from stages.lora.batches import collate
from stages.lora.loss import sum_loss
from stages.model.load import load_base
from stages.tokens.row import TokenRow
from stages.training.loop import Trainer
from tests.support.adapters import config
from tests.support.rows import token_row
from tests.support.runs import make_trainer

Arrays = dict[str, np.ndarray]

RATE, BETAS, DECAY, STEPS = 1e-3, (0.9, 0.99), 0.1, 5
# What these libraries deprecate in each other is theirs to correct.
foreign_warnings = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def filled_model(folder: Path) -> Any:
    """The tiny model with an adapter whose B is not zero, so that gradients reach A.

    Nor is it large: attention of very unequal scores magnifies the rounding of each library's exp twentyfold.
    """
    model = load_base(folder)[0]
    adapter.attach(model, config(), seed=0)
    b = {name: array for name, array in adapter.weights(model).items() if name.endswith("lora_b")}
    filled = [(name, 0.1 * mx.random.normal(a.shape, key=mx.random.key(i))) for i, (name, a) in enumerate(b.items())]
    model.load_weights(filled, strict=False)
    return model


def trainer(model: Any, rows: list[TokenRow]) -> Trainer:
    options: dict[str, Any] = {"iters": STEPS, "batch_size": 4, "learning_rate": RATE, "seed": 0}
    return make_trainer(model, rows, [], **options, betas=list(BETAS), weight_decay=DECAY)


def our_gradients(folder: Path, rows: list[TokenRow]) -> tuple[float, Arrays]:
    """Loss and gradients of an update over these rows, as training takes them."""
    gradients, done = trainer(filled_model(folder), rows)._gradients(rows)
    return done.loss, {name: np.array(gradient) for name, gradient in gradients.items()}


def assert_same(ours: Arrays, theirs: Arrays, *, of_largest: float) -> None:
    """Each array agrees to a share of its largest element: rounding follows the sums, not the single elements."""
    assert sorted(ours) == sorted(theirs)
    for name, array in ours.items():
        largest = float(np.abs(array).max())
        assert largest > 0, name
        np.testing.assert_allclose(theirs[name], array, rtol=0, atol=of_largest * largest, err_msg=name)


# --- mlx-lm's default_loss


def test_loss_and_gradients_are_those_of_mlx_lm_where_nothing_is_padded_or_masked(tiny_llama: Path) -> None:
    rows = [token_row(i, 20, trained=20) for i in range(4)]
    model = filled_model(tiny_llama)
    tokens_BxL = mx.array(np.stack([row.input_ids for row in rows]))
    (loss, tokens), tree = nn.value_and_grad(model, default_loss)(model, tokens_BxL, mx.array([[0, 20]] * 4))
    our_loss, ours = our_gradients(tiny_llama, rows)
    assert tokens.item() == 4 * 19
    assert our_loss == pytest.approx(loss.item(), rel=1e-6)
    assert_same(ours, {name: np.array(gradient) for name, gradient in tree_flatten(tree)}, of_largest=1e-5)


def test_mlx_lm_trains_on_one_pad_target_a_row_and_we_on_none(tiny_llama: Path) -> None:
    rows = [token_row(i, 6 + 3 * i, trained=6 + 3 * i) for i in range(4)]
    model = filled_model(tiny_llama)
    losses = [nn.losses.cross_entropy(model(mx.array(row.input_ids[None]))[0, :-1], targets(row)) for row in rows]
    true_sum, true_tokens = sum(loss.sum().item() for loss in losses), sum(len(row.input_ids) - 1 for row in rows)
    pad = mx.array([0])
    pad_sum = sum(nn.losses.cross_entropy(model(mx.array(row.input_ids[None]))[0, -1:], pad).item() for row in rows)

    ((batch, lengths),) = iterate_batches([(row.input_ids.tolist(), 0) for row in rows], 4, 512)
    mean, tokens = default_loss(model, batch, lengths)
    assert tokens.item() == true_tokens + len(rows)
    assert mean.item() * tokens.item() == pytest.approx(true_sum + pad_sum, rel=1e-5)

    ours = collate(rows)
    assert ours.trained_tokens == true_tokens
    assert sum_loss(model, ours).item() == pytest.approx(true_sum, rel=1e-5)


def targets(row: TokenRow) -> mx.array:
    return mx.array(row.input_ids[1:])


# --- PyTorch and PEFT


def peft_model(folder: Path, weights: dict[str, mx.array]) -> Any:
    """The same base in transformers, with the same adapter in PEFT."""
    import peft
    import torch
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = config()
    like_ours = peft.LoraConfig(
        r=ours.rank,
        lora_alpha=ours.scale * ours.rank,
        lora_dropout=ours.dropout,
        target_modules=[key.split(".")[-1] for key in ours.keys],
        layers_to_transform=list(range(len(base.model.layers) - cast(int, ours.layers), len(base.model.layers))),
    )
    model = peft.get_peft_model(base, like_ours)
    trainable = parameters(model)
    assert sorted(trainable) == sorted(weights)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(torch.tensor(np.array(weights[name]).T))  # PEFT keeps (rank, in) and (out, rank)
    return model


def parameters(model: Any) -> dict[str, Any]:
    """PEFT's trainable parameters by our names."""
    return {
        name.removeprefix("base_model.model.")
        .replace("lora_A.default.weight", "lora_a")
        .replace("lora_B.default.weight", "lora_b"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def transposed(tensors: dict[str, Any]) -> Arrays:
    return {name: tensor.detach().numpy().T for name, tensor in tensors.items()}


def torch_loss(model: Any, rows: list[TokenRow]) -> Any:
    """The loss of transformers: labels of -100 wherever a token is padding or masked."""
    import torch

    shape = (len(rows), max(len(row.input_ids) for row in rows))
    tokens, labels, attention = np.zeros(shape, np.int64), np.full(shape, -100), np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        tokens[i, :length] = row.input_ids
        labels[i, :length] = np.where(row.loss_mask, row.input_ids, -100)
        attention[i, :length] = 1
    inputs = {"input_ids": tokens, "labels": labels, "attention_mask": attention}
    return model(**{name: torch.tensor(array) for name, array in inputs.items()}).loss


@pytest.mark.peers
@foreign_warnings
def test_loss_and_gradients_are_those_of_peft(tiny_llama: Path, rows: list[TokenRow]) -> None:
    model = peft_model(tiny_llama, adapter.weights(filled_model(tiny_llama)))
    loss = torch_loss(model, rows[:4])
    loss.backward()
    our_loss, ours = our_gradients(tiny_llama, rows[:4])
    assert our_loss == pytest.approx(loss.item(), rel=1e-6)
    assert_same(ours, transposed({name: p.grad for name, p in parameters(model).items()}), of_largest=1e-5)


@pytest.mark.peers
@foreign_warnings
def test_updates_end_in_the_weights_of_torch_adamw(tiny_llama: Path, rows: list[TokenRow]) -> None:
    run = trainer(filled_model(tiny_llama), rows)
    before = {name: np.array(array) for name, array in adapter.weights(run.model).items()}
    model = peft_model(tiny_llama, adapter.weights(run.model))
    import torch

    optimizer = torch.optim.AdamW(parameters(model).values(), lr=RATE, betas=BETAS, eps=1e-8, weight_decay=DECAY)
    losses = []
    for step in range(1, STEPS + 1):
        loss = torch_loss(model, run._rows(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    list(run.run())
    assert [report.loss for report in run.progress.reports] == pytest.approx(losses, rel=1e-5)
    after, theirs = adapter.weights(run.model), transposed(parameters(model))
    ours = {name: np.array(after[name]) - start for name, start in before.items()}
    assert_same(ours, {name: theirs[name] - start for name, start in before.items()}, of_largest=1e-4)
