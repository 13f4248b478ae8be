"""Train a LoRA adapter on the token rows.

data/tokens + artifacts/base.json → artifacts/adapter: `python -m stages.train data/tokens --out artifacts/adapter`
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import base, console, files, params

if TYPE_CHECKING:
    from stages.lora.adapter import Adapted
    from stages.lora.loop import Step


def train(
    tokens: Annotated[Path, typer.Argument(help="The folder that tokenize wrote.")] = Path("data/tokens"),
    base_file: Annotated[Path, typer.Option("--base", help="The base model's manifest.")] = Path("artifacts/base.json"),
    out: Annotated[Path, typer.Option(help="The folder to write the adapter to.")] = Path("artifacts/adapter"),
    metrics: Annotated[Path, typer.Option(help="The metrics to write.")] = Path("artifacts/metrics/train.json"),
    plots: Annotated[Path, typer.Option(help="The folder to write loss.csv and valid_loss.csv to.")] = Path(
        "artifacts/plots"
    ),
    timing: Annotated[Path, typer.Option(help="Where to write speed and memory.")] = Path(
        "artifacts/timing/train.json"
    ),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Adapt the `lora.targets` of `lora.layers` to the training rows, in mlx-lm's adapter format."""
    from stages.lora import adapter, loop
    from stages.lora.model import load_base
    from stages.text.parquet import read_tokens

    started = time.perf_counter()
    settings = params.load(params_file, overrides or ())
    manifest = base.read(base_file)
    rows = {
        name: read_tokens(tokens / f"{name}.parquet", tokenizer=manifest.tokenizer_identity)
        for name in ("train", "valid")
    }
    with console.progress("loading the base model"):
        model, _ = load_base(
            base.locate(manifest), dtype=settings.model.dtype, trust_remote_code=settings.model.trust_remote_code
        )
    config = adapter.configure(model, **settings.lora.model_dump())
    adapter.attach(model, config, seed=settings.seed)
    _show_adapter(*adapter.summary(model))

    options = settings.train
    total = loop.count_steps(
        len(rows["train"]), batch_size=options.batch_size, epochs=options.epochs, iters=options.iters
    )
    console.say(f"{len(rows['train']):,} rows, {total:,} updates of {options.batch_size} rows")
    history: list[Step] = []
    loop_started = time.perf_counter()
    with console.progress("training", total=total) as advance:
        for step in loop.train_steps(
            model,
            rows["train"],
            rows["valid"],
            steps=total,
            seed=settings.seed,
            **options.model_dump(exclude={"epochs", "iters", "steps_per_report"}),
        ):
            history.append(step)
            advance(1)
            _report(history, options.steps_per_report, loop_started)

    with files.replacing(out) as draft:
        adapter.save(draft, model, config)
    _write_curves(plots, history, options.steps_per_report)
    summary = _summary(history)
    files.write_json(metrics, summary)
    files.write_json(timing, _timing(history, started, loop_started))
    console.table(
        f"Training → {out}", ("", "value"), ((name.replace("_", " "), value) for name, value in summary.items())
    )


def _show_adapter(groups: list[Adapted], parameters: int) -> None:
    trainable = sum(group.parameters for group in groups)
    rows = [(group.key, group.layers, group.parameters) for group in groups]
    rows.append(("all", sum(group.layers for group in groups), trainable))
    console.table("Adapter", ("module", "adapted", "trainable parameters"), rows)
    console.say(f"{trainable / parameters:.3%} of {parameters:,} parameters are trained")


def _mean_loss(steps: list[Step]) -> float:
    return sum(s.loss * s.trained_tokens for s in steps) / sum(s.trained_tokens for s in steps)


def _report(history: list[Step], every: int, started: float) -> None:
    last = history[-1]
    if last.valid_loss is not None:
        console.say(f"step {last.step:>5}  validation loss {last.valid_loss:.4f}")
    if last.step % every == 0:
        rate = sum(s.real_tokens for s in history) / (time.perf_counter() - started)
        console.say(f"step {last.step:>5}  loss {_mean_loss(history[-every:]):.4f}  {rate:,.0f} tokens/s")


def _write_curves(folder: Path, history: list[Step], every: int) -> None:
    """Two tables for `dvc plots`: the training loss of every report, the validation loss of every validation."""
    reports = [history[max(i - every, 0) : i] for i in range(every, len(history) + every, every)]
    loss = [f"{part[-1].step},{_mean_loss(part):.5f},{part[-1].learning_rate:.6g}\n" for part in reports]
    valid = [f"{s.step},{s.valid_loss:.5f}\n" for s in history if s.valid_loss is not None]
    files.write_text(folder / "loss.csv", "step,loss,learning_rate\n" + "".join(loss))
    files.write_text(folder / "valid_loss.csv", "step,valid_loss\n" + "".join(valid))


def _summary(history: list[Step]) -> dict[str, Any]:
    validations = [s.valid_loss for s in history if s.valid_loss is not None]
    tail = history[-max(len(history) // 10, 1) :]
    summary = {
        "steps": len(history),
        "epochs": history[-1].epoch,
        "trained_tokens": sum(s.trained_tokens for s in history),
        "loss": round(_mean_loss(tail), 4),
    }
    if validations:
        summary |= {"valid_loss_before": round(validations[0], 4), "valid_loss": round(validations[-1], 4)}
    return summary


def _timing(history: list[Step], started: float, loop_started: float) -> dict[str, Any]:
    import mlx.core as mx

    real, padded = sum(s.real_tokens for s in history), sum(s.padded_tokens for s in history)
    seconds = time.perf_counter() - loop_started
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "seconds_to_first_update": round(loop_started - started, 3),
        "tokens_per_second": round(real / seconds, 2),
        "padded_share": round(padded / (real + padded), 4),
        "peak_memory_bytes": mx.get_peak_memory(),
    }


if __name__ == "__main__":
    console.main(train)
