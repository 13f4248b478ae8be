"""The report's page: one HTML file with its own style, script and charts. The same run gives the same bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from stages.reporting import charts, tables, text, vega
from stages.reporting.inputs import Run
from stages.results import words

_FOLDER = Path(__file__).parent


def page(run: Run) -> str:
    """The HTML of a run's report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "language": text.language,
        "is_code": text.is_code,
        "unbroken": _unbroken,
        "change": words.change,
        "number": words.number,
    }
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    scripts = [vega.script(), script]
    numbers, drawn = run.details["evaluate"], _charts(run)
    return environment.get_template("page.html.j2").render(
        run=run,
        numbers=numbers,
        forgetting=tables.forgetting(numbers["forgetting"]),
        scores=tables.metrics(numbers),
        general=tables.groups("General text", "text", numbers["forgetting"]["groups"]),
        answer_scores=numbers["answers"] and tables.answers(numbers["answers"]),
        answers=_answers(run),
        ledgers=[tables.ledger(stage, run.details[stage]) for stage in ("prepare", "tokenize")],
        merge=tables.words_of_merge(run.details["merge"], run.params["merge"]["min_survival"]),
        params=_flat(run.params),
        charts=drawn,
        specs={name: chart.spec for name, chart in drawn.items()},
        style=style,
        scripts=scripts,
        hashes=[_policy_hash(each) for each in scripts],
    )


def _shown(value: Any) -> Any:
    # What has __html__ is HTML already: a macro's output, and what `safe` and `tojson` give.
    return text.visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _policy_hash(script: str) -> str:
    """The name of a script in a Content-Security-Policy: no other script runs."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _unbroken(sentence: str) -> str:
    """A text whose intervals stay on one line."""
    return re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), sentence)


def _charts(run: Run) -> dict[str, charts.Chart]:
    """The charts by name; those without a number to show are left out."""
    numbers, trained = run.details["evaluate"], run.details["train"]
    made = [
        charts.changes(
            [(row["adapter_loss"] - row["base_loss"]) / row["tokens"] for row in run.rows],
            better=numbers["difference"]["rows_better"],
            worse=numbers["difference"]["rows_worse"],
        ),
        charts.losses(run.losses, run.valid_losses, trained.get("kept_step", trained["steps"])),
        charts.lengths(run.lengths, run.params["tokenize"]["max_length"]),
    ]
    if slices := numbers["slices"]:
        table = tables.groups(f"Test rows by {slices['by']}", slices["by"], slices["groups"])
        made.append(charts.slices(slices["by"], slices["groups"], table))
    return {chart.name: chart for chart in made}


def _answers(run: Run) -> list[Mapping[str, Any]]:
    """The answers, each with what it gained in chrF and what its row gained in loss: more is better."""
    gains = {row["id"]: (row["base_loss"] - row["adapter_loss"]) / row["tokens"] for row in run.rows}
    return [
        {**answer, "chrf_gain": answer["tuned_chrf"] - answer["base_chrf"], "loss_gain": gains[answer["id"]]}
        for answer in run.answers
    ]


def _flat(params: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Section → key → value; a key without a section stands under an empty one."""
    sections: dict[str, dict[str, str]] = {}
    for name, part in params.items():
        section, values = (name, part) if isinstance(part, dict) else ("", {name: part})
        sections.setdefault(section, {}).update({key: _value(value) for key, value in values.items()})
    return sections


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
