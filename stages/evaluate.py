"""Score adapter and merged model on the rows that the baseline was scored on, and compare the answers.

data/tokens + artifacts/{base.json,baseline,adapter,merged} → artifacts/evaluate, artifacts/metrics/evaluate.json:
`python -m stages.evaluate data/tokens --out artifacts/evaluate`
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.base.manifest import Manifest, locate, read_manifest
from stages.cli import console
from stages.cli.settings import load_settings
from stages.files import hashes, outputs
from stages.params import schema

if TYPE_CHECKING:
    from stages.decoding.decode import Answer
    from stages.lora.execution import Execution, Patches
    from stages.scoring.ranks import Ranks
    from stages.scoring.score import Score
    from stages.tokens.row import TokenRow

MADE = ("rows.parquet", "answers.parquet", "general.parquet")


def evaluate(
    tokens: Annotated[Path, typer.Argument(help="The folder that tokenize wrote.")] = Path("data/tokens"),
    base_file: console.ManifestFile = Path("artifacts/base.json"),
    baseline: Annotated[Path, typer.Option(help="The folder that baseline wrote.")] = Path("artifacts/baseline"),
    adapter_dir: Annotated[Path, typer.Option("--adapter", help="The adapter's folder.")] = Path("artifacts/adapter"),
    merged_dir: Annotated[Path, typer.Option("--merged", help="The model that merge wrote.")] = Path(
        "artifacts/merged"
    ),
    out: Annotated[Path, typer.Option(help="The folder to write scores and answers of each row to.")] = Path(
        "artifacts/evaluate"
    ),
    metrics: Annotated[Path, typer.Option(help="The headline numbers to write.")] = Path(
        "artifacts/metrics/evaluate.json"
    ),
    details: Annotated[Path, typer.Option(help="All numbers, with their intervals.")] = Path(
        "artifacts/details/evaluate.json"
    ),
    timing: Annotated[Path, typer.Option(help="Where to write the speed.")] = Path("artifacts/timing/evaluate.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Loss, accuracy and answers of the fine-tuned model beside the base model's, each with its 95% interval.

    Under `mlx.launch` its processes share out the rows; the first of them answers, talks and writes.
    """
    settings = load_settings(params_file, overrides)
    from stages.lora import adapter_files
    from stages.model import numerics
    from stages.model.load import require_merged
    from stages.results import summary
    from stages.scoring.ranks import join
    from stages.tokens.parquet import read_tokens

    ranks = join()
    console.follow(ranks.rank)

    # Load
    outputs.refuse_foreign(out, MADE, inputs=[tokens, adapter_dir, baseline, merged_dir])
    manifest = read_manifest(base_file)
    rows = read_tokens(tokens / "test.parquet", tokenizer=manifest.tokenizer_identity)
    tables = _read_baseline(baseline, rows, manifest.identity)
    if settings.evaluate.slice_by is not None:
        summary.check_slice(tables["rows"], settings.evaluate.slice_by)
    require_merged(merged_dir)
    _check_equal(ranks, settings, manifest, [tokens / "test.parquet", baseline / "general.parquet"])
    texts = _general_rows(tables["general"])

    # Score and answer
    with _adapter_of_rank_0(adapter_dir, ranks) as folder:
        adapter_files.check_base(folder, manifest.weights_identity)
        adapted = tuple(adapter_files.saved_names(folder))
        patches, adapter_scores, adapter_rate = _score_adapter(folder, manifest, [*rows, *texts], settings, ranks)
    prompts = tables["answers"]["prompt_ids"].to_pylist() if ranks.rank == 0 else []
    merged_scores, merged_rate, answers = _score_merged(merged_dir, adapted, rows, prompts, settings, ranks, patches)
    if ranks.rank:
        return

    # Write
    tables = _with_tuned(tables, adapter_scores, merged_scores, answers)
    numbers = summary.summarize(tables, settings.evaluate, max_tokens=settings.generate.max_tokens)
    with outputs.replacing(out) as draft:
        _write_tables(draft, tables, manifest.identity)
    outputs.write_json(details, numbers | {"numerics": numerics.in_use()})
    outputs.write_json(metrics, summary.headline(numbers))
    outputs.write_json(timing, {"adapter_tokens_per_second": adapter_rate, "merged_tokens_per_second": merged_rate})
    for title, header, lines in summary.shown(numbers):
        console.table(title, header, lines)
    console.say(f"{numbers['sentence']} → {out}")
    if numbers["power"]:
        console.say(numbers["power"])
    summary.check_forgetting(numbers)


def _read_baseline(folder: Path, rows: Sequence[TokenRow], base: str) -> dict[str, Any]:
    """The baseline's tables, whose rows must be these.

    Raises:
        ValueError: a table is missing, or is of other rows or of another base model.
    """
    from stages.tables.parquet import read_table

    columns = {
        "rows": ("id", "tokens", "bytes", "base_loss", "base_correct"),
        "answers": ("id", "prompt_ids", "reference", "base"),
        "general": ("input_ids", "language", "tokens", "base_loss"),
    }
    tables = {
        name: read_table(folder / f"{name}.parquet", names, base=base, made_by="baseline")
        for name, names in columns.items()
    }
    if tables["rows"]["id"].to_pylist() != [row.id for row in rows]:
        raise ValueError(f"{folder}: of other test rows; make it anew with: python -m stages.baseline")
    return tables


