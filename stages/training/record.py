"""The metrics and the curves of a run, for `dvc metrics` and `dvc plots`."""

from __future__ import annotations

from typing import Any

from stages.training.loop import Trainer
from stages.training.progress import Progress


def curves(progress: Progress) -> dict[str, str]:
    """CSV tables by file name: each report's loss, learning rate and gradient norm, each validation's loss."""
    reports = [f"{r.step},{r.loss:.5f},{r.learning_rate:.6g},{r.grad_norm:.5f}\n" for r in progress.reports]
    validations = [f"{v.step},{v.loss:.5f}\n" for v in progress.validations]
    return {
        "loss.csv": "step,loss,learning_rate,grad_norm\n" + "".join(reports),
        "valid_loss.csv": "step,valid_loss\n" + "".join(validations),
    }


def summary(trainer: Trainer) -> dict[str, Any]:
    """The metrics, rounded. `valid_loss` is that of the weights that were kept."""
    progress, total, options = trainer.progress, trainer.progress.total, trainer.options
    figures: dict[str, Any] = {
        "steps": progress.step,
        "epochs": round(total.rows / len(trainer.train), 4),
        "trained_tokens": total.trained_tokens,
        "padded_share": round(total.padded_share, 4),
        "loss": round(progress.reports[-1].loss, 4),
        "grad_norm": round(progress.reports[-1].grad_norm, 4),
    }
    if progress.best:
        kept = progress.best if options.keep == "best" else progress.validations[-1]
        figures |= {
            "valid_loss_before": round(progress.validations[0].loss, 4),
            "valid_loss": round(kept.loss, 4),
            "kept_step": kept.step,
            "stopped_early": int(progress.stopped_early),
        }
    return figures
