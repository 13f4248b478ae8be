"""Raw rows → prompts and completions, split into train, valid and test, with every row accounted for.

data/raw → data/prepared/{train,valid,test}.jsonl: `python -m stages.prepare data/raw --out data/prepared`
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from stages import console, files, params
from stages.text import split
from stages.text.rows import RawRow, jsonl_files, read_jsonl
from stages.text.template import Template


def prepare(
    raw: Annotated[
        list[Path] | None, typer.Argument(help="JSONL files, or folders of them. [default: data/raw]")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write train, valid and test.jsonl to.")] = Path(
        "data/prepared"
    ),
    metrics: Annotated[Path, typer.Option(help="The ledger to write.")] = Path("artifacts/metrics/prepare.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Read rows with the columns of `prepare.template` (or a `text`), write prompt and completion of each, by split.

    A row's split follows from its own text and `prepare.seed`: adding rows moves none of the old ones.
    """
    options = params.load(params_file, overrides or ()).prepare
    template = Template(options.template)
    prepared: dict[str, dict[str, str]] = {}
    ledger: Counter[str] = Counter()
    for path in jsonl_files(raw or [Path("data/raw")]):
        for row in read_jsonl(path):
            ledger["rows_in"] += 1
            record = _record(row, template)
            if record["id"] in prepared:
                ledger["dropped_duplicates"] += 1
            prepared.setdefault(record["id"], record)

    splits: dict[str, list[dict[str, str]]] = {name: [] for name in split.SPLITS}
    fractions = {"valid_fraction": options.valid_fraction, "test_fraction": options.test_fraction}
    for record in prepared.values():
        splits[split.assign(record["id"], seed=options.seed, **fractions)].append(record)
    _refuse_empty(splits, fractions)

    with files.replacing(out) as draft:
        draft.mkdir()
        for name, records in splits.items():
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            (draft / f"{name}.jsonl").write_bytes("".join(lines).encode())
    counts = {name: len(records) for name, records in splits.items()}
    summary = {"rows_in": ledger["rows_in"], "dropped_duplicates": ledger["dropped_duplicates"], **counts}
    files.write_json(metrics, summary)
    console.table(f"Prepared rows → {out}", ("", "rows"), summary.items())


def _record(row: RawRow, template: Template) -> dict[str, str]:
    try:
        if "text" in row.fields and not set(template.columns) <= row.fields.keys():
            template = Template("{text}")
        prompt, completion = template.prompt(row.fields), template.completion(row.fields)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}; mend the row or prepare.template") from None
    return {"id": split.row_id(prompt + completion), "source": row.place, "prompt": prompt, "completion": completion}


def _refuse_empty(splits: dict[str, list[dict[str, str]]], fractions: dict[str, float]) -> None:
    total = sum(map(len, splits.values()))
    for name, records in splits.items():
        if not records and fractions.get(f"{name}_fraction", 1) > 0:
            mend = f"raise prepare.{name}_fraction" if name != "train" else "lower the other fractions"
            raise ValueError(f"the {name} split got none of the {total} rows; add rows or {mend}")


if __name__ == "__main__":
    console.main(prepare)
