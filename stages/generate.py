"""Let the base model and the merged model answer the same prompts.

artifacts/merged + artifacts/base.json + data/prompts.jsonl → artifacts/samples/samples.{jsonl,md}:
`python -m stages.generate artifacts/merged --out artifacts/samples`, or talk: `python -m stages generate --prompt "…"`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages.base.manifest import locate, read_manifest
from stages.chat.tokenizer import load_tokenizer
from stages.cli import console
from stages.files import outputs
from stages.params import schema
from stages.params.loading import load_params
from stages.readers import find
from stages.readers.rows import strict

if TYPE_CHECKING:
    from stages.sampling.prompts import Prompt, Prompts


def generate(
    merged: Annotated[Path, typer.Argument(help="The model directory that merge wrote.")] = Path("artifacts/merged"),
    base_file: Annotated[Path, typer.Option("--base", help="The base model's manifest.")] = Path("artifacts/base.json"),
    prompts: Annotated[
        Path, typer.Option(help="Rows with the columns of the template before the answer, or a `prompt`.")
    ] = Path("data/prompts.jsonl"),
    out: Annotated[Path, typer.Option(help="The folder to write samples to.")] = Path("artifacts/samples"),
    prompt: Annotated[
        str | None, typer.Option(help="Answer just this, to the terminal, by the merged model.", show_default=False)
    ] = None,
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Answer every prompt with both models in batches and write the answers side by side, as JSONL and Markdown.

    With --prompt, nothing is written: the merged model's answer streams to the terminal.
    """
    settings = load_params(params_file, overrides or ())
    if prompt is not None:
        directory = _require(merged)
        _stream(directory, _prompts(directory, settings).of_words(prompt), settings)
        return
    models = {"base": locate(read_manifest(base_file)), "merged": _require(merged)}
    maker = _prompts(models["base"], settings)
    outputs.refuse_foreign(out, ["samples.jsonl", "samples.md"], inputs=[merged, prompts])
    sources, _ = find.find([prompts])
    asked = [_ask(maker, row.fields, row.place) for source in sources for row in strict(source.rows())]
    answers = {name: _answers(directory, name, asked, settings) for name, directory in models.items()}
    samples = [
        {"prompt": asked[i].text, **{name: given[i] for name, given in answers.items()}} for i in range(len(asked))
    ]
    with outputs.replacing(out) as draft:
        draft.mkdir()
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        (draft / "samples.jsonl").write_bytes("".join(lines).encode())
        (draft / "samples.md").write_bytes(_markdown(samples).encode())
    console.say(f"{len(samples)} prompts answered by base and merged model → {out}")


def _answers(directory: Path, name: str, asked: list[Prompt], settings: schema.Params) -> list[str]:
    """One model's answers, in the order of the prompts."""
    from stages.model.load import load_base
    from stages.sampling.decode import answer_all, load_decoder

    trust = settings.model.trust_remote_code
    model, config = load_base(directory, dtype=settings.model.dtype, trust_remote_code=trust)
    tokenizer = load_decoder(directory, config, trust_remote_code=trust)
    answers: dict[int, str] = {}
    with console.progress(f"answers of {name}", total=len(asked)) as advance:
        ids = [prompt.ids for prompt in asked]
        for index, text in answer_all(model, tokenizer, ids, seed=settings.seed, **settings.generate.model_dump()):
            answers[index] = text.strip()
            advance(1)
    return [answers[index] for index in range(len(asked))]


def _stream(directory: Path, prompt: Prompt, settings: schema.Params) -> None:
    from stages.model.load import load_base
    from stages.sampling.decode import answer_stream, load_decoder

    trust = settings.model.trust_remote_code
    model, config = load_base(directory, dtype=settings.model.dtype, trust_remote_code=trust)
    tokenizer = load_decoder(directory, config, trust_remote_code=trust)
    options = settings.generate.model_dump(exclude={"batch_size"})
    for piece in answer_stream(model, tokenizer, prompt.ids, seed=settings.seed, **options):
        typer.echo(piece, nl=False)
    typer.echo()


def _prompts(directory: Path, settings: schema.Params) -> Prompts:
    from stages.sampling.prompts import Prompts

    tokenizer = load_tokenizer(directory, trust_remote_code=settings.model.trust_remote_code)
    rendered_by = {name: getattr(settings.prepare, name) for name in ("template", "columns", "normalize")}
    return Prompts(tokenizer, **rendered_by, options=settings.tokenize)


def _ask(maker: Prompts, fields: dict[str, object], place: str) -> Prompt:
    try:
        return maker.of_row(fields)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; correct the row or prepare.template") from None


def _require(merged: Path) -> Path:
    if not (merged / "config.json").exists():
        raise ValueError(f"{merged}: no merged model; make it with: python -m stages.merge")
    return merged


def _markdown(samples: list[dict[str, str]]) -> str:
    parts = ["# Samples\n"]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"\n## {number}\n")
        parts += [f"\n**{name}**\n\n{_fenced(text)}\n" for name, text in sample.items()]
    return "".join(parts)


def _fenced(text: str) -> str:
    # A fence longer than any run of backticks in the text.
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"


if __name__ == "__main__":
    console.main(generate)
