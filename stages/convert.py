"""Write an adapter or a model in another format, read back and compared.

artifacts/adapter → a folder for PEFT: `python -m stages convert artifacts/adapter --to peft --out artifacts/peft`;
artifacts/merged → a GGUF and a Modelfile: `python -m stages convert artifacts/merged --to gguf --out artifacts/gguf`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.base.manifest import Manifest, locate, read_manifest
from stages.cli import console
from stages.cli.settings import load_settings
from stages.files import outputs
from stages.params import schema

_BASE = Path("artifacts/base.json")
GGUF = "gguf"


def convert(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="An adapter's folder (mlx-lm's or PEFT's), an .npz file or, for gguf, a model's folder.",
        ),
    ] = Path("artifacts/adapter"),
    *,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="The format to write: mlx, peft, npz or gguf.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base_file: console.ManifestFile = _BASE,
    dtype: Annotated[str, typer.Option(help="Of a model in GGUF: f32, f16, bf16 or q8_0.")] = "f16",
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Write an adapter for mlx-lm, PEFT, llama.cpp or as an .npz file, or a model as GGUF; read it back and compare.

    The format of PATH is known by its files. The base model, where it is on this machine, is what the adapter's
    modules and shapes are checked against.
    """
    settings = load_settings(params_file, overrides)
    from stages.adapters import find
    from stages.formats.base import open_base
    from stages.formats.export import FORMATS, export

    if to not in (*FORMATS, GGUF):
        raise ValueError(f"--to {to}: no such format; there are: {', '.join((*FORMATS, GGUF))}")
    if out.suffix in (".npz", ".safetensors", ".gguf"):
        raise ValueError(f"--out {out}: name a folder; the files in it get the names that their readers know")
    manifest = read_manifest(base_file) if base_file.exists() or base_file != _BASE else None
    if to == GGUF:
        _to_gguf(path, out, manifest, settings, dtype=dtype)
        return
    outputs.refuse_foreign(out, FORMATS[to].files, inputs=[path])
    with console.progress("opening the base model"):
        base = open_base(manifest, trust_remote_code=settings.model.trust_remote_code)
    with console.progress("reading the adapter"):
        saved = find.read(path, model=base.model)
        base.check(saved)
    with console.progress("writing and comparing"), outputs.replacing(out) as draft:
        proof = export(saved, draft, to, base)
    checked = "" if base.model is not None else "; not checked against the base model, which is not on this machine"
    console.say(f"{find.kind_of(path)} → {to}: {out}, {proof}{checked}")


def _to_gguf(path: Path, out: Path, manifest: Manifest | None, settings: schema.Params, *, dtype: str) -> None:
    """A model's folder as model.gguf with a Modelfile for Ollama, or an adapter's as adapter.gguf for its base."""
    from stages.formats.gguf_adapter import export_adapter
    from stages.formats.gguf_model import export_model
    from stages.formats.ollama import write_modelfile

    outputs.refuse_foreign(out, ("*.gguf", "Modelfile"), inputs=[path])
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; --to {GGUF} takes a model's or an adapter's")
    with console.progress("writing and comparing"), outputs.replacing(out) as draft:
        draft.mkdir()
        if (path / "config.json").exists():
            made = export_model(path, draft / "model.gguf", dtype=dtype)
            write_modelfile(
                draft / "Modelfile",
                path,
                gguf="model.gguf",
                template=settings.prepare.template,
                date=settings.tokenize.date,
            )
        elif manifest is None:
            raise ValueError(f"an adapter's GGUF is made for its base; {_BASE} is not here: python -m stages.fetch")
        else:
            made = export_adapter(path, locate(manifest), draft / "adapter.gguf")
    console.say(
        f"{path} → {out}: {made.architecture}, {made.tensors} tensors in {made.dtype}, {made.size / 1e6:,.0f} MB, "
        "read back and compared"
    )


if __name__ == "__main__":
    console.main(convert)
