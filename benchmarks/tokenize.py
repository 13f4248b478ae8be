"""Speed of making token files from rows, beside the tokenizer alone, mlx-lm's data set and datasets.map.

`python -m benchmarks.tokenize [--rows 20000] [--data rows.jsonl]`: the rows of the default data, repeated with a number
in each so that no two are the same, or the rows of a JSONL file of prompts and completions. Each runs in a process
of its own, the best of `--repeats` counts; memory is that process's peak. On a shared machine, look at the CPU seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.base.manifest import locate, read_manifest
from stages.cli import console

MB = 1 << 20 if sys.platform == "darwin" else 1 << 10  # what ru_maxrss counts in

Pair = tuple[str, str]


def benchmark(
    rows: Annotated[int, typer.Option(min=1, help="Rows to encode.")] = 20_000,
    data: Annotated[Path | None, typer.Option(help="A JSONL file of prompts and completions.")] = None,
    base: Annotated[Path, typer.Option(help="The base model's manifest.")] = Path("artifacts/base.json"),
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the best counts.")] = 3,
) -> None:
    """Time the making of token files beside other libraries."""
    directory = locate(read_manifest(base))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_prepared(folder / "train.jsonl", data, rows)
        results: dict[str, Any] = {}
        with console.progress("measuring", total=repeats * len(METHODS)) as advance:
            # Turn by turn, so that whatever else the machine does slows all of them.
            for _ in range(repeats):
                for title, method in METHODS.items():
                    found = _run(method, directory, folder)
                    if title not in results or (found and found["seconds"] < results[title]["seconds"]):
                        results[title] = found
                    advance(1)
    alone = results["encode_batch alone"]
    lines = [(title, *(("-",) * 6 if found is None else _figures(found, alone))) for title, found in results.items()]
    header = ("", "rows/s", "tokens/s", "seconds", "CPU s", "speed", "peak MB")
    console.table(f"{rows:,} rows, {alone['tokens']:,} tokens, best of {repeats}", header, lines)


def encode_batch_alone(tokenizer: Any, folder: Path) -> int:
    """tokenizers.encode_batch over all rows, in batches, and nothing else: texts in memory, results dropped."""
    texts = [prompt + completion for prompt, completion in _pairs(folder)]
    with _timed():
        encodings = (tokenizer.backend_tokenizer.encode_batch(texts[i : i + 512]) for i in range(0, len(texts), 512))
        return sum(sum(map(len, batch)) for batch in encodings)


def tokenize_stage(tokenizer: Any, folder: Path) -> int:
    """The work of `python -m stages.tokenize`: read JSONL, encode, mask, count, write Parquet."""
    import pyarrow

    from stages.encoding.encoder import Encoder
    from stages.encoding.lengths import Tally, fallback_ids
    from stages.params.loading import load_params
    from stages.prepared.row import read_prepared
    from stages.tokens.parquet import write_tokens

    options = load_params(Path("params.yaml"), ["tokenize.max_length=4096"]).tokenize
    encoder = Encoder(tokenizer, options)
    tally = Tally(fallback_ids(encoder.backend))
    pyarrow.array([0])  # imports what it needs

    def rows() -> Any:
        for encoded in encoder.encode(read_prepared(folder / "train.jsonl")):
            tally.count("train", encoded)
            yield from encoded.rows

    with _timed():
        write_tokens(folder / "train.parquet", rows(), lambda: {"tokenizer": "", "ledger": tally.figures("train")})
    return int(tally.figures("train")["tokens"])


def mlx_lm(tokenizer: Any, folder: Path) -> int:
    """mlx-lm's CompletionsDataset with a masked prompt: one row at a time, twice through the chat template."""
    from mlx_lm.tuner.datasets import CacheDataset, CompletionsDataset

    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in _pairs(folder)]
    with _timed():
        data = CacheDataset(CompletionsDataset(rows, tokenizer, "prompt", "completion", mask_prompt=True))
        return sum(len(data[i][0]) for i in range(len(data)))


def datasets_map(tokenizer: Any, folder: Path) -> int | None:
    """datasets.map in batches, the rows' tokens and the masks by tokenizing prompts apart, as most scripts do."""
    try:
        import datasets
    except ImportError:
        return None

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"prompt": p, "completion": c} for p, c in _pairs(folder)])

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        whole = tokenizer([p + c for p, c in zip(batch["prompt"], batch["completion"], strict=True)])["input_ids"]
        prompts = tokenizer(batch["prompt"])["input_ids"]
        ids = [[*row, tokenizer.eos_token_id] for row in whole]
        return {
            "input_ids": ids,
            "mask": [[0] * len(p) + [1] * (len(i) - len(p)) for p, i in zip(prompts, ids, strict=True)],
        }

    with _timed():
        made = rows.map(encode, batched=True, cache_file_name=str(folder / "map.arrow"), load_from_cache_file=False)
    return sum(map(len, made["input_ids"]))


METHODS: dict[str, Callable[[Any, Path], int | None]] = {
    "encode_batch alone": encode_batch_alone,
    "tokenize": tokenize_stage,
    "mlx-lm": mlx_lm,
    "datasets.map": datasets_map,
}

_seconds = _cpu = 0.0


class _timed:  # noqa: N801  reads as a statement
    def __enter__(self) -> None:
        self.started, self.used = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        global _seconds, _cpu
        _seconds, _cpu = time.perf_counter() - self.started, time.process_time() - self.used


def _run(method: Callable[[Any, Path], int | None], directory: Path, folder: Path) -> dict[str, Any] | None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, method, directory, folder).result()


def _measure(method: Callable[[Any, Path], int | None], directory: Path, folder: Path) -> dict[str, Any] | None:
    from stages.templating.tokenizer import load_tokenizer

    tokens = method(load_tokenizer(directory), folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = len(_pairs(folder))
    return None if tokens is None else {"rows": rows, "tokens": tokens, "seconds": _seconds, "cpu": _cpu, "peak": peak}


def _figures(found: dict[str, Any], alone: dict[str, Any]) -> tuple[str, ...]:
    rate, best = found["rows"] / found["seconds"], alone["rows"] / alone["seconds"]
    return (
        f"{rate:,.0f}",
        f"{found['tokens'] / found['seconds']:,.0f}",
        f"{found['seconds']:.2f}",
        f"{found['cpu']:.2f}",
        f"{rate / best:.0%}",
        f"{found['peak'] / MB:,.0f}",
    )


def _write_prepared(path: Path, data: Path | None, count: int) -> None:
    if data is not None:
        given = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        pairs = [(row["prompt"], row["completion"]) for row in given]
    else:
        raw = [json.loads(line) for line in Path("data/raw/korean_qa.jsonl").read_text(encoding="utf-8").splitlines()]
        pairs = [(f"### 질문:\n{row['question']}\n\n### 답변:\n", row["answer"]) for row in raw]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt, completion = pairs[number % len(pairs)]
            row = {"id": f"{number:016x}", "source": f"rows:{number + 1}", "prompt": prompt, "completion": completion}
            if data is None:
                row["prompt"] = prompt.replace("\n", f"\n{number}. ", 1)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _pairs(folder: Path) -> list[Pair]:
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        return [(row["prompt"], row["completion"]) for row in map(json.loads, file)]


if __name__ == "__main__":
    console.main(benchmark)
