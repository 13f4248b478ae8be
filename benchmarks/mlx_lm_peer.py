"""`mlx_lm.lora` as it is, recorded: each update's seconds, tokens and loss, and the speed of its evaluation.

`python -m benchmarks.mlx_lm_peer SPEC RECORD lora --config …` runs `mlx_lm lora --config …` in this process. SPEC is a
JSON file: `blas`, whether an optimised BLAS is loaded before MLX; and perhaps `rows`, a file of token rows in batches
(`train`, `evaluate`, perhaps `validate`) to use in place of the text that mlx-lm would tokenise, so that both trainers
see the same tokens, masks and batches. Nothing of this project is imported but the BLAS; trainer, loss, evaluation and
command are mlx-lm's.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import json  # noqa: E402
import resource  # noqa: E402
import runpy  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def settings(
    *, model: Path, data: Path, adapter: Path, lora: dict[str, Any], training: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The file for `mlx_lm lora --config`. Without valid.jsonl it does not validate; it reports each update.

    `lora` has rank, scale, layers and modules; `training` has updates, batch_size, learning_rate, betas, weight_decay
    and max_length.
    """
    # AdamW there leaves bias correction out by default.
    adamw = {"betas": training["betas"], "weight_decay": training["weight_decay"], "bias_correction": True}
    return {
        "model": str(model),
        "train": True,
        "fine_tune_type": "lora",
        "data": str(data),
        "adapter_path": str(adapter),
        "seed": seed,
        "num_layers": lora["layers"],
        "lora_parameters": {
            "rank": lora["rank"],
            "scale": lora["scale"],
            "dropout": 0.0,
            "keys": [f"self_attn.{name}" for name in lora["modules"]],
        },
        "batch_size": training["batch_size"],
        "iters": training["updates"],
        "learning_rate": training["learning_rate"],
        "optimizer": "adamw",
        "optimizer_config": {"adamw": adamw},
        "max_seq_length": training["max_length"],
        "steps_per_report": 1,
        "save_every": training["updates"] + 1,
    }


class Watcher:
    """Records the updates and the evaluation of `mlx_lm.lora`, by its own callbacks where it has them."""

    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []
        self.lengths: list[list[int]] = []  # tokens of each row, by update
        self.first = 0.0
        self.peak = 0
        self.evaluated = (0, 0.0)  # tokens, seconds

    def install(self) -> None:
        """Before mlx_lm.lora imports these by name."""
        from mlx_lm.tuner import callbacks, trainer

        watcher, evaluate, train, batches = self, trainer.evaluate, trainer.train, trainer.iterate_batches

        class Recorder(callbacks.TrainingCallback):
            def on_train_loss_report(self, train_info: dict[str, float]) -> None:
                watcher.first = watcher.first or time.perf_counter() - STARTED
                watcher.reports.append(train_info)

        def watched(into: list[list[int]], *arguments: Any, **options: Any) -> Iterator[Any]:
            for batch, lengths in batches(*arguments, **options):
                into.append(lengths[:, 1].tolist())
                yield batch, lengths

        def watched_train(*arguments: Any, **options: Any) -> None:
            train(*arguments, iterate_batches=partial(watched, self.lengths), **options)
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

        def watched_evaluate(*arguments: Any, **options: Any) -> Any:
            lengths: list[list[int]] = []
            started = time.perf_counter()
            loss = evaluate(*arguments, **options | {"iterate_batches": partial(watched, lengths)})
            self.evaluated = (sum(map(sum, lengths)), time.perf_counter() - started)
            return loss

        callbacks.get_reporting_callbacks = lambda *_, **__: Recorder()
        trainer.train, trainer.evaluate = watched_train, watched_evaluate

    def record(self) -> dict[str, Any]:
        # A batch is fetched ahead of the update that never comes.
        lengths = self.lengths[: len(self.reports)]
        tokens, seconds = self.evaluated
        return {
            "seconds": [1 / report["iterations_per_second"] for report in self.reports],
            "tokens": list(map(sum, lengths)),
            "losses": [report["train_loss"] for report in self.reports],
            "lengths": lengths,
            "seconds_to_first_update": self.first,
            "peak_memory_bytes": self.peak,
            "evaluate_tokens_per_second": tokens / seconds if seconds else None,
        }


class TokenRows:
    """A data set as mlx-lm has them, of rows that are tokens already: `ids`, and `first`, the first trained one."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def process(self, row: dict[str, Any]) -> tuple[list[int], int]:
        return row["ids"], row["first"]


def use_token_rows(path: Path) -> None:
    """Let mlx_lm.lora train on a file's batches in their order, whatever order it draws."""
    import numpy as np
    from mlx_lm.tuner import datasets

    content = json.loads(path.read_text())

    def load_dataset(options: Any, _: Any) -> tuple[TokenRows, TokenRows, TokenRows]:
        # It takes neighbours for batches and visits these in the order of its first draw from the seeded generator.
        order = np.random.RandomState(options.seed).permutation(len(content["train"]))
        placed = sorted(zip(order.tolist(), content["train"], strict=True), key=lambda pair: pair[0])
        train = [row for _, batch in placed for row in batch]
        test = [row for batch in content["evaluate"] for row in batch]
        return TokenRows(train), TokenRows(content.get("validate", [])), TokenRows(test)

    datasets.load_dataset = load_dataset


def main() -> None:
    spec, record = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if spec["blas"]:
        from stages.model import blas

        blas.preload()
    watcher = Watcher()
    watcher.install()
    rows = spec.get("rows")
    if rows:
        use_token_rows(Path(rows))
    sys.argv = ["mlx_lm", *sys.argv[3:]]
    runpy.run_module("mlx_lm", run_name="__main__", alter_sys=True)
    found = watcher.record()
    if rows:
        expected = [[len(row["ids"]) for row in batch] for batch in json.loads(Path(rows).read_text())["train"]]
        if found["lengths"] != expected[: len(found["lengths"])]:
            raise ValueError("mlx_lm.lora saw other batches than it was given")
    record.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
