"""Write docs/parameters.md: `python -m docs.make_parameters`, or `make docs`.

Keys, defaults and comments come from params.yaml, types and allowed values from stages/params/schema.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.params.schema import Params

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "parameters.md"

_HEAD = """# Parameters

This page is made from `params.yaml` and `stages/params/schema.py` by `make docs`. Do not edit it.

Change a value in `params.yaml`, or for one run: `python -m stages.train --set train.iters=100`, or for an experiment:
`dvc exp run -S train.iters=100`. [Experiments](experiments.md) tells which stages run again.
"""
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {"integer": "whole number", "number": "number", "string": "text"}


def page() -> str:
    """The page's text."""
    tree = YAML(typ="rt").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    schema = Params.model_json_schema()
    single, sections = [], []
    for name, value in tree.items():
        field = schema["properties"][name]
        if "$ref" not in field:
            single.append(_row(name, value, field, comment(tree, name)))
            continue
        fields = _inlined(field, schema["$defs"])["properties"]
        rows = [_row(f"{name}.{key}", inner, fields[key], comment(value, key)) for key, inner in value.items()]
        sections.append("\n".join([f"\n## {name}\n", *_lead(comment(tree, name)), *_table(rows)]))
    return "\n".join([_HEAD, *_table(single), *sections]) + "\n"


def _inlined(field: Any, definitions: dict[str, Any]) -> Any:
    """A part of a JSON schema, with definitions in place of the references to them."""
    if isinstance(field, list):
        return [_inlined(each, definitions) for each in field]
    if not isinstance(field, dict):
        return field
    if "$ref" in field:
        return _inlined(definitions[field["$ref"].split("/")[-1]], definitions)
    return {key: _inlined(each, definitions) for key, each in field.items()}


def comment(section: Any, key: str) -> str:
    """The comment behind a key of params.yaml, or under it and indented; "" if there is none."""
    token = (section.ca.items.get(key) or [None] * 3)[2]
    if token is None:
        return ""
    own = token.value.split("\n\n")[0]  # a comment after a blank line belongs to the next key
    return " ".join(line.strip().lstrip("#").strip() for line in own.splitlines()).strip()


def _lead(text: str) -> Iterator[str]:
    if text:
        yield f"{text[0].upper()}{text[1:]}.\n"


def _table(rows: list[str]) -> list[str]:
    return ["| key | default | values | meaning |", "|---|---|---|---|", *rows]


def _row(key: str, default: Any, field: dict[str, Any], meaning: str) -> str:
    cells = [f"`{key}`", f"`{_as_yaml(default)}`", _values(field), meaning]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _as_yaml(value: Any) -> str:
    """A value as one would write it in params.yaml."""
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, str) and re.fullmatch(r"[\w.-]+", value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _values(field: dict[str, Any]) -> str:
    """Type and limits of a field of the JSON schema, in words."""
    if "anyOf" in field:
        return " or ".join(_values(each) for each in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{each}`" for each in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field["type"]
    if kind == "boolean":
        return "`true`, `false`"
    if kind == "null":
        return "`null`"
    if kind == "object":
        inner = ", ".join(f"{name} ({_values(each)})" for name, each in field.get("properties", {}).items())
        return f"map of {inner or 'names to names'}"
    if kind == "array":
        return f"list of: {_values(field['items'])}"
    limits = [f"{sign} {field[name]}" for name, sign in _LIMITS.items() if name in field]
    return f"{_TYPES[kind]} {', '.join(limits)}".strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
