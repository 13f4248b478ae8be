"""Score the base model and the adapter on the same held-out tokens.

data/tokens + artifacts/base.json + artifacts/adapter → artifacts/metrics/evaluate.json, artifacts/evaluate:
`python -m stages.evaluate data/tokens --out artifacts/evaluate`
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.base.manifest import locate, read_manifest
from stages.cli import console
from stages.files import hashes, outputs
from stages.params.loading import load_params

if TYPE_CHECKING:
    from stages.lora.frozen import FrozenLayers
    from stages.scoring.ranks import Ranks
    from stages.scoring.score import Score
    from stages.tokens.row import TokenRow


def evaluate(
    tokens: Annotated[Path, typer.Argument(help="The folder that tokenize wrote.")] = Path("data/tokens"),
    base_file: Annotated[Path, typer.Option("--base", help="The base model's manifest.")] = Path("artifacts/base.json"),
    adapter_dir: Annotated[Path, typer.Option("--adapter", help="The adapter's folder.")] = Path("artifacts/adapter"),
    out: Annotated[Path, typer.Option(help="The folder to write scores of each row to.")] = Path("artifacts/evaluate"),
    metrics: Annotated[Path, typer.Option(help="The metrics to write.")] = Path("artifacts/metrics/evaluate.json"),
    timing: Annotated[Path, typer.Option(help="Where to write the speed.")] = Path("artifacts/timing/evaluate.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Loss, perplexity, bits per byte and token accuracy of base and adapter on every row of the test split.

    Under `mlx.launch` its processes share out the rows; the first of them talks and writes.
    """
    from stages.lora import adapter
    from stages.lora.execution import set_up
    from stages.model.load import load_base
    from stages.scoring.ranks import join
    from stages.tokens.parquet import read_tokens

    ranks = join()
    console.follow(ranks.rank)
    settings = load_params(params_file, overrides or ())
    outputs.refuse_foreign(out, ["rows.parquet"], inputs=[tokens, adapter_dir])
    manifest = read_manifest(base_file)
    rows = read_tokens(tokens / "test.parquet", tokenizer=manifest.tokenizer_identity)
    if not rows:
        raise ValueError(
            f"{tokens / 'test.parquet'}: no rows to evaluate on; raise prepare.test_fraction or prepare.test_rows"
        )
    ranks.check_equal(
        {
            "params": settings.model_dump(include={"evaluate", "model"}),
            "tokens": hashes.sha256(tokens / "test.parquet"),
            "base": manifest.identity,
        }
    )
    with console.progress("loading the base model"):
        model, _ = load_base(
            locate(manifest), dtype=settings.model.dtype, trust_remote_code=settings.model.trust_remote_code
        )
    size = settings.evaluate.batch_size
    with _adapter_of_rank_0(adapter_dir, ranks) as folder:
        execution = set_up(
            model,
            rows,
            adapted=adapter.saved_names(folder),
            options=settings.model,
            base=manifest.identity,
            cache_gb=settings.runtime.cache_gb,
        )
        for note in execution.notes:
            console.say(note)
        began = time.perf_counter()
        scores = {"base": _score(model, rows, size, "base", ranks, execution.frozen)}
        seconds = {"base": time.perf_counter() - began}
        adapter.load(model, folder)
    began = time.perf_counter()
    scores["adapter"] = _score(model, rows, size, "adapter", ranks, execution.frozen)
    seconds["adapter"] = time.perf_counter() - began
    if problem := execution.close():
        console.warn(problem)
    if ranks.rank == 0:
        _write(rows, scores, seconds, out=out, metrics=metrics, timing=timing)


def _score(
    model: Any, rows: list[TokenRow], batch_size: int, name: str, ranks: Ranks, frozen: FrozenLayers | None
) -> list[Score]:
    """Each row's score, in the order of the rows, whichever rank scored it."""
    from stages.scoring.score import gather_scores, score_rows

    own = ranks.shard([len(row.input_ids) for row in rows])
    with console.progress(f"scoring {name}", total=len(own)) as advance:
        scored = {}
        for index, score in score_rows(model, [rows[i] for i in own], batch_size=batch_size, frozen=frozen):
            scored[own[index]] = score
            advance(1)
    return gather_scores(scored, rows=len(rows), ranks=ranks)


@contextmanager
def _adapter_of_rank_0(directory: Path, ranks: Ranks) -> Iterator[Path]:
    """The folder of rank 0's adapter on every rank: on several machines, training left it on the first alone."""
    from stages.lora.adapter import CONFIG_FILE, WEIGHTS_FILE

    with tempfile.TemporaryDirectory() as scratch:
        for name in (CONFIG_FILE, WEIGHTS_FILE) if ranks.size > 1 else ():
            content = (directory / name).read_bytes() if ranks.rank == 0 else b""
            (Path(scratch) / name).write_bytes(ranks.broadcast_bytes(content))
        yield Path(scratch) if ranks.rank else directory


def _write(
    rows: list[TokenRow],
    scores: dict[str, list[Score]],
    seconds: dict[str, float],
    *,
    out: Path,
    metrics: Path,
    timing: Path,
) -> None:
    """Write the scores of each row, the metrics and the speed; show the metrics."""
    totals = {name: sum(parts[1:], parts[0]) for name, parts in scores.items()}
    summary: dict[str, Any] = {
        "rows": len(rows),
        "tokens": totals["base"].tokens,
        **{name: _figures(total) for name, total in totals.items()},
        "rows_improved": sum(a.loss < b.loss for a, b in zip(scores["adapter"], scores["base"], strict=True)),
    }
    with outputs.replacing(out) as draft:
        draft.mkdir()
        _write_rows(draft / "rows.parquet", rows, scores)
    outputs.write_json(metrics, summary)
    count = sum(len(row.input_ids) for row in rows)
    outputs.write_json(
        timing, {f"{name}_tokens_per_second": round(count / taken, 2) for name, taken in seconds.items()}
    )
    console.table(
        f"Test split: {summary['rows']:,} rows, {summary['tokens']:,} scored tokens → {metrics}",
        ("", "base", "adapter"),
        ((name.replace("_", " "), summary["base"][name], summary["adapter"][name]) for name in summary["base"]),
    )


def _figures(total: Score) -> dict[str, float]:
    names = ("loss", "perplexity", "bits_per_byte", "token_accuracy")
    return {name: round(getattr(total, name), 4) for name in names}


def _write_rows(path: Path, rows: list[TokenRow], scores: dict[str, list[Score]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"id": [row.id for row in rows], "source": [row.source for row in rows]}
    columns["tokens"] = [score.tokens for score in scores["base"]]
    for name, parts in scores.items():
        columns[f"{name}_loss"] = [score.loss for score in parts]
        columns[f"{name}_correct"] = [score.correct for score in parts]
    pq.write_table(pa.table(columns), path, compression="zstd")


if __name__ == "__main__":
    console.main(evaluate)
