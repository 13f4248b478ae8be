"""The contenders: one run of each gives the same few figures.

(a) `mlx_lm.lora` as it comes, (b) the same under an optimised BLAS, (c) PEFT on PyTorch, (d) this project with its
savings off, (e) with one saving after another. All do the same updates on the ground that `benchmarks.ground` made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import mlx_lm_peer
from benchmarks.ground import EPOCHS, SEED, our_settings
from benchmarks.processes import Done, overrides, run

Settings = dict[str, Any]
PLAIN: Settings = {
    "model.cache_frozen": "off",
    "train.fused_loss": False,
    "train.compile": "off",
    "model.cpu_kernels": False,
}
# In the order in which they are added. A compiled step and the CPU's kernels exclude each other; auto takes the better.
SAVINGS: dict[str, Settings] = {
    "frozen layers cached": {"model.cache_frozen": "on"},
    "fused loss": {"train.fused_loss": True},
    "compiled step": {"train.compile": "on"},
    "CPU kernels, not compiled": {"train.compile": "auto", "model.cpu_kernels": True},
}


@dataclass(frozen=True)
class Ground:
    """The folder that `benchmarks.ground` made, and the work to do on it."""

    folder: Path
    kind: str  # of loss
    per_epoch: int  # updates
    lora: dict[str, Any]
    training: dict[str, Any]

    @property
    def updates(self) -> int:
        return self.per_epoch * EPOCHS

    @property
    def settings(self) -> dict[str, Any]:
        """The training, with its length."""
        return self.training | {"updates": self.updates}


@dataclass(frozen=True)
class Figures:
    """One run. Rates are in real tokens of the rows a second, prompts included and padding not."""

    first_epoch: float  # with the first update, in which libraries compile and warm up
    second_epoch: float
    seconds_to_first_update: float
    peak_memory_bytes: int
    evaluation: float | None = None  # tokens a second
    cached_evaluation: float | None = None  # of the same rows for the second time
    adapter: str | None = None
    losses: tuple[float, ...] = ()  # of each update, before it
    padded_share: float | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Contender:
    """`run(ground, folder)` measures it once, in a new folder."""

    name: str
    run: Callable[[Ground, Path], Figures]
    same_updates: bool = True  # as the others: its losses are comparable
    once: bool = False  # so slow that it takes part in one round alone
    is_step: bool = False  # towards all savings together


def contenders(peers: str | None, *, stock: bool, token_budget: int) -> list[Contender]:
    """All of them; (c) if there is a Python with PEFT, (a) if MLX's own BLAS is a slow one."""
    found = [Contender("(b) mlx_lm.lora, OpenBLAS" if stock else "(b) mlx_lm.lora", mlx_lm)]
    if peers is not None:
        found.append(Contender("(c) PEFT on PyTorch", lambda ground, folder: peft(ground, folder, python=peers)))
    found.append(Contender("(d) lorabuild, plain", ours(PLAIN, evaluate=True)))
    settings = dict(PLAIN)
    for name, saving in SAVINGS.items():
        settings |= saving
        is_last = name == list(SAVINGS)[-1]
        found.append(Contender(f"(e) + {name}", ours(dict(settings), evaluate=is_last), is_step=not is_last))
    by_tokens = settings | {"train.batch_size": None, "train.batch_tokens": token_budget}
    by_tokens |= {"train.iters": None, "train.epochs": EPOCHS}
    found.append(Contender("(e) + batches by tokens", ours(by_tokens), same_updates=False, is_step=True))
    if stock:
        # Last, when the kernels that mx.compile makes are there.
        found.append(Contender("(a) mlx_lm.lora as it comes", mlx_lm_stock, same_updates=False, once=True))
    return found


def ours(savings: Settings, *, evaluate: bool = False) -> Callable[[Ground, Path], Figures]:
    """This project's train stage with these parameters, and perhaps its evaluate stage."""

    def measure(ground: Ground, folder: Path) -> Figures:
        training = ground.settings
        settings = our_settings(lora=ground.lora, training=training, seed=SEED) | savings
        done = _stage(ground, folder, "train", settings)
        timing = json.loads((folder / "timing.json").read_text())
        first, second, *_ = timing["tokens_per_second_by_epoch"]
        losses = [float(line.split(",")[1]) for line in (folder / "plots" / "loss.csv").read_text().splitlines()[1:]]
        evaluation: dict[str, float] = {}
        if evaluate:
            scoring = settings | {"evaluate.batch_size": training["batch_size"], "evaluate.answers": 0}
            for name in ("baseline", "merge", "evaluate"):
                _stage(ground, folder, name, scoring)
            for name in ("baseline", "evaluate"):
                evaluation |= json.loads((folder / f"{name}-timing.json").read_text())
        return Figures(
            first,
            second,
            timing["seconds_to_first_update"],
            done.peak_memory_bytes,
            evaluation.get("base_tokens_per_second"),
            evaluation.get("adapter_tokens_per_second"),
            str(folder / "adapter"),
            tuple(losses),
            timing["padded_share"],
        )

    return measure


