"""Fold the adapter into the base model, and prove that the result says what the adapter said.

artifacts/base.json + artifacts/adapter → artifacts/merged, a model directory that any MLX or Hugging Face loader opens:
`python -m stages.merge artifacts/adapter --out artifacts/merged`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.base.manifest import CODE_FILES, MODEL_FILES, Manifest, locate, read_manifest
from stages.cli import console
from stages.cli.settings import load_settings
from stages.files import outputs
from stages.params import schema

if TYPE_CHECKING:
    from stages.merging.agreement import Agreement
    from stages.merging.combine import Part


def merge(
    adapter_dir: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")] = Path(
        "artifacts/adapter"
    ),
    base_file: console.ManifestFile = Path("artifacts/base.json"),
    tokens: Annotated[Path, typer.Option(help="Token rows to check the merged model on.")] = Path("data/tokens"),
    out: Annotated[Path, typer.Option(help="The model directory to write.")] = Path("artifacts/merged"),
    details: Annotated[Path, typer.Option(help="The proof to write.")] = Path("artifacts/details/merge.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Write base + adapter as one model; read it back and prove that the adapter survived, or fail."""
    settings = load_settings(params_file, overrides)
    outputs.refuse_foreign(out, (*MODEL_FILES, *CODE_FILES), inputs=[adapter_dir, tokens])
    manifest = read_manifest(base_file)
    parts = _parts(adapter_dir, settings.merge, manifest)
    said = _Said(parts, manifest, tokens, settings)
    with outputs.replacing(out) as draft:
        with console.progress("merging"):
            touched = _write(draft, parts, manifest, settings)
        with console.progress("reading the merged model back"):
            agreement = said.compared(draft, touched)
        _refuse_loss(agreement, settings.merge)
    summary = _summary(agreement, rows=said.rows)
    outputs.write_json(details, summary)
    size = sum(path.stat().st_size for path in out.iterdir())
    lines = ((name.replace("_", " "), f"{value:g}") for name, value in summary.items())
    console.table(f"Merged model, {size / 1e6:,.0f} MB → {out}", ("merged against adapter and base", "value"), lines)


def _parts(adapter_dir: Path, options: schema.Merge, manifest: Manifest) -> list[Part]:
    """The adapters to merge, all of this base."""
    from stages.lora.adapter_files import check_base
    from stages.merging.combine import Part

    parts = [Part(Path(part.path), part.weight) for part in options.adapters or ()] or [Part(adapter_dir)]
    for part in parts:
        check_base(part.folder, manifest.weights_identity)
    return parts


class _Said:
    """What base and adapter say on some held-out rows, to compare the merged model with."""

    def __init__(self, parts: Sequence[Part], manifest: Manifest, tokens: Path, settings: schema.Params) -> None:
        from stages.lora.batches import collate
        from stages.lora.execution import patches_of, set_up
        from stages.merging import combine
        from stages.merging.agreement import log_probabilities
        from stages.model.load import load_base
        from stages.tokens.parquet import read_tokens

        self._settings, self._directory = settings, locate(manifest)
        rows = read_tokens(tokens / "valid.parquet", tokenizer=manifest.tokenizer_identity)
        rows = rows or read_tokens(tokens / "train.parquet", tokenizer=manifest.tokenizer_identity)
        rows = rows[: settings.merge.check_rows]
        self.rows = len(rows)
        with console.progress("reading the predictions of base and adapter"):
            model, _ = load_base(
                self._directory, dtype=settings.model.dtype, trust_remote_code=settings.model.trust_remote_code
            )
            execution = set_up(
                model,
                rows,
                adapted=combine.names_of(parts),
                options=settings.model,
                base=manifest.identity,
                cache_gb=settings.runtime.cache_gb,
            )
            self._whole = [collate([row]) for row in rows]
            self._from_states = [collate([row], execution.frozen) for row in rows]
            self._base = log_probabilities(model, self._from_states)
            combine.load_sum(model, parts)
            self._adapter = log_probabilities(model, self._from_states)
            # Of the model itself nothing is kept: its weights would lie beside the merged model's.
            self._patches = patches_of(model)
        if problem := execution.close():
            console.warn(problem)

    def compared(self, merged: Path, touched: Sequence[str]) -> Agreement:
        """Compare with a merged model, of which the adapter touched some modules.

        Where all others are the base's own, byte for byte, the layers below the adapter need not run again.
        """
        from stages.lora.execution import patch
        from stages.merging.agreement import compare, log_probabilities
        from stages.model.load import load_base

        options, trust = self._settings.merge, self._settings.model.trust_remote_code
        is_packed_anew = options.quantize is not None
        if not is_packed_anew:
            _refuse_changes(self._directory, merged, touched, self._settings)
        model, _ = load_base(merged, dtype=self._settings.model.dtype, trust_remote_code=trust)
        patch(model, self._patches)
        batches = self._whole if is_packed_anew else self._from_states
        said = log_probabilities(model, batches)
        return compare(batches, base=self._base, adapter=self._adapter, merged=said)


