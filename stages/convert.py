"""Write an adapter in another format, read back and compared.

artifacts/adapter → a folder for PEFT: `python -m stages convert artifacts/adapter --to peft --out artifacts/peft`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.base.manifest import read_manifest
from stages.cli import console
from stages.files import outputs
from stages.params.loading import load_params

_BASE = Path("artifacts/base.json")


def convert(
    path: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder (mlx-lm's or PEFT's), or an .npz file.")
    ] = Path("artifacts/adapter"),
    *,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="The format to write: mlx, peft or npz.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base_file: Annotated[Path, typer.Option("--base", help="The base model's manifest.")] = _BASE,
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Write an adapter for mlx-lm, for PEFT, or as an .npz file; read it back and compare it with the adapter, or fail.

    The format of ADAPTER is known by its files. The base model, where it is on this machine, is what the adapter's
    modules and shapes are checked against.
    """
    from stages.adapters import find
    from stages.formats.base import open_base
    from stages.formats.export import FORMATS, export

    if to not in FORMATS:
        raise ValueError(f"--to {to}: no such format; there are: {', '.join(FORMATS)}")
    if out.suffix in (".npz", ".safetensors", ".gguf"):
        raise ValueError(f"--out {out}: name a folder; the files in it get the names that their readers know")
    outputs.refuse_foreign(out, FORMATS[to].files, inputs=[path])
    settings = load_params(params_file, overrides or ())
    manifest = read_manifest(base_file) if base_file.exists() or base_file != _BASE else None
    with console.progress("opening the base model"):
        base = open_base(manifest, trust_remote_code=settings.model.trust_remote_code)
    with console.progress("reading the adapter"):
        saved = find.read(path, model=base.model)
        base.check(saved)
    with console.progress("writing and comparing"), outputs.replacing(out) as draft:
        proof = export(saved, draft, to, base)
    checked = "" if base.model is not None else "; not checked against the base model, which is not on this machine"
    console.say(f"{find.kind_of(path)} → {to}: {out}, {proof}{checked}")


if __name__ == "__main__":
    console.main(convert)