def _stage(ground: Ground, folder: Path, name: str, settings: Settings) -> Done:
    """Run a stage; all that it makes is in the folder, checkpoints and caches too."""
    tokens, texts = str(ground.folder / ground.kind / "tokens"), Path(__file__).parents[1] / "data"
    inputs = ["adapter", "--tokens", tokens] if name == "merge" else [tokens]
    inputs += ["--manifest", str(ground.folder / "base.json")]
    outputs = {
        "train": ["--out", "adapter", "--plots", "plots", "--timing", "timing.json", "--metrics", "train.json"],
        "baseline": [
            "--out", "baseline", "--timing", "baseline-timing.json",
            "--prompts", str(texts / "prompts.jsonl"), "--general", str(texts / "general.jsonl"),
        ],
        "merge": ["--out", "merged"],
        "evaluate": [
            "--adapter", "adapter", "--baseline", "baseline", "--merged", "merged", "--out", "evaluate",
            "--timing", "evaluate-timing.json", "--metrics", "evaluate.json",
        ],
    }[name]  # fmt: skip
    numbers = ["--params", str(ground.folder / "params.yaml"), *overrides(settings)]
    if name != "baseline":
        outputs += ["--details", f"{name}-details.json"]
    return run(
        ["-m", f"stages.{name}", *inputs, *outputs, *numbers],
        folder=folder,
        log=folder / f"{name}.log",
        store=ground.folder / "store",
    )


def mlx_lm(ground: Ground, folder: Path) -> Figures:
    """mlx_lm.lora under the BLAS that this project uses, its evaluation behind the training."""
    _, found = run_mlx_lm(ground, folder, rows="rows.json", blas=True, updates=ground.updates, test=True)
    return _figures(ground, folder, found)


def mlx_lm_stock(ground: Ground, folder: Path) -> Figures:
    """mlx_lm.lora with MLX's own BLAS, for one update on short rows: minutes of work at three tokens a second."""
    _, found = run_mlx_lm(ground, folder, rows="one.json", blas=False, updates=1, test=False)
    rate = sum(found["tokens"]) / sum(found["seconds"])
    return Figures(rate, rate, found["seconds_to_first_update"], found["peak_memory_bytes"])


def run_mlx_lm(
    ground: Ground, folder: Path, *, rows: str, blas: bool, updates: int, test: bool
) -> tuple[float, dict[str, Any]]:
    """The whole command's seconds, and what `benchmarks.mlx_lm_peer` recorded."""
    spec = {"blas": blas, "rows": str(ground.folder / ground.kind / rows)}
    config = mlx_lm_peer.settings(
        model=ground.folder / "float32",
        data=folder,
        adapter=folder / "adapter",
        lora=ground.lora,
        training=ground.settings | {"updates": updates},
        seed=SEED,
    )
    config |= {"resume_adapter_file": str(ground.folder / "start" / "adapters.safetensors")}
    config |= {"test": test, "test_batches": -1}
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "config.json").write_text(json.dumps(config))
    done = run(
        ["-m", "benchmarks.mlx_lm_peer", "spec.json", "record.json", "lora", "--config", "config.json"],
        folder=folder,
        log=folder / "train.log",
        store=ground.folder / "store",
    )
    return done.seconds, json.loads((folder / "record.json").read_text())


def peft(ground: Ground, folder: Path, *, python: str) -> Figures:
    """PEFT, in the environment of that Python."""
    spec = {
        "model": str(ground.folder / "float32"),
        "start": str(ground.folder / "start" / "adapters.safetensors"),
        "rows": str(ground.folder / ground.kind / "rows.json"),
        "adapter": "adapter",
        "lora": ground.lora,
        "training": ground.settings,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    arguments = ["-m", "benchmarks.peft_peer", "spec.json", "record.json"]
    run(arguments, folder=folder, log=folder / "train.log", python=python)
    # For the one scorer of all adapters.
    shutil.copyfile(ground.folder / "start" / "adapter_config.json", folder / "adapter" / "adapter_config.json")
    return _figures(ground, folder, json.loads((folder / "record.json").read_text()))


def _figures(ground: Ground, folder: Path, found: dict[str, Any]) -> Figures:
    """Of a peer's record."""
    seconds, tokens, border = found["seconds"], found["tokens"], ground.per_epoch
    return Figures(
        sum(tokens[:border]) / sum(seconds[:border]),
        sum(tokens[border:]) / sum(seconds[border:]),
        found["seconds_to_first_update"],
        found["peak_memory_bytes"],
        found["evaluate_tokens_per_second"],
        None,
        str(folder / "adapter"),
        tuple(found["losses"]),
    )
