"""Score the base model on the test rows, and let it answer: once, for all experiments with these rows.

data/tokens + artifacts/base.json + data/prompts.jsonl + data/general.jsonl → artifacts/baseline:
`python -m stages.baseline data/tokens --out artifacts/baseline`
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.base.manifest import locate, read_manifest
from stages.cli import console
from stages.cli.settings import load_settings
from stages.files import hashes, outputs
from stages.params import schema
from stages.prompting.prompts import Prompts
from stages.readers import find
from stages.readers.rows import RawRow, strict
from stages.templating.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from stages.scoring.ranks import Ranks

MADE = ("rows.parquet", "answers.parquet", "prompts.parquet", "general.parquet")


def baseline(
    tokens: Annotated[Path, typer.Argument(help="The folder that tokenize wrote.")] = Path("data/tokens"),
    base_file: console.ManifestFile = Path("artifacts/base.json"),
    prompts: Annotated[
        Path, typer.Option(help="Rows with the columns of the template before the answer, or a `prompt`.")
    ] = Path("data/prompts.jsonl"),
    general: Annotated[
        Path, typer.Option(help="Rows with a `text`, to see what a fine-tune forgets; perhaps a `language`.")
    ] = Path("data/general.jsonl"),
    out: Annotated[Path, typer.Option(help="The folder to write scores and answers to.")] = Path("artifacts/baseline"),
    timing: Annotated[Path, typer.Option(help="Where to write the speed.")] = Path("artifacts/timing/baseline.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """What the base model alone scores on test rows and general text, and its answers to test questions and prompts.

    It depends on no parameter of training: an experiment finds it done. Under `mlx.launch` its processes share out the
    rows; the first of them answers, talks and writes.
    """
    settings = load_settings(params_file, overrides)
    from stages.decoding.answers import answers_of, with_answers
    from stages.decoding.decode import load_decoder
    from stages.lora.execution import set_up
    from stages.measuring.scores import rows_table, score_all, with_scores
    from stages.model.load import load_base
    from stages.questions.general import general_rows
    from stages.questions.rows import questions_of
    from stages.scoring.ranks import join
    from stages.tables.parquet import write_table
    from stages.tokens.parquet import read_tokens

    ranks = join()
    console.follow(ranks.rank)

    # Load
    trust = settings.model.trust_remote_code
    outputs.refuse_foreign(out, MADE, inputs=[tokens, prompts, general])
    manifest = read_manifest(base_file)
    rows = read_tokens(tokens / "test.parquet", tokenizer=manifest.tokenizer_identity)
    if not rows:
        raise ValueError(
            f"{tokens / 'test.parquet'}: no rows to evaluate on; raise prepare.test_fraction or prepare.test_rows"
        )
    tokenizer = load_tokenizer(directory := locate(manifest), trust_remote_code=trust)
    questions, without = questions_of(rows, tokenizer, limit=settings.evaluate.answers)
    maker = Prompts.under(settings, tokenizer)
    asked = [maker.ask(row.fields, row.place) for row in _rows_of(prompts)]
    texts = list(general_rows(_rows_of(general), tokenizer, max_length=settings.tokenize.max_length))
    _check_equal(ranks, settings, manifest.identity, (tokens / "test.parquet", general))
    scored = [*rows, *(row for _, row in texts)]
    with console.progress("loading the base model"):
        model, config = load_base(directory, dtype=settings.model.dtype, trust_remote_code=trust)
        # What the layers below the adapter put out is kept on the way, for evaluate. Which ones these are changes no
        # result: each row is scored alone, wherever its computation is cut in two. So this stage depends on no `lora`.
        execution = set_up(
            model,
            scored,
            adapted=_to_be_adapted(model, settings.lora),
            options=settings.model,
            base=manifest.identity,
            cache_gb=settings.runtime.cache_gb,
        )
    for note in execution.notes:
        console.say(note)

    # Score and answer
    began = time.perf_counter()
    with console.progress("scoring the base model", total=len(scored)) as advance:
        scores = score_all(model, scored, batch_size=1, ranks=ranks, frozen=execution.frozen, advance=advance)
    if problem := execution.close():
        console.warn(problem)
    rate = sum(len(row.input_ids) for row in scored) / (time.perf_counter() - began)
    if ranks.rank:
        return
    ids = [question.prompt_ids for question in questions] + [prompt.ids for prompt in asked]
    with console.progress("answers of the base model", total=len(ids)) as advance:
        decoder = load_decoder(directory, config, trust_remote_code=trust)
        answers = answers_of(model, decoder, ids, settings.generate, advance)

    # Write
    with outputs.replacing(out) as draft:
        draft.mkdir()
        write_table(
            draft / "rows.parquet", with_scores(rows_table(rows), "base", scores[: len(rows)]), base=manifest.identity
        )
        table = _general_table(texts)
        write_table(draft / "general.parquet", with_scores(table, "base", scores[len(rows) :]), base=manifest.identity)
        table = _table([asdict(question) for question in questions], ("id", "source", "prompt", "reference"))
        write_table(
            draft / "answers.parquet", with_answers(table, "base", answers[: len(questions)]), base=manifest.identity
        )
        table = _table([{"prompt": prompt.text, "prompt_ids": prompt.ids} for prompt in asked], ("prompt",))
        write_table(
            draft / "prompts.parquet", with_answers(table, "base", answers[len(questions) :]), base=manifest.identity
        )
    outputs.write_json(timing, {"base_tokens_per_second": round(rate, 2)})
    console.say(
        f"base model: {len(rows):,} test rows and {len(texts):,} general texts scored, {len(questions):,} of the rows' "
        f"questions and {len(asked):,} prompts answered → {out}"
    )
    if without:
        console.say(f"{without:,} test rows have no question: all of their text is learned")


def _to_be_adapted(model: Any, options: schema.Lora) -> list[str]:
    """The names of the modules that training will adapt; none if it will refuse, which is its own to say."""
    from stages.lora.adapter import module_names

    try:
        return module_names(model, options)
    except ValueError:
        return []


def _rows_of(path: Path) -> list[RawRow]:
    sources, _ = find.find([path])
    return [row for source in sources for row in strict(source.rows())]


def _check_equal(ranks: Ranks, settings: schema.Params, base: str, files: Sequence[Path]) -> None:
    params = settings.model_dump(include={"evaluate", "model"})
    ranks.check_equal({"params": params, "base": base, "tokens": [hashes.sha256(path) for path in files]})


def _table(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> Any:
    """A table of prompts: columns of text, and the prompts' tokens."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: pa.array([row[name] for row in rows], pa.string()) for name in texts}
    return pa.table(columns | {"prompt_ids": pa.array([row["prompt_ids"] for row in rows], pa.list_(pa.int32()))})


def _general_table(texts: Sequence[tuple[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.table(
        {
            "source": pa.array([row.source for _, row in texts], pa.string()),
            "language": pa.array([language for language, _ in texts], pa.string()),
            "input_ids": pa.array([row.input_ids for _, row in texts], pa.list_(pa.int32())),
            "tokens": pa.array([len(row.input_ids) - 1 for _, row in texts], pa.int64()),
        }
    )


if __name__ == "__main__":
    console.main(baseline)
