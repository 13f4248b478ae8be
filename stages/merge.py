"""Fold the adapter into the base model, and compare the predictions of both.

artifacts/base.json + artifacts/adapter → artifacts/merged, a model directory that any MLX or Hugging Face loader opens:
`python -m stages.merge artifacts/adapter --out artifacts/merged`
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.base.manifest import CODE_FILES, MODEL_FILES, Manifest, locate, read_manifest
from stages.cli import console
from stages.files import outputs
from stages.params import schema
from stages.params.loading import load_params

if TYPE_CHECKING:
    from stages.merging.agreement import Agreement


def merge(
    adapter_dir: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")] = Path(
        "artifacts/adapter"
    ),
    base_file: Annotated[Path, typer.Option("--base", help="The base model's manifest.")] = Path("artifacts/base.json"),
    tokens: Annotated[Path, typer.Option(help="Token rows to check the merged model on.")] = Path("data/tokens"),
    out: Annotated[Path, typer.Option(help="The model directory to write.")] = Path("artifacts/merged"),
    details: Annotated[Path, typer.Option(help="The proof to write.")] = Path("artifacts/details/merge.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Write base + adapter as one model; read it back and compare its predictions with the adapter's, or fail."""
    from stages.lora import adapter
    from stages.lora.execution import narrow_head
    from stages.merging.agreement import compare, log_probabilities
    from stages.merging.fuse import fuse
    from stages.model.load import floating_dtype, load_base
    from stages.tokens.parquet import read_tokens

    settings = load_params(params_file, overrides or ())
    outputs.refuse_foreign(out, (*MODEL_FILES, *CODE_FILES), inputs=[adapter_dir, tokens])
    options = settings.merge
    manifest = read_manifest(base_file)
    directory = locate(manifest)
    trust = settings.model.trust_remote_code
    rows = read_tokens(tokens / "valid.parquet", tokenizer=manifest.tokenizer_identity)
    rows = rows or read_tokens(tokens / "train.parquet", tokenizer=manifest.tokenizer_identity)
    rows = rows[: options.check_rows]

    with console.progress("reading the adapter's predictions"):
        adapted, _ = load_base(directory, dtype=settings.model.dtype, trust_remote_code=trust)
        narrow_head(adapted)
        adapter.load(adapted, adapter_dir)
        said = log_probabilities(adapted, rows)
        del adapted
    with outputs.replacing(out) as draft:
        with console.progress("merging"):
            fused, config = load_base(
                directory, dtype=options.dtype, dequantize=options.dequantize, keep_dtype=True, trust_remote_code=trust
            )
            adapter.load(fused, adapter_dir)
            dtype = floating_dtype(fused)
            fuse(fused, dtype=dtype, requantize=not options.dequantize)
            config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
            _write_model(draft, fused, config, directory, manifest)
            if template := settings.tokenize.chat_template:
                (draft / "chat_template.jinja").write_text(template, encoding="utf-8")
            del fused
        with console.progress("reading the merged model's predictions"):
            merged, _ = load_base(draft, dtype=settings.model.dtype, trust_remote_code=trust)
            narrow_head(merged)
            agreement = compare(said, log_probabilities(merged, rows))
        _refuse_loss(agreement, options)
    summary = {
        "rows": len(rows),
        "mean_divergence": round(agreement.mean_divergence, 6),
        "max_divergence": round(agreement.max_divergence, 5),
        "same_choice": round(agreement.same_choice, 4),
    }
    outputs.write_json(details, summary)
    size = sum(path.stat().st_size for path in out.iterdir())
    console.table(
        f"Merged model, {size / 1e6:,.0f} MB → {out}",
        ("merged against adapter", "value"),
        ((name.replace("_", " "), f"{value:g}") for name, value in summary.items()),
    )


def _refuse_loss(agreement: Agreement, options: schema.Merge) -> None:
    if not agreement.mean_divergence <= options.max_divergence:
        hint = "merge in a wider type (merge.dtype)"
        if not options.dequantize:
            hint = "quantisation rounds the adapter away: set merge.dequantize to true"
        raise ValueError(
            "the merged model is not what the adapter was: mean divergence "
            f"{agreement.mean_divergence:.3g} nats a token, merge.max_divergence is {options.max_divergence:g}; {hint}"
        )


def _write_model(draft: Path, model: Any, config: dict[str, Any], directory: Path, manifest: Manifest) -> None:
    """Weights, config and, from the base, everything that is neither."""
    from mlx_lm.utils import save_model

    save_model(draft, model)
    for name in manifest.files:
        if not name.endswith((".safetensors", ".safetensors.index.json")) and name != "config.json":
            shutil.copyfile(directory / name, draft / name)
    (draft / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    console.main(merge)
