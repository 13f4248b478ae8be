"""Read params.yaml and check it against the schema.

`load_params(path, overrides)` reads the file (YAML 1.2, so `5e-05` is a number), lays the `--set key=value`
overrides over it and checks everything at once. A mistake is reported with its dotted path and its line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import pydantic
from ruamel.yaml import YAML, YAMLError

from stages.params.schema import Params

PARAMS_FILE = Path("params.yaml")


class ParamsError(ValueError):
    """An error that names everything wrong with the parameters, one line each."""


def load_params(path: Path = PARAMS_FILE, overrides: Sequence[str] = ()) -> Params:
    """Read and check the parameters; each override is `section.key=value`, its value written as in YAML.

    Raises:
        ParamsError: the file is missing or no YAML, an override is malformed, or values break the schema.
    """
    tree = _read(path)
    overridden = {_override(tree, text): text for text in overrides}
    try:
        return Params.model_validate(_plain(tree))
    except pydantic.ValidationError as error:
        lines = [_describe(problem, tree, path, overridden) for problem in error.errors()]
        raise ParamsError("\n".join(lines)) from None


def _read(path: Path) -> Any:
    try:
        tree = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run in the project's folder or name it with --params") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ParamsError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not isinstance(tree, dict):
        raise ParamsError(f"{path}: must hold sections such as 'model:' and 'train:'")
    return tree


def _override(tree: Any, text: str) -> str:
    """Put one `section.key=value` into the tree; return its dotted path."""
    dotted, equals, value = text.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not key:
        raise ParamsError(f"--set {text}: write it as section.key=value")
    node = tree
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ParamsError(f"--set {text}: there is no section {section!r}{_nearest(section, tree)}")
    try:
        node[key] = YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise ParamsError(f"--set {text}: {value!r} is not a YAML value; quote it") from None
    return dotted.strip()


def _plain(node: Any) -> Any:
    """ruamel's round-trip containers and scalars as plain Python, for pydantic's strict types."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _describe(problem: Any, tree: Any, path: Path, overridden: dict[str, str]) -> str:
    """Write one pydantic error as `file:line: dotted.path: what`, or `--set dotted.path=value: what`."""
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location)
    where = f"{path}:{_line(tree, location)}: {dotted}"
    for path_set, text in overridden.items():
        if f"{dotted}.".startswith(f"{path_set}."):
            where = f"--set {text}"
    return f"{where}: {_reason(problem, tree, location)}"


def _reason(problem: Any, tree: Any, location: list[str]) -> str:
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(location[-1], _fields(location[:-1]))}"
    if kind == "missing":
        return "missing; add it"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    message = message.replace("input should be", "must be")
    return f"{message}, not {given!r}" if not isinstance(given, dict | list) else message


def _fields(sections: Iterable[str]) -> Iterable[str]:
    """The keys that the schema allows in a section."""
    model: Any = Params
    for section in sections:
        if not section.isdigit():  # a place in a list
            model = _model_in(model.model_fields[section].annotation)
    return model.model_fields


def _model_in(annotation: Any) -> Any:
    """The section that a type like `list[Section] | None` is made of."""
    while not hasattr(annotation, "model_fields"):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _nearest(key: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known here: {', '.join(known)}"


def _line(tree: Any, location: list[str]) -> int:
    """The line of the deepest part of `location` that is in the file."""
    line = 1
    node: Any = tree
    for part in location:
        if isinstance(node, dict) and part in node:
            places = node.lc  # type: ignore[attr-defined]
            line = places.key(part)[0] + 1 if part in (places.data or {}) else line
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            # The list of an override stands in no file.
            line = node.lc.item(int(part))[0] + 1 if hasattr(node, "lc") else line
            node = node[int(part)]
        else:
            break
    return line
