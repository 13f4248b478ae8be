"""Small training runs: options, and trainers whose model is set up as the train stage does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.lora import adapter, patches, targets
from stages.lora.execution import narrow_head
from stages.lora.frozen import FrozenLayers
from stages.params import schema
from stages.scoring.ranks import ALONE, Ranks
from stages.tokens.row import TokenRow
from stages.training.loop import Trainer
from stages.training.step import choose_step

# No schedule, no decay, no clipping: what a test is about, it sets itself.
PLAIN: dict[str, Any] = {
    "epochs": None,
    "iters": 3,
    "init_adapter": None,
    "batch_size": 4,
    "batch_tokens": None,
    "grad_accumulation": 1,
    "optimizer": "adamw",
    "betas": [0.9, 0.999],
    "bias_correction": True,
    "weight_decay": 0.0,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "warmup_steps": 0,
    "final_learning_rate": 0.0,
    "max_grad_norm": None,
    "grad_checkpoint": False,
    "fused_loss": True,
    "compile": "auto",
    "steps_per_report": 1,
    "steps_per_eval": 100,
    "val_batches": -1,
    "keep": "last",
    "patience": None,
}
# A run with all that has a state: warm-up, decay, validations.
OPTIONS: dict[str, Any] = {"iters": 7, "weight_decay": 0.01, "warmup_steps": 2, "steps_per_eval": 3, "val_batches": 1}


def train_options(**changes: Any) -> schema.Train:
    """The section `train` of params.yaml, plain but for the changes."""
    return schema.Train.model_validate(PLAIN | changes)


def make_trainer(
    model: Any,
    train: Sequence[TokenRow],
    valid: Sequence[TokenRow],
    *,
    seed: int = 0,
    frozen: FrozenLayers | None = None,
    ranks: Ranks = ALONE,
    **changes: Any,
) -> Trainer:
    """A trainer of a model with its adapter on; the changes go over the plain options."""
    options = train_options(**changes)
    model.eval()
    narrow_head(model)
    if options.grad_checkpoint:
        first = targets.frozen_layers(adapter.weights(model), len(model.layers))
        patches.patch_layers(model.layers[first:])
    step = choose_step(model, train, options, frozen=frozen)
    return Trainer(model, train, valid, options, seed=seed, step=step, frozen=frozen, ranks=ranks)
