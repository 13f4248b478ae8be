"""Train a LoRA adapter on the token rows; interrupted, go on where it stood.

data/tokens + artifacts/base.json → artifacts/adapter: `python -m stages.train data/tokens --out artifacts/adapter`
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.base import store
from stages.base.manifest import Manifest, locate, read_manifest
from stages.cli import console, interrupts
from stages.cli.settings import load_settings
from stages.files import hashes, outputs
from stages.params import schema

if TYPE_CHECKING:
    from stages.lora.execution import Execution
    from stages.lora.lora_config import LoraConfig
    from stages.training.checkpoint import Checkpoints
    from stages.training.loop import Trainer
    from stages.training.progress import Event
    from stages.training.throughput import Throughput


def train(
    tokens: Annotated[Path, typer.Argument(help="The folder that tokenize wrote.")] = Path("data/tokens"),
    base_file: console.ManifestFile = Path("artifacts/base.json"),
    out: Annotated[Path, typer.Option(help="The folder to write the adapter to.")] = Path("artifacts/adapter"),
    metrics: Annotated[Path, typer.Option(help="The headline numbers to write.")] = Path(
        "artifacts/metrics/train.json"
    ),
    details: Annotated[Path, typer.Option(help="All numbers of the run.")] = Path("artifacts/details/train.json"),
    plots: Annotated[Path, typer.Option(help="The folder to write loss.csv and valid_loss.csv to.")] = Path(
        "artifacts/plots"
    ),
    timing: Annotated[Path, typer.Option(help="Where to write speed and memory.")] = Path(
        "artifacts/timing/train.json"
    ),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Adapt the `lora.targets` of `lora.layers` to the training rows, in mlx-lm's adapter format.

    Its state is saved as it goes, under `artifacts/checkpoints`. Interrupted at any moment, by whatever, the same
    command goes on and ends in the same bytes; with other parameters, rows or another base it starts afresh.

    Under `mlx.launch` its processes share out each update's rows; the first of them talks and writes.
    """
    settings = load_settings(params_file, overrides)
    from stages.lora import adapter
    from stages.lora.execution import set_up
    from stages.scoring.ranks import join
    from stages.tokens.parquet import read_tokens
    from stages.training import resume
    from stages.training.checkpoint import Checkpoints
    from stages.training.loop import Trainer
    from stages.training.step import choose_step
    from stages.training.throughput import Throughput

    throughput = Throughput(time.perf_counter())
    ranks = join()
    console.follow(ranks.rank)

    # Load
    outputs.refuse_foreign(out, ["adapters.safetensors", "adapter_config.json"], inputs=[tokens])
    manifest = read_manifest(base_file)
    splits = {name: tokens / f"{name}.parquet" for name in ("train", "valid")}
    rows = {name: read_tokens(path, tokenizer=manifest.tokenizer_identity) for name, path in splits.items()}
    model, lora = _adapted_model(settings, manifest)

    # Prepare
    with console.progress("checking the fast path"):
        execution = set_up(
            model,
            rows["train"] + rows["valid"],
            adapted=adapter.weights(model),
            options=settings.model,
            base=manifest.identity,
            cache_gb=settings.runtime.cache_gb,
            is_traced=settings.train.compile == "on",
            grad_checkpoint=settings.train.grad_checkpoint,
        )
        step = choose_step(model, rows["train"], settings.train, frozen=execution.frozen)
    trainer = Trainer(
        model,
        rows["train"],
        rows["valid"],
        settings.train,
        seed=settings.seed,
        step=step,
        frozen=execution.frozen,
        ranks=ranks,
    )
    checkpoints = Checkpoints(store.project("checkpoints"), _fingerprint(trainer, settings, splits, manifest))
    _tell_plan(trainer, [*execution.notes, *step.notes])

    # Run and write
    with resume.lock(checkpoints, ranks, console.say):
        _run(trainer, checkpoints, throughput, steps_per_save=settings.runtime.steps_per_save)
        _close(execution)
        if ranks.rank == 0:
            _write(
                trainer,
                lora,
                throughput,
                base=manifest.weights_identity,
                out=out,
                metrics=metrics,
                details=details,
                plots=plots,
                timing=timing,
            )
            checkpoints.clear()


def _adapted_model(settings: schema.Params, manifest: Manifest) -> tuple[Any, LoraConfig]:
    """The base model with its adapter, fresh or taken from `train.init_adapter`, and the adapter's config."""
    from stages.adapters import find
    from stages.lora import adapter, lora_config
    from stages.model.load import load_base

    directory = locate(manifest)
    with console.progress("loading the base model"):
        model, _ = load_base(directory, dtype=settings.model.dtype, trust_remote_code=settings.model.trust_remote_code)
    config = lora_config.configure(model, settings.lora)
    if settings.train.init_adapter is None:
        adapter.attach(model, config, seed=settings.seed)
    else:
        adapter.start_from(model, find.read(Path(settings.train.init_adapter), model=model), config)
    groups, parameters = adapter.summary(model)
    trainable = sum(group.parameters for group in groups)
    modules = [(group.key, group.layers, group.parameters) for group in groups]
    total = ("all", sum(group.layers for group in groups), trainable)
    console.table("Adapter", ("module", "adapted", "trainable parameters"), [*modules, total])
    console.say(f"{trainable / parameters:.3%} of {parameters:,} parameters are trained")
    return model, config


