"""The training loop: reports after each update, prints nothing, writes nothing, and can stop and go on anywhere.

Nothing random outlives an update: the rows of update number n and the dropout in it follow from (seed, n) alone. So a
snapshot needs just the weights, the optimizer's moments and what has been counted so far.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten
from safetensors.numpy import load, save

from stages.lora import adapter
from stages.lora.batches import Batch, collate, sorted_batches, split
from stages.lora.frozen import FrozenLayers
from stages.model.load import on_cpu
from stages.params import schema
from stages.scoring.ranks import ALONE, Ranks
from stages.scoring.score import NOTHING, score_batch
from stages.tokens.row import TokenRow
from stages.training import memory
from stages.training.optimizer import flat_state, learning_rate, make_optimizer, restore_state
from stages.training.progress import Event, Progress, Report, Snapshot, Sums, Timing, Validation
from stages.training.step import Step
from stages.training.updates import Updates

CPU_TOKENS = 512


class Trainer:
    """One run: a frozen model with a trainable adapter, its rows, its optimizer, its progress.

    `options` is the section `train` of params.yaml, `step` the form of an update's computation (see `choose_step`).
    Constructing it runs nothing.

    On several ranks each holds all rows, and works on its share of every update's and of the validation's. All hold the
    same weights and the same progress after each, and raise the same errors.

    Raises:
        ValueError: there are no rows to train on, or none to validate on although something depends on it.
    """

    def __init__(
        self,
        model: Any,
        train: Sequence[TokenRow],
        valid: Sequence[TokenRow],
        options: schema.Train,
        *,
        seed: int,
        step: Step,
        frozen: FrozenLayers | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if not train:
            raise ValueError("there are no rows to train on")
        if unlabelled := [row for row in train if not row.loss_mask[1:].any()]:
            raise ValueError(f"row {unlabelled[0].id} ({unlabelled[0].source}) has no token to train on")
        self.model, self.train, self.options, self.seed = model, train, options, seed
        self.step, self.frozen, self.ranks = step, frozen, ranks
        self.progress = Progress()
        self._updates = Updates(
            [len(row.input_ids) for row in train],
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            grad_accumulation=options.grad_accumulation,
            seed=seed,
        )
        self.steps = options.iters or self._updates.in_epochs(options.epochs or 0)
        self.steps_an_epoch = self._updates.in_epochs(1)
        chosen = validation_rows(valid, options)
        self._validates = bool(chosen)
        self._valid = self._own(chosen)
        if not self._validates and (options.keep == "best" or options.patience is not None):
            raise ValueError(
                "train.keep: best and train.patience need validation rows (train.val_batches, valid split)"
            )
        self._best: dict[str, mx.array] = {}
        self._cache_limit = memory.cache_limit()
        beta_1, beta_2 = options.betas
        self._optimizer = make_optimizer(
            options.optimizer,
            betas=(beta_1, beta_2),
            weight_decay=options.weight_decay,
            bias_correction=options.bias_correction,
        )

    @property
    def share(self) -> dict[str, int | None]:
        """The largest part of a batch that this rank computes at a time: `batch_size` rows, `batch_tokens` tokens."""
        sizes = {"batch_size": self.options.batch_size, "batch_tokens": self.options.batch_tokens}
        share = {name: size and math.ceil(size / self.ranks.size) for name, size in sizes.items()}
        if on_cpu():
            # More at a time keeps a processor no busier, and its activations in memory.
            share["batch_tokens"] = min(share["batch_tokens"] or CPU_TOKENS, CPU_TOKENS)
        return share

    @property
    def done(self) -> bool:
        return self.progress.step >= self.steps or self.progress.stopped_early

    def run(self) -> Iterator[Event]:
        """Go on to the end, an event an update.

        Validation is before the first update, every `steps_per_eval` updates and after the last, on the same rows each
        time; it draws no random numbers.

        Raises:
            ValueError: a loss is NaN or infinite; weights and progress are then those of the update before.
        """
        if not self.progress.validations and self.progress.step == 0 and self._validates:
            yield Event(0, None, self._validate())
        while not self.done:
            timing, report = self._update()
            step = self.progress.step
            due = step % self.options.steps_per_eval == 0 or step == self.steps
            validation = self._validate() if due and self._validates else None
            yield Event(step, report, validation, timing)

    def finish(self) -> None:
        """Put the weights to keep onto the model."""
        if self.options.keep == "best" and self._best:
            self.model.load_weights(list(self._best.items()), strict=False)

    def snapshot(self) -> Snapshot:
        """The state after the last update."""
        arrays = {f"weights/{name}": array for name, array in adapter.weights(self.model).items()}
        arrays |= {f"optimizer/{name}": array for name, array in flat_state(self._optimizer).items()}
        arrays |= {f"best/{name}": array for name, array in self._best.items()}
        return Snapshot(arrays, asdict(self.progress))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of the same run."""
        parts: dict[str, dict[str, mx.array]] = {"weights": {}, "optimizer": {}, "best": {}}
        for name, array in snapshot.arrays.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = array
        self.model.load_weights(list(parts["weights"].items()), strict=False)
        restore_state(self._optimizer, parts["optimizer"])
        self._best = parts["best"]
        self.progress = Progress.from_dict(snapshot.progress)

    def synchronise(self) -> None:
        """Give every rank the state of rank 0, which alone has checkpoints, before they go on."""
        if self.ranks.size > 1:
            own = self.snapshot()
            content = save({name: np.array(array) for name, array in own.arrays.items()})
            arrays = load(self.ranks.broadcast_bytes(content))
            progress = json.loads(self.ranks.broadcast_bytes(json.dumps(own.progress).encode()))
            self.restore(Snapshot({name: mx.array(array) for name, array in arrays.items()}, progress))

    def _update(self) -> tuple[Timing, Report | None]:
        """One optimizer update over the next rows; a report if one is due."""
        started = time.perf_counter()
        options, progress = self.options, self.progress
        step = progress.step + 1
        rows = self._rows(step)
        rate = learning_rate(
            step,
            peak=options.learning_rate,
            schedule=options.schedule,
            warmup_steps=options.warmup_steps,
            steps=self.steps,
            final=options.final_learning_rate,
        )
        mx.random.seed(_dropout_seed(self.seed, step, self.ranks.rank))
        self.model.train()
        gradients, done = self._gradients(rows)
        squares = mx.stack([mx.square(gradient).sum() for gradient in gradients.values()])
        norm = math.sqrt(sum(cast(list[float], squares.tolist())))
        if not math.isfinite(done.loss_sum) or not math.isfinite(norm):
            what = f"the loss is {done.loss}" if not math.isfinite(done.loss_sum) else f"the gradient's norm is {norm}"
            ids = ", ".join(row.id for row in rows)
            raise ValueError(
                f"{what} at step {step} (learning rate {rate:.3g}, rows {ids}); "
                "lower train.learning_rate, set train.max_grad_norm, or look at these rows"
            )
        if options.max_grad_norm is not None:
            gradients, _ = clip_grad_norm(gradients, options.max_grad_norm)
        self._optimizer.learning_rate = rate
        weights = self._optimizer.apply_gradients(gradients, adapter.weights(self.model))
        weights = self.ranks.broadcast_arrays(weights)
        self.model.load_weights(list(weights.items()), strict=False)
        mx.eval(weights, self._optimizer.state)
        memory.trim_cache(self._cache_limit)
        progress.step = step
        done.grad_norm_sum = norm
        progress.total.add(done)
        progress.since_report.add(done)
        timing = Timing(self._updates.epoch(step), done.real_tokens, time.perf_counter() - started)
        due = step % options.steps_per_report == 0 or step == self.steps
        return timing, self._report(rate) if due else None

    def _gradients(self, rows: Sequence[TokenRow]) -> tuple[dict[str, mx.array], Sums]:
        """The gradients of the mean loss over the rows' trained tokens, whatever the micro-batches and the ranks."""
        own = self._own(rows)
        parts = split([len(row.input_ids) for row in own], **self.share)
        batches = [collate(own[part], self.frozen, few_shapes=self.step.is_compiled) for part in parts]
        tokens = sum(int(np.count_nonzero(row.loss_mask[1:])) for row in rows)
        total: dict[str, mx.array] = {}
        done = Sums(updates=1, rows=len(own))
        for batch in batches:
            loss_sum, tree = self.step.value_and_grad(self.model, batch)
            gradients = {name: gradient / tokens for name, gradient in tree_flatten(tree)}
            total = {name: total[name] + gradient for name, gradient in gradients.items()} if total else gradients
            # Evaluated now, so that one micro-batch's activations are in memory at a time.
            mx.eval(loss_sum, total)
            done.loss_sum += float(loss_sum)
            done.trained_tokens += batch.trained_tokens
            done.real_tokens += batch.real_tokens
            done.padded_tokens += batch.padded_tokens
        # A rank without rows in this update takes part in the sum all the same.
        total = total or {name: mx.zeros_like(array) for name, array in adapter.weights(self.model).items()}
        return self.ranks.sum_arrays(total), done.over(self.ranks)

    def _own(self, rows: Sequence[TokenRow]) -> list[TokenRow]:
        """This rank's share."""
        return [rows[i] for i in self.ranks.shard([len(row.input_ids) for row in rows])]

    def _rows(self, step: int) -> list[TokenRow]:
        """The rows of update number `step`, counted from 1."""
        return [self.train[i] for i in self._updates.rows(step)]

    def _report(self, rate: float) -> Report:
        since = self.progress.since_report
        report = Report(self.progress.step, since.loss, rate, since.grad_norm_sum / since.updates)
        self.progress.reports.append(report)
        self.progress.since_report = Sums()
        return report

    def _valid_batches(self) -> Iterator[Batch]:
        """This rank's rows to validate on, the same each time, by length."""
        for part in sorted_batches([len(row.input_ids) for row in self._valid], **self.share):
            yield collate([self._valid[i] for i in part], self.frozen)

    def _validate(self) -> Validation:
        self.model.eval()
        own = sum((score_batch(self.model, batch) for batch in self._valid_batches()), NOTHING)
        loss_sum, tokens = self.ranks.sum([own.loss_sum, own.tokens])
        validation = Validation(self.progress.step, loss_sum / tokens)
        if not math.isfinite(validation.loss):
            raise ValueError(f"the validation loss is {validation.loss} after step {validation.step}")
        progress, patience = self.progress, self.options.patience
        progress.validations.append(validation)
        if progress.best is validation and self.options.keep == "best":
            self._best = adapter.weights(self.model)
        if patience is not None and progress.best is not None:
            worse = sum(v.step > progress.best.step for v in progress.validations)
            progress.stopped_early = worse >= patience
        return validation


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    # Rank 0's is that of a process alone.
    entropy = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64).item())


def validation_rows(rows: Sequence[TokenRow], options: schema.Train) -> Sequence[TokenRow]:
    """The fixed rows to validate on: as many as `val_batches` hold, from the first, or all."""
    if options.val_batches < 0:
        return rows
    lengths = [len(row.input_ids) for row in rows]
    parts = split(lengths, batch_size=options.batch_size, batch_tokens=options.batch_tokens)[: options.val_batches]
    return rows[: parts[-1].stop if parts else 0]