def _write(draft: Path, parts: Sequence[Part], manifest: Manifest, settings: schema.Params) -> list[str]:
    """Write the merged model; returns the names of the modules that the adapters touch."""
    from mlx_lm.utils import save_model

    from stages.merging import combine
    from stages.merging.fuse import fuse, quantized
    from stages.model.load import floating_dtype

    options, directory = settings.merge, locate(manifest)
    model, config = _base_to_keep(directory, settings)
    combine.load_sum(model, parts)
    dtype = floating_dtype(model)
    touched = fuse(model, dtype=dtype, requantize=not options.dequantize)
    if options.quantize:
        model, config = quantized(model, config, **options.quantize.model_dump())
    config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
    save_model(draft, model, donate_model=True)  # shard by shard: a tensor is computed when it is written
    for name in manifest.files:
        if not name.endswith((".safetensors", ".safetensors.index.json")) and name != "config.json":
            shutil.copyfile(directory / name, draft / name)
    (draft / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n")
    if template := settings.tokenize.chat_template:
        (draft / "chat_template.jinja").write_text(template, encoding="utf-8")
    return touched


def _base_to_keep(directory: Path, settings: schema.Params) -> tuple[Any, dict[str, Any]]:
    """The base model with the weights that the merged model is to have where no adapter touches it."""
    from stages.model.load import load_base

    options = settings.merge
    return load_base(
        directory,
        dtype=options.dtype,
        dequantize=options.dequantize,
        keep_dtype=True,
        trust_remote_code=settings.model.trust_remote_code,
    )


def _refuse_changes(directory: Path, merged: Path, touched: Sequence[str], settings: schema.Params) -> None:
    """Raise ValueError if a tensor that no adapter touches is not the base's own."""
    from stages.merging.untouched import first_difference
    from stages.model.load import load_base

    base, _ = _base_to_keep(directory, settings)
    found, _ = load_base(merged, dequantize=False, keep_dtype=True, trust_remote_code=settings.model.trust_remote_code)
    if name := first_difference(base, found, touched=touched):
        raise ValueError(
            f"the merged model's {name} is not the base's, although no adapter touches it: a damaged disk?"
        )


def _refuse_loss(agreement: Agreement, options: schema.Merge) -> None:
    if agreement.is_kept(options.min_survival):
        return
    hint = "merge in a wider type (merge.dtype)"
    if options.quantize:
        hint = "take more bits or smaller groups (merge.quantize), or none: merge.quantize=null"
    elif not options.dequantize:
        hint = "quantisation rounds the adapter away: set merge.dequantize to true"
    raise ValueError(
        f"{agreement.survival:.1%} of the adapter's effect survives in the merged model, and merge.min_survival is "
        f"{options.min_survival:g} (divergence from the adapter {agreement.mean_divergence:.3g} nats a token; of the "
        f"adapter from the base {agreement.effect:.3g}); {hint}"
    )


def _summary(agreement: Agreement, *, rows: int) -> dict[str, Any]:
    """The proof's numbers, rounded beyond what differs between machines."""
    return {
        "rows": rows,
        "tokens": agreement.tokens,
        "survival": round(agreement.survival, 4),
        "effect": round(agreement.effect, 5),
        "mean_divergence": round(agreement.mean_divergence, 6),
        "max_divergence": round(agreement.max_divergence, 5),
        "same_choice": round(agreement.same_choice, 4),
        "base_loss": round(agreement.base_loss, 5),
        "adapter_loss": round(agreement.adapter_loss, 5),
        "merged_loss": round(agreement.merged_loss, 5),
    }


if __name__ == "__main__":
    console.main(merge)