def _fingerprint(trainer: Trainer, settings: schema.Params, splits: dict[str, Path], manifest: Manifest) -> str:
    """The name of this run, after everything that shapes its result."""
    from stages.adapters import find
    from stages.lora import kernels
    from stages.training.checkpoint import fingerprint

    start = settings.train.init_adapter
    return fingerprint(
        trainer.ranks,
        params=settings.model_dump(include={"seed", "lora", "train"})
        | settings.model.model_dump(include={"dtype", "cpu_kernels", "cache_frozen"}),
        tokens={name: hashes.sha256(path) for name, path in splits.items()},
        base=manifest.identity,
        init_adapter=None if start is None else find.digest(Path(start)),
        # By what was found at the start: another form rounds otherwise.
        execution={
            "fused": trainer.step.is_fused,
            "compiled": trainer.step.is_compiled,
            "cpu_kernels": kernels.in_use(trainer.model),
            "frozen_layers": trainer.frozen.layers if trainer.frozen else 0,
        },
    )


def _tell_plan(trainer: Trainer, notes: list[str]) -> None:
    """The number of updates, what makes them faster, and the memory that they need."""
    from stages.model import numerics
    from stages.training import memory

    options, ranks = trainer.options, trainer.ranks.size
    size, unit = (options.batch_size, "rows") if options.batch_size else (options.batch_tokens, "tokens at most")
    size = (size or 0) * options.grad_accumulation
    console.say(
        f"{len(trainer.train):,} rows, {trainer.steps:,} updates of {size:,} {unit}, "
        f"{trainer.steps_an_epoch:,} an epoch" + (f", data-parallel on {ranks} ranks" if ranks > 1 else "")
    )
    if unit == "rows" and ranks > size:
        console.warn(f"{ranks - size} ranks have no rows; raise train.batch_size to {ranks} or more")
    for note in filter(None, [*notes, numerics.idle_cores()]):
        console.say(note)
    share: dict[str, Any] = {**trainer.share, "grad_checkpoint": options.grad_checkpoint}
    needed = memory.estimate(trainer.model, trainer.train, **share, fused_loss=trainer.step.is_fused)
    if advice := memory.advice(needed, **share):
        console.warn(advice)
    else:
        console.say(f"about {needed.total / 2**30:.1f} of {needed.available / 2**30:.1f} GiB of memory needed")


def _run(trainer: Trainer, checkpoints: Checkpoints, throughput: Throughput, *, steps_per_save: int) -> None:
    """Train to the end, or until somebody asks to stop."""
    from stages.training import resume

    with interrupts.stop_requests() as requested, console.progress("training", total=trainer.steps) as advance:
        events = resume.run(trainer, checkpoints, steps_per_save=steps_per_save, requested=requested, tell=console.say)
        try:
            for event in events:
                _report(event, throughput, advance)
        except resume.StoppedError as stopped:
            raise typer.Exit(stopped.status) from None


def _report(event: Event, throughput: Throughput, advance: Any) -> None:
    """A line for a report or a validation; on a terminal, the bar tells the rest."""
    from stages.training.throughput import peak_memory

    if event.timing:
        throughput.add(event.timing)
    report, validation, rate = event.report, event.validation, throughput.tokens_per_second
    line = f"step {event.step:>5}"
    if report:
        line += f"  loss {report.loss:.4f}  {rate:,.0f} tokens/s"
    if validation:
        line += f"  validation loss {validation.loss:.4f}"
    if report or validation:
        console.say(line)
    advance(to=event.step, status=f"{rate:,.0f} tokens/s, {peak_memory() / 1e9:.1f} GB")


def _close(execution: Execution) -> None:
    if problem := execution.close():
        console.warn(problem)


def _write(
    trainer: Trainer,
    lora: LoraConfig,
    throughput: Throughput,
    *,
    base: str,
    out: Path,
    metrics: Path,
    details: Path,
    plots: Path,
    timing: Path,
) -> None:
    """The adapter, its curves and its metrics."""
    from stages.lora import adapter
    from stages.model import numerics
    from stages.training import record

    trainer.finish()
    with outputs.replacing(out) as draft:
        adapter.save(draft, trainer.model, lora, base=base)
    for name, text in record.curves(trainer.progress).items():
        outputs.write_text(plots / name, text)
    summary = record.summary(trainer)
    outputs.write_json(details, summary | {"numerics": numerics.in_use()})
    outputs.write_json(metrics, {"valid_loss": summary["valid_loss"]} if "valid_loss" in summary else {})
    outputs.write_json(timing, throughput.figures(padded_share=trainer.progress.total.padded_share))
    console.table(f"Training → {out}", ("", "value"), ((name.replace("_", " "), v) for name, v in summary.items()))


if __name__ == "__main__":
    console.main(train)
