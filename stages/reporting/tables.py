"""Numbers of a run → tables of text: scores with their intervals, groups, and the ledger of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stages.results import words
from stages.results.summary import MODELS, estimate, label

NOTHING = "\N{EN DASH}"
DIFFERENCE = "adapter \N{MINUS SIGN} base"
_SPLITS = ("train", "valid", "test", "all")


@dataclass(frozen=True)
class Cell:
    """A value, its interval, and a word on it: better, worse, or not clear."""

    value: str
    interval: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table: its name, what that means in plain words, and a cell for each column."""

    name: str
    cells: Sequence[Cell]
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column holds the names of its rows."""

    title: str
    header: Sequence[str]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Ledger:
    """What became of the rows in a stage: a table of counts, and the names of those that are 0."""

    table: Table
    zero: Sequence[str]


class _Metric(NamedTuple):
    """A metric in plain words; `better` is the sign of a change for the better, 0 if there is none."""

    meaning: str
    better: int
    digits: int = 3


_METRICS = {
    "loss": _Metric(
        "How unlikely the model finds the reference's next token, on average, in nats. Lower is better.", -1
    ),
    "perplexity": _Metric("e to the power of the loss: among so many tokens the model hesitates. Lower is better.", -1),
    "bits_per_byte": _Metric("The loss for each byte of text: comparable between tokenizers. Lower is better.", -1),
    "token_accuracy": _Metric("Share of tokens that the model would have chosen itself; 0–1.", 1),
    "exact_match": _Metric("Share of answers that are the reference, letter for letter; 0–1.", 1),
    "normalized_match": _Metric("The same, but case, width, punctuation and spaces do not count.", 1),
    "chrf": _Metric("Short runs of letters in common with the reference; 0–100.", 1, 1),
    "rouge_l": _Metric(
        "Longest series of words in common with the reference; 0–1. A Korean syllable is a word.",
        1,
    ),
    "repetition": _Metric(
        "Share of an answer that repeats what it said before; 0–1. Lower is better.",
        -1,
    ),
    "tokens": _Metric("Mean length of an answer, in tokens.", 0, 1),
    "stopped": _Metric("Share of answers that ended by themselves, before the limit.", 1),
    "parses": _Metric("Share of answers that are valid in the references' format.", 1),
}


def metrics(numbers: Mapping[str, Any]) -> Table:
    """Every score of base, adapter and merged model, and the adapter's difference from the base."""
    lines = [
        _line(name, [numbers["models"][model][name] for model in MODELS], numbers["difference"].get(name))
        for name in numbers["models"]["base"]
    ]
    return Table("Scores on held-out text", ("metric", *MODELS, DIFFERENCE), lines)


def answers(numbers: Mapping[str, Any]) -> Table:
    """Every score of the answers of base and tuned model, and their difference."""
    lines = [
        _line(name, [numbers[model][name] for model in ("base", "tuned")], change)
        for name, change in numbers["difference"].items()
    ]
    return Table("Scores of the answers", ("metric", "base", "tuned", "tuned \N{MINUS SIGN} base"), lines)


def groups(title: str, name: str, numbers: Sequence[Mapping[str, Any]]) -> Table:
    """The loss of base and adapter in each group of rows."""
    lines = [
        Line(
            group["name"] or "(none)",
            [
                Cell(f"{group['rows']:,}"),
                *(_cell(group[model], "loss") for model in ("base", "adapter")),
                _change(group["difference"], "loss"),
            ],
        )
        for group in numbers
    ]
    return Table(title, (name, "rows", "base", "adapter", DIFFERENCE), lines)


def _line(name: str, values: Sequence[Mapping[str, Any]], change: Mapping[str, Any] | None) -> Line:
    cells = [*(_cell(value, name) for value in values), _change(change, name) if change else Cell(NOTHING)]
    return Line(label(name), cells, _METRICS[name].meaning)


def _cell(numbers: Mapping[str, Any], name: str) -> Cell:
    found, digits = estimate(dict(numbers)), _METRICS[name].digits
    interval = (
        ""
        if found.low is None or found.high is None
        else f"[{words.number(found.low, digits)}, {words.number(found.high, digits)}]"
    )
    return Cell(words.number(found.value, digits), interval)


def _change(numbers: Mapping[str, Any], name: str) -> Cell:
    found, metric = estimate(dict(numbers)), _METRICS[name]
    value, _, interval = words.signed(found, metric.digits).partition(" ")
    if not metric.better:
        return Cell(value, interval)
    if found.is_noise:
        return Cell(value, interval, "no clear difference")
    return Cell(value, interval, "better" if found.value * metric.better > 0 else "worse")


def ledger(stage: str, numbers: Mapping[str, Mapping[str, Any]]) -> Ledger:
    """What became of the rows in a stage, by split; what is 0 in all of them is named only."""
    everywhere = numbers["all"]
    reasons = [name for name in everywhere if name.startswith("dropped_")]
    dropped = sum(everywhere[name] for name in reasons)
    told = [name for name in everywhere if any(numbers[split][name] for split in _SPLITS)]
    rest = [name for name in told if name not in ("rows_in", "rows_used") and name not in reasons]
    order = ["rows_in", *(name for name in reasons if name in told), "rows_used", *rest]
    lines = [Line(_count_name(name), [Cell(_count(numbers[split][name])) for split in _SPLITS]) for name in order]
    return Ledger(
        Table(
            f"{stage.capitalize()}: {everywhere['rows_in']:,} rows in = {everywhere['rows_used']:,} used "
            f"+ {dropped:,} dropped",
            ("count", *_SPLITS),
            lines,
        ),
        [_count_name(name) for name in everywhere if name not in order],
    )


def _count_name(name: str) -> str:
    reason = name.removeprefix("dropped_")
    return f"dropped: {reason.replace('_', ' ')}" if reason != name else name.replace("_", " ")


def _count(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else words.number(value)


def forgetting(numbers: Mapping[str, Any]) -> str:
    """One line on the loss on general text, before and after."""
    change, limit = estimate(numbers["groups"][0]["difference"]), numbers["limit"]
    if change.is_noise:
        verdict = "no clear change"
    else:
        verdict = "nothing forgotten" if change.value < 0 else "something was forgotten"
    bound = "" if limit is None else f"; the limit is {words.change(limit)}"
    return f"{verdict} on {numbers['rows']:,} general texts: loss {words.signed(change)}{bound}"


def words_of_merge(numbers: Mapping[str, Any], limit: float) -> str:
    """What the comparison of merged model, adapter and base showed."""
    return (
        f"{numbers['survival']:.2%} of the adapter's effect survives in the merged model, and at least {limit:.0%} "
        f"must: over {numbers['tokens']:,} tokens of {numbers['rows']:,} rows, its predictions of the next token are "
        f"{numbers['mean_divergence']:g} nats from the adapter's on average and {numbers['max_divergence']:g} at most "
        f"(KL divergence), the base model's {numbers['effect']:g}. Adapter and merged model choose the same token in "
        f"{numbers['same_choice']:.2%} of the places; their losses are {numbers['adapter_loss']:.4f} and "
        f"{numbers['merged_loss']:.4f}, the base model's {numbers['base_loss']:.4f}."
    )
