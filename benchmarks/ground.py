"""The common ground of all contenders: one base in float32, the same rows in the same batches, the same start.

`python -m benchmarks.ground FOLDER …` makes it in a process of its own, so that whoever measures stays small (a child's
peak memory counts from its parent's). In FOLDER: `float32`, the base; `base.json` and `store`, as the stages want them;
`start`, the adapter to begin with; and for each kind of loss (`answers`, `whole`) `tokens`, the Parquet files for this
project; `rows.json`, the same rows for the others, in the order of this project's updates; and `one.json`, a single
batch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.processes import ROOT, overrides, run
from stages.base.manifest import locate, read_manifest
from stages.cli import console
from stages.files import outputs
from stages.model import blas

if TYPE_CHECKING:
    from stages.tokens.row import TokenRow

KINDS = {"answers": "completion", "whole": "all"}  # of loss → tokenize.train_on
LORA: dict[str, Any] = {"rank": 8, "scale": 2.0, "layers": 8, "modules": ["q_proj", "v_proj"]}
TRAINING: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 1e-4,
    "betas": [0.9, 0.999],
    "weight_decay": 0.01,
    "max_length": 512,
}
SEED, EPOCHS = 0, 2
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def make(
    folder: Annotated[Path, typer.Argument(help="The new folder.")],
    updates: Annotated[int, typer.Option(help="Batches an epoch.")],
    data: Annotated[Path | None, typer.Option(help="A file or folder of rows, instead of data/raw.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="For prepare and tokenize.")] = None,
) -> None:
    """The base and the rows of params.yaml, or of `--data`."""
    blas.preload()
    folder.mkdir(parents=True)
    write_float32_base(folder)
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    fetch(folder)
    given = [part for text in settings or [] for part in ("--set", text)]
    source = (data or ROOT / "data" / "raw").resolve()
    stage(folder, "prepare", str(source), *given)
    for kind, train_on in KINDS.items():
        wanted = {"tokenize.train_on": train_on, "tokenize.max_length": TRAINING["max_length"]}
        stage(folder, "tokenize", "--out", f"{kind}/all", *given, *overrides(wanted))
        from stages.tokens.parquet import read_tokens

        identity = read_manifest(folder / "base.json").tokenizer_identity
        rows = {name: read_tokens(folder / kind / "all" / f"{name}.parquet", tokenizer=identity) for name in SPLITS}
        held_out = [*rows["valid"], *rows["test"]]
        write_rows(folder, kind, spread(rows["train"], batches=updates), spread(held_out, batches=updates // 2))
        # For a trainer of which one update must do.
        shortest = sorted(rows["train"], key=lambda row: len(row.input_ids))[: TRAINING["batch_size"]]
        outputs.write_json(folder / kind / "one.json", {"train": [[plain(row) for row in shortest]], "evaluate": []})
    write_start(folder, LORA)


SPLITS = ("train", "valid", "test")


def write_float32_base(folder: Path) -> Path:
    """The base model of params.yaml, fetched where need be, with plain weights in float32."""
    from mlx_lm.utils import load_tokenizer, save

    from stages.model.load import load_base

    manifest, out = folder / "original.json", folder / "float32"
    run(["-m", "stages.fetch", "--out", str(manifest)], folder=ROOT, log=folder / "original.log")
    directory = locate(read_manifest(manifest))
    model, config = load_base(directory, dtype="float32", dequantize=True)
    save(out, directory, model, load_tokenizer(directory), config)
    return out


def fetch(folder: Path) -> None:
    """Make base.json of the folder's own base."""
    stage(folder, "fetch", "--out", "base.json", *overrides({"model.source": "float32", "model.revision": None}))


def stage(folder: Path, name: str, *arguments: str) -> None:
    """Run a stage in the folder, with its params.yaml and its store."""
    if name == "tokenize":
        arguments = ("--manifest", "base.json", *arguments)
    # The store is not the user's: the float32 base does not stay.
    run(["-m", f"stages.{name}", *arguments], folder=folder, log=folder / f"{name}.log", store=folder / "store")


