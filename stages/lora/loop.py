"""The training loop: yields a report after each update, prints nothing, writes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from stages.lora.batches import Batch, collate, epoch_batches, sorted_batches
from stages.lora.loss import mean_loss, narrow_head
from stages.lora.score import score_batch
from stages.text.tokens import TokenRow


@dataclass(frozen=True)
class Step:
    """One optimizer update. `loss` is the mean over its trained tokens, before the update."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    trained_tokens: int
    real_tokens: int
    padded_tokens: int
    valid_loss: float | None


def count_steps(rows: int, *, batch_size: int, epochs: int | None, iters: int | None) -> int:
    """Updates of a run: `iters`, or as many as `epochs` passes over the rows take."""
    return iters if iters is not None else (epochs or 0) * math.ceil(rows / batch_size)


def warmup_schedule(learning_rate: float, warmup_steps: int):  # type: ignore[no-untyped-def]
    """The learning rate of update number `step` (from 0): linear up to `learning_rate`, then constant."""

    def rate(step: mx.array) -> mx.array:
        return learning_rate * mx.minimum(1.0, (step + 1) / max(warmup_steps, 1))

    return rate


def train_steps(
    model: nn.Module,
    train: Sequence[TokenRow],
    valid: Sequence[TokenRow],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    steps_per_eval: int,
    val_batches: int,
    seed: int,
) -> Iterator[Step]:
    """Update the model's trainable weights `steps` times, epoch after epoch, reporting each.

    Validation runs before the first update (reported with it), every `steps_per_eval` updates and after the last, on
    the same `val_batches` batches each time (-1: all); it draws no random numbers, so it changes nothing else.

    Raises:
        ValueError: a loss is NaN or infinite.
    """
    narrow_head(model)
    mx.random.seed(seed)  # dropout draws from MLX's global state
    optimizer = optim.AdamW(
        warmup_schedule(learning_rate, warmup_steps), weight_decay=weight_decay, bias_correction=True
    )
    value_and_grad = nn.value_and_grad(model, mean_loss)
    valid_batches = validation_batches(valid, batch_size=batch_size, val_batches=val_batches)
    valid_loss = _validate(model, valid_batches)
    for step, (epoch, rows) in enumerate(_endless(train, batch_size=batch_size, seed=seed), start=1):
        batch = collate(rows)
        model.train()
        loss, gradients = value_and_grad(model, batch)
        optimizer.update(model, gradients)
        rate = optimizer.learning_rate.item()  # of this update: the schedule is read at its start
        mx.eval(loss, model.trainable_parameters(), optimizer.state)
        if not math.isfinite(loss.item()):
            ids = ", ".join(row.id for row in rows)
            raise ValueError(f"the loss is {loss.item()} at step {step} (learning rate {rate:.3g}, rows {ids})")
        if step > 1 and (step % steps_per_eval == 0 or step == steps):
            valid_loss = _validate(model, valid_batches)
        yield Step(
            step,
            epoch,
            loss.item(),
            rate,
            batch.trained_tokens,
            batch.real_tokens,
            batch.inputs_BxL.size + len(rows) - batch.real_tokens,
            valid_loss,
        )
        valid_loss = None
        if step == steps:
            return


def _endless(rows: Sequence[TokenRow], *, batch_size: int, seed: int) -> Iterator[tuple[int, list[TokenRow]]]:
    lengths = [len(row.input_ids) for row in rows]
    epoch = 0
    while True:
        for indices in epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch):
            yield epoch + 1, [rows[i] for i in indices]
        epoch += 1


def validation_batches(rows: Sequence[TokenRow], *, batch_size: int, val_batches: int) -> list[Batch]:
    """The fixed batches to validate on: the first `val_batches` times `batch_size` rows, or all."""
    chosen = rows if val_batches < 0 else rows[: val_batches * batch_size]
    lengths = [len(row.input_ids) for row in chosen]
    return [collate([chosen[i] for i in part]) for part in sorted_batches(lengths, batch_size=batch_size)]


def _validate(model: nn.Module, batches: Sequence[Batch]) -> float | None:
    if not batches:
        return None
    model.eval()
    losses = [score_batch(model, batch) for batch in batches]
    return sum(s.loss_sum for s in losses) / sum(s.tokens for s in losses)
