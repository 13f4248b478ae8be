"""Fetch the base model and write down which one it is, exactly.

model → artifacts/base.json: `python -m stages.fetch --out artifacts/base.json`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.base.manifest import Manifest, describe, quantization_label, remember, total_size, write_manifest
from stages.cli import console
from stages.params import schema
from stages.params.loading import load_params
from stages.sources import obtain as sources


def fetch(
    out: Annotated[Path, typer.Option(help="The manifest to write.")] = Path("artifacts/base.json"),
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the Hub where the branch stands now.")] = False,
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Read `model` of params.yaml, bring that base model to this machine, write its manifest.

    The weights go to the per-machine store (or stay in the Hugging Face cache, or where your directory is); the
    manifest holds source, revision and every file's sha256. What is there already is checked, not fetched again.
    """
    model = load_params(params_file, overrides or ()).model
    manifest, directory = _obtain(model, refresh=refresh)
    remember(manifest, directory)
    write_manifest(out, manifest)
    console.table(
        f"Base model → {out}",
        ("", "value"),
        [
            ("source", manifest.source),
            ("revision", manifest.revision),
            ("architecture", manifest.architecture),
            ("quantisation", quantization_label(manifest)),
            ("size", f"{manifest.size / 1e6:,.0f} MB in {len(manifest.files)} files"),
        ],
    )


def _obtain(model: schema.Model, *, refresh: bool) -> tuple[Manifest, Path]:
    """The manifest and folder of an undamaged copy; a damaged one is fetched again, once."""
    for _ in range(2):
        with console.progress(f"fetching {model.source}"):
            copy = sources.obtain(model, refresh=refresh)
        with console.progress("hashing", total=total_size(copy.directory)) as advance:
            manifest = describe(
                copy.directory,
                source=copy.source,
                revision=copy.revision,
                with_code=model.trust_remote_code,
                advance=advance,
            )
        damaged = copy.damaged(manifest)
        if not damaged:
            return manifest, copy.directory
        console.say(f"damaged in the store, fetching again: {', '.join(damaged)}")
        copy.discard(damaged)
    raise ValueError(f"{copy.directory}: damaged again right after fetching: is the disk sound?")


if __name__ == "__main__":
    console.main(fetch)
