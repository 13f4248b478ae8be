"""The tables of a test → every number with its interval, the paired differences, the sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from stages.params import schema
from stages.results import answers, words
from stages.results.intervals import LEVEL, Estimate, Units
from stages.results.pairs import counts, units_of

MODELS = ("base", "adapter", "merged")
Numbers = dict[str, Any]
Line = tuple[str, ...]


def check_slice(rows: Any, column: str) -> None:
    """Check that rows carry the column by which they are to be sliced.

    Raises:
        ValueError: they do not.
    """
    carried = {name for pairs in rows["carried"].to_pylist() for name, _ in pairs}
    if column not in carried:
        there = f"it is {', '.join(sorted(carried))}" if carried else "it is empty"
        raise ValueError(f"evaluate.slice_by: the rows carry no column {column}; add it to prepare.carry ({there})")


def summarize(tables: dict[str, Any], options: schema.Evaluate, *, max_tokens: int) -> Numbers:
    """All numbers of a test, ready for JSON."""
    rows = {name: tables["rows"][name].to_pylist() for name in tables["rows"].column_names}
    units, unit = units_of(rows["group"])
    losses = {model: np.array(rows[f"{model}_loss"]) for model in MODELS}
    tokens, size = np.array(rows["tokens"]), np.array(rows["bytes"])
    difference = units.difference(losses["base"], losses["adapter"], tokens)
    better, worse = counts((losses["base"] - losses["adapter"]) / tokens)
    needed = units.needed(losses["base"], losses["adapter"], tokens)
    correct = {model: np.array(rows[f"{model}_correct"]) for model in MODELS}
    bits = size * math.log(2)
    return {
        "sentence": words.sentence(difference, better=better, worse=worse, rows=len(tokens)),
        "power": words.rows_needed(needed, units.count, unit),
        "rows": len(tokens),
        "tokens": int(tokens.sum()),
        "level": LEVEL,
        "unit": unit,
        "units": units.count,
        "models": {model: _scores(units, losses[model], correct[model], tokens, bits) for model in MODELS},
        "difference": {
            "loss": rounded(difference),
            "bits_per_byte": rounded(units.difference(losses["base"], losses["adapter"], bits)),
            "token_accuracy": rounded(units.difference(correct["base"], correct["adapter"], tokens)),
            "rows_better": better,
            "rows_worse": worse,
            "rows_needed": needed,
        },
        "slices": _slices(rows, losses, tokens, options.slice_by),
        "answers": _answers(tables["answers"], len(tokens), max_tokens),
        "forgetting": _forgetting(tables["general"], options.max_forgetting),
    }


def _scores(units: Units, losses: Any, correct: Any, tokens: Any, bits: Any) -> Numbers:
    loss = units.ratio(losses, tokens)
    return {
        "loss": rounded(loss),
        "perplexity": rounded(loss.mapped(lambda nats: math.exp(min(nats, 700)))),
        "bits_per_byte": rounded(units.ratio(losses, bits)),
        "token_accuracy": rounded(units.ratio(correct, tokens)),
    }


def _slices(rows: dict[str, list[Any]], losses: dict[str, Any], tokens: Any, column: str | None) -> Numbers | None:
    if column is None:
        return None
    values = np.array([dict(pairs).get(column, "") for pairs in rows["carried"]])
    groups = []
    for value in sorted(set(values.tolist())):
        there = values == value
        units = Units.of_rows(int(there.sum()))
        base, adapter = losses["base"][there], losses["adapter"][there]
        groups.append(
            {
                "name": value,
                "rows": units.count,
                "tokens": int(tokens[there].sum()),
                "base": rounded(units.ratio(base, tokens[there])),
                "adapter": rounded(units.ratio(adapter, tokens[there])),
                "difference": rounded(units.difference(base, adapter, tokens[there])),
                "rows_better": counts((base - adapter) / tokens[there])[0],
            }
        )
    return {"by": column, "groups": groups}


def _answers(table: Any, rows: int, max_tokens: int) -> Numbers | None:
    if not len(table):
        return None
    units = Units.of_rows(len(table))
    names = [*answers.SCORES, "tokens", "stopped", *(["parses"] if "base_parses" in table.column_names else [])]
    columns = {
        model: {name: np.array(table[f"{model}_{name}"].to_pylist(), dtype=np.float64) for name in names}
        for model in ("base", "tuned")
    }
    return {
        "rows": len(table),
        "max_tokens": max_tokens,
        "format": answers.format_of(table["reference"].to_pylist()),
        **{
            model: {name: rounded(units.ratio(scores[name], is_share=name in answers.SHARES)) for name in names}
            for model, scores in columns.items()
        },
        "difference": {
            name: rounded(
                units.difference(columns["base"][name], columns["tuned"][name], is_share=name in answers.SHARES)
            )
            for name in names
        },
    }


def _forgetting(table: Any, limit: float | None) -> Numbers:
    languages = table["language"].to_pylist()
    named = [name for name in dict.fromkeys(languages) if name]
    columns = [np.array(table[name].to_pylist()) for name in ("base_loss", "adapter_loss", "tokens")]
    groups = []
    for name in ["all", *named] if len(named) > 1 else ["all"]:
        there = np.array([name in ("all", language) for language in languages])
        units = Units.of_rows(int(there.sum()))
        base, adapter, tokens = (column[there] for column in columns)
        groups.append(
            {
                "name": name,
                "rows": units.count,
                "base": rounded(units.ratio(base, tokens)),
                "adapter": rounded(units.ratio(adapter, tokens)),
                "difference": rounded(units.difference(base, adapter, tokens)),
            }
        )
    return {"rows": len(languages), "tokens": int(columns[2].sum()), "limit": limit, "groups": groups}


def rounded(estimate: Estimate) -> Numbers:
    """An estimate for JSON."""
    return {name: None if value is None else round(value, 4) for name, value in asdict(estimate).items()}


def estimate(numbers: Numbers) -> Estimate:
    """An estimate from JSON."""
    return Estimate(**numbers)


def headline(numbers: Numbers) -> dict[str, float]:
    """The few numbers that `dvc metrics` shows: they have the same names in every run."""
    answered = numbers["answers"]
    return {
        "loss": numbers["models"]["adapter"]["loss"]["value"],
        "gain": round(-numbers["difference"]["loss"]["value"], 4) + 0.0,
        "chrf": round(answered["tuned"]["chrf"]["value"], 2) if answered else 0.0,
        "forgetting": numbers["forgetting"]["groups"][0]["difference"]["value"],
    }


def check_forgetting(numbers: Numbers) -> None:
    """Check the loss on general text against its limit.

    Raises:
        ValueError: it rose by more.
    """
    limit, change = numbers["forgetting"]["limit"], numbers["forgetting"]["groups"][0]["difference"]
    if limit is not None and change["value"] > limit:
        raise ValueError(
            f"the loss on general text rose by {words.signed(estimate(change))} nats a token, more than "
            f"evaluate.max_forgetting ({limit:g}); lower train.learning_rate, train less long, or raise the limit"
        )


def shown(numbers: Numbers) -> Iterator[tuple[str, Line, list[Line]]]:
    """Tables for the terminal: title, header and lines of each. Differences have their interval."""
    title = f"Test split: {numbers['rows']:,} rows, {numbers['tokens']:,} scored tokens"
    lines = [
        (
            label(name),
            *(words.number(numbers["models"][model][name]["value"]) for model in MODELS),
            _change(numbers["difference"].get(name)),
        )
        for name in numbers["models"]["base"]
    ]
    yield title, ("", *MODELS, "adapter \N{MINUS SIGN} base"), lines
    if slices := numbers["slices"]:
        yield f"Loss by {slices['by']}", _GROUP_HEADER, list(_group_lines(slices["groups"]))
    if answered := numbers["answers"]:
        title = f"Answers to {answered['rows']:,} test questions, of at most {answered['max_tokens']:,} tokens"
        changes = answered["difference"]
        lines = [
            (
                label(name),
                *(words.number(answered[model][name]["value"]) for model in ("base", "tuned")),
                _change(change),
            )
            for name, change in changes.items()
        ]
        yield title, ("", "base", "tuned", "tuned \N{MINUS SIGN} base"), lines
    yield "Loss on general text", _GROUP_HEADER, list(_group_lines(numbers["forgetting"]["groups"]))


_GROUP_HEADER = ("", "rows", "base", "adapter", "adapter \N{MINUS SIGN} base")


def _group_lines(groups: Iterable[Numbers]) -> Iterator[Line]:
    for group in groups:
        values = (words.number(group[model]["value"]) for model in ("base", "adapter"))
        yield (group["name"] or "(none)", f"{group['rows']:,}", *values, _change(group["difference"]))


def _change(numbers: Numbers | None) -> str:
    return words.signed(estimate(numbers)) if numbers else ""


def label(name: str) -> str:
    """A number's name as people read it."""
    return {"chrf": "chrF", "rouge_l": "ROUGE-L"}.get(name, name.replace("_", " "))
