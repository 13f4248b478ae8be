"""Fetch the base model and write down which one it is, exactly.

model → artifacts/base.json: `python -m stages.fetch --out artifacts/base.json`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.base.manifest import (
    LOCAL,
    Manifest,
    check_tokenizer,
    describe,
    quantization_label,
    read_manifest,
    remember,
    stamps,
    total_size,
    write_manifest,
)
from stages.base.records import write_record
from stages.cli import console
from stages.params import schema
from stages.params.loading import load_params
from stages.sources import obtain as sources


def fetch(
    out: Annotated[Path, typer.Option(help="The manifest to write; one that is there pins the base model.")] = Path(
        "artifacts/base.json"
    ),
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the Hub where the branch stands now.")] = False,
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Read `model` of params.yaml, bring that base model to this machine, write its manifest.

    The weights go to the per-machine store (or stay in the Hugging Face cache, or where your directory is); the
    manifest holds source, revision and every file's sha256. A manifest that is there, and that git keeps, pins a
    revision of the Hub until `--refresh`. A local directory that changed is taken as it is now.
    """
    model = load_params(params_file, overrides or ()).model
    source = sources.recognise(model)
    before = _read_before(out)
    pin = before if before and not refresh and sources.is_pin(before, model, source) else None
    if pin and (record := sources.find_pinned(model, source, pin)):
        write_record(pin.identity, record)
        console.say(f"Base model as in {out}: {pin.source} at {pin.revision}")
        return
    manifest, directory = _obtain(model, source, pin, refresh=refresh)
    write_manifest(out, manifest)
    if before and (change := _describe_change(before, manifest, directory)):
        console.warn(change)
    console.table(
        f"Base model → {out}",
        ("", "value"),
        [
            ("source", manifest.source),
            ("revision", manifest.revision),
            ("architecture", manifest.architecture),
            ("quantisation", quantization_label(manifest)),
            ("licence", manifest.license or "not stated"),
            ("size", f"{manifest.size / 1e6:,.0f} MB in {len(manifest.files)} files"),
        ],
    )


def _read_before(out: Path) -> Manifest | None:
    """The manifest that is there; a damaged one pins nothing."""
    if not out.exists():
        return None
    try:
        return read_manifest(out)
    except ValueError as error:
        console.warn(f"{error}: done now, and what it pinned is lost")
        return None


def _obtain(
    model: schema.Model, source: sources.Source, pin: Manifest | None, *, refresh: bool
) -> tuple[Manifest, Path]:
    """The manifest and folder of an undamaged copy; a damaged one is fetched again, once."""
    for _ in range(2):
        with console.progress(f"fetching {model.source}"):
            copy = sources.obtain(model, source, pin=pin, refresh=refresh)
        seen = stamps(copy.directory)
        with console.progress("hashing", total=total_size(copy.directory)) as advance:
            manifest = describe(
                copy.directory,
                source=copy.source,
                revision=copy.revision,
                requested=pin.requested if pin else model.revision,
                license=pin.license if pin else copy.license,
                with_code=model.trust_remote_code,
                advance=advance,
            )
        damaged = copy.damaged(manifest)
        if not damaged:
            check_tokenizer(manifest, copy.directory)
            remember(manifest, copy.directory, seen, with_code=model.trust_remote_code)
            return manifest, copy.directory
        console.say(f"damaged in the store, fetching again: {', '.join(damaged)}")
        copy.discard(damaged)
    raise ValueError(f"{copy.directory}: damaged again right after fetching: is the disk sound?")


def _describe_change(before: Manifest, after: Manifest, directory: Path) -> str | None:
    """One line on how the base model differs from the one that base.json had; None if it does not."""
    if before.source != after.source:
        return f"the base model is another: {after.source} at {after.revision}, no more {before.source}"
    if before.revision != after.revision and not before.source.startswith(LOCAL):
        return f"the base model moved: {after.source} from {before.revision} to {after.revision}"
    names = before.files.keys() | after.files
    if changed := ", ".join(sorted(name for name in names if before.files.get(name) != after.files.get(name))):
        return f"the base model changed: {changed} in {directory} differs from base.json; it is taken as it is now"
    return None


if __name__ == "__main__":
    console.main(fetch)