def spread(rows: Sequence[TokenRow], *, batches: int) -> list[TokenRow]:
    """Batches of rows of like length, from the shortest to the longest: few rows with the padding of many.

    Raises:
        ValueError: there are not enough rows.
    """
    import numpy as np

    size = TRAINING["batch_size"]
    order = np.argsort([len(row.input_ids) for row in rows], kind="stable")
    if len(order) < batches * size or not batches:
        raise ValueError(f"{max(batches, 1) * size} rows are needed, and there are {len(order)}; ask for fewer updates")
    chosen = (np.arange(batches) + 0.5) * (len(order) // size) / batches
    return [rows[i] for number in chosen.astype(int) for i in order[number * size : (number + 1) * size]]


def write_rows(folder: Path, kind: str, train: Sequence[TokenRow], held_out: Sequence[TokenRow]) -> None:
    """The rows as Parquet for the stages, and as batches for the others."""
    from stages.lora.batches import sorted_batches
    from stages.tokens.parquet import write_tokens
    from stages.training.updates import epoch_updates

    tokens, size = folder / kind / "tokens", TRAINING["batch_size"]
    tokens.mkdir(parents=True)
    about = {"tokenizer": read_manifest(folder / "base.json").tokenizer_identity}
    for name, rows in {"train": train, "valid": held_out, "test": held_out}.items():
        write_tokens(tokens / f"{name}.parquet", rows, lambda: about)
    lengths = [len(row.input_ids) for row in train]
    shape: dict[str, Any] = {"batch_size": size, "batch_tokens": None, "grad_accumulation": 1, "seed": SEED}
    order = [batch for epoch in range(EPOCHS) for batch in epoch_updates(lengths, **shape, epoch=epoch)]
    scored = sorted_batches([len(row.input_ids) for row in held_out], batch_size=size)
    content = {
        "train": [[plain(train[i]) for i in batch] for batch in order],
        "evaluate": [[plain(held_out[i]) for i in batch] for batch in scored],
    }
    outputs.write_json(folder / kind / "rows.json", content)


def plain(row: TokenRow) -> dict[str, Any]:
    """A row's ids, and which is the first trained one: all behind it are, or it is none for mlx-lm."""
    first = int(row.loss_mask.argmax())
    if not row.loss_mask[first:].all():
        raise ValueError(f"{row.source}: an answer that does not end its row is no loss that mlx-lm knows")
    return {"ids": row.input_ids.tolist(), "first": first}


def write_start(folder: Path, lora: dict[str, Any]) -> None:
    """The adapter that this project's seed gives, for the others to start from."""
    from stages.lora import adapter, lora_config
    from stages.model.load import load_base

    model, _ = load_base(folder / "float32", dtype="float32")
    keys = tuple(f"{'mlp' if name in MLP else 'self_attn'}.{name}" for name in lora["modules"])
    config = lora_config.LoraConfig(lora["rank"], lora["scale"], 0.0, keys, lora["layers"], "lora")
    adapter.attach(model, config, seed=SEED)
    adapter.save(folder / "start", model, config)


def llama_config(**sizes: Any) -> dict[str, Any]:
    """The config.json of a Llama with these sizes and a tied head; in float32 unless `torch_dtype` says otherwise."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    } | sizes


def write_random(folder: Path, model: Any, config: dict[str, Any]) -> None:
    """A model as it was made, with a tokenizer of two tokens: rows of ids need no more."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder.mkdir()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of two tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<|unknown|>": 0, "<|end|>": 1}, unk_token="<|unknown|>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # a text has a token a word
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "unk_token": "<|unknown|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def our_settings(*, lora: dict[str, Any], training: dict[str, Any], seed: int) -> dict[str, Any]:
    """For `--set` of the train stage: all that bears on the result, whatever params.yaml holds."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"dtype": "float32"},
        "lora": {
            "type": "lora",
            "rank": lora["rank"],
            "alpha": None,
            "scale": lora["scale"],
            "rank_stabilized": False,
            "dropout": 0.0,
            "targets": lora["modules"],
            "layers": lora["layers"],
        },
        "train": {
            "init_adapter": None,
            "epochs": None,
            "iters": training["updates"],
            "batch_size": training["batch_size"],
            "batch_tokens": None,
            "grad_accumulation": 1,
            "optimizer": "adamw",
            "betas": training["betas"],
            "weight_decay": training["weight_decay"],
            "learning_rate": training["learning_rate"],
            "schedule": "constant",
            "warmup_steps": 0,
            "max_grad_norm": None,
            "grad_checkpoint": False,
            "steps_per_report": 1,
            "steps_per_eval": training["updates"],
            "val_batches": 0,
            "keep": "last",
            "patience": None,
        },
        "runtime": {"steps_per_save": training["updates"]},
    }
    return {"seed": seed} | {f"{part}.{key}": value for part, keys in sections.items() for key, value in keys.items()}


if __name__ == "__main__":
    console.main(make)
