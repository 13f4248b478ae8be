"""Let the merged model answer the prompts that the base model answered.

artifacts/merged + artifacts/baseline → artifacts/samples/samples.{jsonl,md}:
`python -m stages.generate artifacts/merged --out artifacts/samples`, or ask: `python -m stages generate --prompt "…"`
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.base.manifest import read_manifest
from stages.cli import asking, console
from stages.cli.settings import load_settings
from stages.files import outputs
from stages.params import schema
from stages.prompting.prompts import Prompts
from stages.readers import find
from stages.readers.rows import strict
from stages.templating.tokenizer import load_tokenizer


def generate(
    merged: Annotated[Path, typer.Argument(help="The model directory that merge wrote.")] = Path("artifacts/merged"),
    manifest: Annotated[Path, typer.Option(help="The base model's manifest.")] = Path("artifacts/base.json"),
    baseline: Annotated[Path, typer.Option(help="The folder that baseline wrote.")] = Path("artifacts/baseline"),
    prompts: Annotated[
        Path | None,
        typer.Option(help="Answer the rows of this file instead, by the merged model alone.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write samples to.")] = Path("artifacts/samples"),
    prompt: Annotated[
        str | None,
        typer.Option(help="Answer just this, to the terminal; -: what standard input says.", show_default=False),
    ] = None,
    adapters: asking.Adapters = None,
    base: asking.Base = False,
    max_tokens: asking.MaxTokens = None,
    temperature: asking.Temperature = None,
    top_p: asking.TopP = None,
    top_k: asking.TopK = None,
    min_p: asking.MinP = None,
    repetition_penalty: asking.RepetitionPenalty = None,
    presence_penalty: asking.PresencePenalty = None,
    frequency_penalty: asking.FrequencyPenalty = None,
    stop: asking.Stop = None,
    seed: asking.Seed = None,
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Answer every prompt of the baseline in batches; write both models' answers, as JSONL and Markdown.

    With --prompt, nothing is written: the answer streams to the terminal.
    """
    options = asking.overrides(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=stop,
        seed=seed,
    )
    if prompt is None and (options or adapters or base):
        raise ValueError("--adapter, --base and the options of an answer go with --prompt; for files: --set generate.…")
    settings = load_settings(params_file, [*(overrides or ()), *options])
    from stages.model.load import require_merged

    if prompt is not None:
        _ask(prompt, settings, merged=merged, manifest=manifest, base=base, adapters=adapters or ())
        return
    directory = require_merged(merged)
    outputs.refuse_foreign(out, ["samples.jsonl", "samples.md"], inputs=[merged, baseline])
    if prompts is None:
        asked, ids = _answered(baseline / "prompts.parquet", read_manifest(manifest).identity)
    else:
        asked, ids = _read(prompts, _maker(directory, settings))
    answers = _answers(directory, ids, settings)
    samples = [{**sample, "merged": answer} for sample, answer in zip(asked, answers, strict=True)]
    with outputs.replacing(out) as draft:
        draft.mkdir()
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        (draft / "samples.jsonl").write_bytes("".join(lines).encode())
        (draft / "samples.md").write_bytes(_markdown(samples).encode())
    console.say(f"{len(samples)} prompts answered → {out}")


def _ask(
    prompt: str, settings: schema.Params, *, merged: Path, manifest: Path, base: bool, adapters: Sequence[str]
) -> None:
    """Answer one prompt to the terminal: by the merged model, or by the base (`base`) and each adapter in turn."""
    from stages.serving.conversation import Conversation
    from stages.serving.models import open_models

    words = asking.standard_input() if prompt == "-" else prompt
    with console.progress("loading the model"):
        models = open_models(settings, merged=merged, manifest=manifest, base=base, adapters=adapters)
    asked = models.names[1:] if adapters and not base else models.names
    for name in asked:
        began = time.perf_counter()
        models.switch(name)
        if len(asked) > 1:
            console.note(f"{name} (switched in {1000 * (time.perf_counter() - began):.1f} ms)")
        for piece in Conversation(models, settings.generate).ask(words):
            typer.echo(piece, nl=False)
        typer.echo()


def _answered(path: Path, base: str) -> tuple[list[dict[str, str]], list[list[int]]]:
    """The baseline's prompts with the base model's answers, and their tokens."""
    from stages.tables.parquet import read_table

    table = read_table(path, ("prompt", "prompt_ids", "base"), base=base, made_by="baseline")
    return table.select(["prompt", "base"]).to_pylist(), table["prompt_ids"].to_pylist()


def _read(path: Path, maker: Prompts) -> tuple[list[dict[str, str]], list[list[int]]]:
    """The prompts of a file's rows, and their tokens."""
    sources, _ = find.find([path])
    made = [maker.ask(row.fields, row.place) for source in sources for row in strict(source.rows())]
    return [{"prompt": prompt.text} for prompt in made], [prompt.ids for prompt in made]


def _answers(directory: Path, prompts: list[list[int]], settings: schema.Params) -> list[str]:
    """The merged model's answers, in the order of the prompts."""
    from stages.decoding.answers import answers_of

    model, decoder = _load(directory, settings)
    with console.progress("answers of the merged model", total=len(prompts)) as advance:
        return [answer.text for answer in answers_of(model, decoder, prompts, settings.generate, advance)]


def _load(directory: Path, settings: schema.Params) -> tuple[Any, Any]:
    """The model and its decoder's tokenizer."""
    from stages.decoding.decode import load_decoder
    from stages.model.load import load_base

    trust = settings.model.trust_remote_code
    with console.progress("loading the merged model"):
        model, config = load_base(directory, dtype=settings.model.dtype, trust_remote_code=trust)
        return model, load_decoder(directory, config, trust_remote_code=trust)


def _maker(directory: Path, settings: schema.Params) -> Prompts:
    tokenizer = load_tokenizer(directory, trust_remote_code=settings.model.trust_remote_code)
    return Prompts.under(settings, tokenizer)


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