def _check_equal(ranks: Ranks, settings: schema.Params, manifest: Manifest, files: Sequence[Path]) -> None:
    params = settings.model_dump(include={"evaluate", "model"})
    ranks.check_equal({"params": params, "base": manifest.identity, "tokens": [hashes.sha256(path) for path in files]})


def _general_rows(table: Any) -> list[TokenRow]:
    """The general texts as token rows that are scored whole."""
    import numpy as np

    from stages.tokens.row import TokenRow

    all_ids = [np.array(ids, np.int32) for ids in table["input_ids"].to_pylist()]
    return [TokenRow("", "", ids, np.arange(len(ids)) > 0, 0, False) for ids in all_ids]


def _score_adapter(
    folder: Path, manifest: Manifest, rows: Sequence[TokenRow], settings: schema.Params, ranks: Ranks
) -> tuple[Patches, list[Score], float]:
    """The base model's patches, each row's score by it with the adapter, and the tokens of a second."""
    from stages.lora import adapter, adapter_files
    from stages.lora.execution import patches_of, set_up
    from stages.model.load import load_base

    with console.progress("loading the base model"):
        model, _ = load_base(
            locate(manifest), dtype=settings.model.dtype, trust_remote_code=settings.model.trust_remote_code
        )
        execution = set_up(
            model,
            rows,
            adapted=adapter_files.saved_names(folder),
            options=settings.model,
            base=manifest.identity,
            cache_gb=settings.runtime.cache_gb,
        )
        adapter.load(model, folder)
    for note in execution.notes:
        console.say(note)
    return patches_of(model), *_scored(model, rows, execution, settings, ranks)


def _scored(
    model: Any, rows: Sequence[TokenRow], execution: Execution, settings: schema.Params, ranks: Ranks
) -> tuple[list[Score], float]:
    """Each row's score by a model, and the tokens of a second."""
    from stages.measuring.scores import score_all

    began, size = time.perf_counter(), settings.evaluate.batch_size
    with console.progress("scoring", total=len(rows)) as advance:
        scores = score_all(model, rows, batch_size=size, ranks=ranks, frozen=execution.frozen, advance=advance)
    if problem := execution.close():
        console.warn(problem)
    return scores, round(sum(len(row.input_ids) for row in rows) / (time.perf_counter() - began), 2)


def _score_merged(
    folder: Path,
    adapted: Sequence[str],
    rows: Sequence[TokenRow],
    prompts: Sequence[Sequence[int]],
    settings: schema.Params,
    ranks: Ranks,
    patches: Patches,
) -> tuple[list[Score], float, list[Answer]]:
    """Each row's score by the merged model, the tokens of a second, and its answers.

    `adapted` are the names of the adapter's weights; `patches` are those of the base model.
    """
    from stages.decoding.answers import answers_of
    from stages.decoding.decode import load_decoder
    from stages.lora.execution import set_up
    from stages.lora.frozen_cache import frozen_identity
    from stages.model.load import load_base

    trust = settings.model.trust_remote_code
    with console.progress("loading the merged model"):
        model, config = load_base(folder, dtype=settings.model.dtype, trust_remote_code=trust)
        execution = set_up(
            model,
            rows,
            adapted=adapted,
            options=settings.model,
            base=frozen_identity(model, adapted),
            cache_gb=settings.runtime.cache_gb,
            known=patches,
        )
    scores, rate = _scored(model, rows, execution, settings, ranks)
    if not prompts:
        return scores, rate, []
    with console.progress("answers of the merged model", total=len(prompts)) as advance:
        decoder = load_decoder(folder, config, trust_remote_code=trust)
        return scores, rate, answers_of(model, decoder, prompts, settings.generate, advance)


@contextmanager
def _adapter_of_rank_0(directory: Path, ranks: Ranks) -> Iterator[Path]:
    """The folder of rank 0's adapter on every rank: on several machines, training left it on the first alone."""
    from stages.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE

    with tempfile.TemporaryDirectory() as scratch:
        for name in (CONFIG_FILE, WEIGHTS_FILE) if ranks.size > 1 else ():
            content = (directory / name).read_bytes() if ranks.rank == 0 else b""
            (Path(scratch) / name).write_bytes(ranks.broadcast_bytes(content))
        yield Path(scratch) if ranks.rank else directory


def _with_tuned(
    tables: dict[str, Any], adapter: Sequence[Score], merged: Sequence[Score], answers: Sequence[Answer]
) -> dict[str, Any]:
    """The baseline's tables with the columns of adapter and merged model."""
    from stages.decoding.answers import with_answers
    from stages.measuring.scores import with_scores
    from stages.results.answers import with_answer_scores

    count = len(tables["rows"])
    rows = with_scores(with_scores(tables["rows"], "adapter", adapter[:count]), "merged", merged)
    answered = with_answers(tables["answers"].drop_columns(["prompt_ids"]), "tuned", answers)
    general = with_scores(tables["general"].drop_columns(["input_ids"]), "adapter", adapter[count:])
    return {"rows": rows, "answers": with_answer_scores(answered), "general": general}


def _write_tables(folder: Path, tables: dict[str, Any], base: str) -> None:
    from stages.tables.parquet import write_table

    folder.mkdir()
    for name, table in tables.items():
        write_table(folder / f"{name}.parquet", table, base=base)


if __name__ == "__main__":
    console.main(evaluate)
