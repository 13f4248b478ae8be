"""The report's page: one HTML file with its own style, script and charts. The same inputs give the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from stages.reporting import charts, vega
from stages.results import words
from stages.results.summary import MODELS, estimate, label

_TEMPLATE = "page.html.j2"
_MEANINGS = {
    "loss": "mean negative log-likelihood of a token, in nats: lower is better",
    "perplexity": "e to the power of the loss: lower is better",
    "bits per byte": "the loss by the text's bytes: comparable between tokenizers",
    "token accuracy": "share of tokens that the model would have chosen itself",
    "exact match": "share of answers that are the reference, character for character",
    "normalized match": "the same, but for case, width, punctuation and white space",
    "chrF": "overlap of short runs of characters with the reference, 0 to 100",
    "ROUGE-L": "longest common sequence of words (in Korean, of syllables), 0 to 1",
    "repetition": "share of four words (syllables) in a row that the answer said before",
    "tokens": "length of an answer",
    "stopped": "share of answers that ended by themselves, before the limit",
    "parses": "share of answers that are valid in the references' format",
}


@dataclass(frozen=True)
class Run:
    """What a run made, as read from its files. `details` are the numbers of each stage by its name."""

    details: Mapping[str, Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    answers: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, str]]
    curves: Mapping[str, Sequence[dict[str, Any]]]  # loss, valid_loss, lengths
    base: Mapping[str, Any]
    params: Mapping[str, Any]
    versions: Mapping[str, str]
    hashes: Mapping[str, str]  # path → sha256


def page(run: Run) -> str:
    """The HTML of a run's report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": _signed,
        "interval": _interval,
        "number": words.number,
        "label": label,
        "unbroken": _unbroken,
        "change": words.change,
    }
    found = run.details["evaluate"]
    return environment.get_template(_TEMPLATE).render(
        run=run,
        found=found,
        models=MODELS,
        meanings=_MEANINGS,
        answers=_answers(run),
        ledger=_ledger(run.details),
        params=_flat(run.params),
        charts=_embedded(_charts(run)),
        vega=vega.script(),
    )


def _charts(run: Run) -> dict[str, Any]:
    trained = run.details["train"]
    changes = [
        {"source": row["source"], "change": (row["adapter_loss"] - row["base_loss"]) / row["tokens"]}
        for row in run.rows
    ]
    return {
        "changes": charts.changes(changes),
        "losses": charts.losses(
            run.curves["loss"], run.curves["valid_loss"], trained.get("kept_step", trained["steps"])
        ),
        "lengths": charts.lengths(run.curves["lengths"]),
    }


def _embedded(content: Any) -> str:
    """JSON that may stand in a script element: no text in it can end the element."""
    return json.dumps(content, ensure_ascii=False, sort_keys=True).replace("<", "\\u003c")


def _answers(run: Run) -> list[dict[str, Any]]:
    """The answers, each with its gain in chrF and its row's change in loss."""
    changes = {row["id"]: (row["adapter_loss"] - row["base_loss"]) / row["tokens"] for row in run.rows}
    return [
        {**answer, "gain": answer["tuned_chrf"] - answer["base_chrf"], "change": changes[answer["id"]]}
        for answer in run.answers
    ]


def _ledger(details: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, list[Any]]]]]:
    """Of each of the stages that take rows: its counts by split, without those that are 0 everywhere."""
    splits = ("train", "valid", "test", "all")
    ledger = []
    for stage in ("prepare", "tokenize"):
        counts = details[stage]
        names = [name for name in counts["all"] if any(counts[split][name] for split in splits)]
        ledger.append((stage, [(name.replace("_", " "), [counts[split][name] for split in splits]) for name in names]))
    return ledger


def _flat(params: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`section.key` → value as YAML's readers write it."""
    flat = []
    for section, part in params.items():
        keys = {f"{section}.{key}": value for key, value in part.items()} if isinstance(part, dict) else {section: part}
        flat += [(key, json.dumps(value, ensure_ascii=False)) for key, value in keys.items()]
    return flat


def _signed(numbers: Mapping[str, Any]) -> str:
    return words.signed(estimate(dict(numbers)))


def _unbroken(text: str) -> str:
    """A text whose intervals stay on one line."""
    return re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def _interval(numbers: Mapping[str, Any]) -> str:
    found = estimate(dict(numbers))
    if found.low is None or found.high is None:
        return ""
    return f"[{words.number(found.low)}, {words.number(found.high)}]"
