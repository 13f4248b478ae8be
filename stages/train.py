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
from stages.cli import console
from stages.files import hashes, outputs
from stages.lora import execution as shortcuts
from stages.params import schema
from stages.params.loading import load_params
from stages.training import resume
from stages.training.throughput import Clock, peak_memory

if TYPE_CHECKING:
    from stages.lora.adapter import LoraConfig
    from stages.tokens.row import TokenRow
    from stages.training.loop import TrainConfig, Trainer
    from stages.training.progress import Event


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
    """Adapt the `lora.targets` of `lora.layers` to the training rows, in mlx-lm's adapter format.

    Its state is saved as it goes, under `artifacts/checkpoints`. Interrupted at any moment, by whatever, the same
    command goes on and ends in the same bytes; with other parameters, rows or another base it starts afresh.

    Under `mlx.launch` its processes share out each update's rows; the first of them talks and writes.
    """
    from stages.lora import adapter
    from stages.scoring import ranks as distributed
    from stages.tokens.parquet import read_tokens
    from stages.training import record
    from stages.training.checkpoint import Checkpoints, fingerprint
    from stages.training.loop import Trainer

    started = time.perf_counter()
    ranks = distributed.join()
    console.follow(ranks.rank)
    settings = load_params(params_file, overrides or ())
    outputs.refuse_foreign(out, ["adapters.safetensors", "adapter_config.json"], inputs=[tokens])
    manifest = read_manifest(base_file)
    splits = {name: tokens / f"{name}.parquet" for name in ("train", "valid")}
    rows = {name: read_tokens(path, tokenizer=manifest.tokenizer_identity) for name, path in splits.items()}
    model, lora = _adapted_model(settings, manifest)
    prefix = shortcuts.take(
        model,
        adapter.weights(model),
        rows["train"] + rows["valid"],
        settings=settings,
        manifest=manifest,
        # What is to be compiled is traced, and the kernels cannot be.
        kernels=settings.model.cpu_kernels and settings.train.compile != "on",
    )
    config = _config(settings, rows["train"], ranks.size)
    with console.progress("checking the fast path"):
        trainer = Trainer(model, rows["train"], rows["valid"], config, prefix=prefix, ranks=ranks)
    for note in trainer.notes:
        console.say(note)
    run = fingerprint(
        ranks,
        params=settings.model_dump(include={"seed", "lora", "train"})
        | settings.model.model_dump(include={"dtype", "cpu_kernels"}),
        tokens={name: hashes.sha256(path) for name, path in splits.items()},
        base=manifest.identity,
        init_adapter=_digest(settings.train.init_adapter),
        ways=trainer.ways,
    )
    checkpoints = Checkpoints(store.project("checkpoints"), run)
    _tell_memory(trainer)
    clock = Clock(started)
    with resume.lock(checkpoints, ranks):
        with console.progress("training", total=config.steps) as advance:
            resume.run(
                trainer,
                checkpoints,
                steps_per_save=settings.runtime.steps_per_save,
                report=lambda event: _report(event, clock.rate(trainer), advance),
            )
        shortcuts.close(prefix)
        if ranks.rank:
            return
        trainer.finish()
        with outputs.replacing(out) as draft:
            adapter.save(draft, model, lora)
        for name, text in record.curves(trainer.progress).items():
            outputs.write_text(plots / name, text)
        summary = record.summary(trainer)
        outputs.write_json(metrics, summary)
        outputs.write_json(timing, clock.figures(trainer))
        checkpoints.clear()
    console.table(f"Training → {out}", ("", "value"), ((name.replace("_", " "), v) for name, v in summary.items()))


def _adapted_model(settings: schema.Params, manifest: Manifest) -> tuple[Any, LoraConfig]:
    """The base model with its adapter, fresh or taken from `train.init_adapter`, and the adapter's config."""
    from stages.lora import adapter
    from stages.model.load import load_base

    directory = locate(manifest)
    with console.progress("loading the base model"):
        model, _ = load_base(directory, dtype=settings.model.dtype, trust_remote_code=settings.model.trust_remote_code)
    config = adapter.configure(model, **settings.lora.model_dump())
    if settings.train.init_adapter is None:
        adapter.attach(model, config, seed=settings.seed)
    else:
        adapter.start_from(model, Path(settings.train.init_adapter), config)
    groups, parameters = adapter.summary(model)
    trainable = sum(group.parameters for group in groups)
    modules = [(group.key, group.layers, group.parameters) for group in groups]
    total = ("all", sum(group.layers for group in groups), trainable)
    console.table("Adapter", ("module", "adapted", "trainable parameters"), [*modules, total])
    console.say(f"{trainable / parameters:.3%} of {parameters:,} parameters are trained")
    return model, config


def _digest(init_adapter: str | None) -> str | None:
    """The bytes that an earlier adapter starts the run with."""
    from stages.lora.adapter import WEIGHTS_FILE

    return None if init_adapter is None else hashes.sha256(Path(init_adapter) / WEIGHTS_FILE)


def _config(settings: schema.Params, rows: list[TokenRow], ranks: int) -> TrainConfig:
    from stages.training.loop import TrainConfig
    from stages.training.updates import Updates

    options = settings.train.model_dump(exclude={"epochs", "iters", "init_adapter"})
    options["betas"] = tuple(options["betas"])
    sizes = {name: options[name] for name in ("batch_size", "batch_tokens", "grad_accumulation")}
    updates = Updates([len(row.input_ids) for row in rows], seed=settings.seed, **sizes)
    steps = settings.train.iters or updates.in_epochs(settings.train.epochs or 0)
    size, unit = (sizes["batch_size"], "rows") if sizes["batch_size"] else (sizes["batch_tokens"], "tokens at most")
    size *= sizes["grad_accumulation"]
    console.say(
        f"{len(rows):,} rows, {steps:,} updates of {size:,} {unit}, {updates.in_epochs(1):,} an epoch"
        + (f", data-parallel on {ranks} ranks" if ranks > 1 else "")
    )
    if unit == "rows" and ranks > size:
        console.warn(f"{ranks - size} ranks have no rows; raise train.batch_size to {ranks} or more")
    return TrainConfig(steps=steps, seed=settings.seed, **options)


def _tell_memory(trainer: Trainer) -> None:
    """What the run will take of the memory there is, and what would help if it seems too much."""
    from stages.training import memory

    options: dict[str, Any] = {**trainer.share, "grad_checkpoint": trainer.config.grad_checkpoint}
    needed = memory.estimate(trainer.model, trainer.train, **options, fused_loss=trainer.is_fused)
    if advice := memory.advice(needed, **options):
        console.warn(advice)
    else:
        console.say(f"about {needed.total / 2**30:.1f} of {needed.available / 2**30:.1f} GiB of memory needed")


def _report(event: Event, rate: float, advance: Any) -> None:
    """A line for a report or a validation; on a terminal, the bar tells the rest."""
    report, validation = event.report, event.validation
    line = f"step {event.step:>5}"
    if report:
        line += f"  loss {report.loss:.4f}  {rate:,.0f} tokens/s"
    if validation:
        line += f"  validation loss {validation.loss:.4f}"
    if report or validation:
        console.say(line)
    advance(to=event.step, status=f"{rate:,.0f} tokens/s, {peak_memory() / 1e9:.1f} GB")


if __name__ == "__main__":
    console.main(train)
