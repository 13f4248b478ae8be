"""The shapes that raw rows come in, and the way from each to a prepared row's content.

| Columns | become |
|---|---|
| `messages`, or ShareGPT's `conversations` (with `tools`, if any) | messages |
| all columns of `prepare.template` | prompt and completion by the template |
| `prompt`, `completion` | themselves; without a template, two messages |
| `question`, `answer` | prompt and completion by the template; without one, two messages |
| `instruction`, `output` (with `input`, if any; Alpaca) | the same, instruction and input together asking |
| `text` | text |

The first line of the table that a file's first row fits is the file's shape, and every row of it must have that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.schemas.content import Content
from stages.schemas.conversation import messages_of, parsed
from stages.schemas.template import EmptyError, Template, listed, text_of

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """A name, the columns that a row must have, and what makes content of it."""

    name: str
    columns: tuple[str, ...]
    content: Callable[[Fields], Content]


class Shapes:
    """What rows can look like under a template (None: the chat template serves all) and a map of column names.

    Raises:
        ValueError: see `Template`.
    """

    def __init__(self, template: str | None, columns: Mapping[str, str] | None = None) -> None:
        self.template = Template(template) if template is not None else None
        self.columns = dict(columns or {})
        self._shapes = [
            Shape("messages", ("messages",), lambda row: _conversation(row, "messages")),
            Shape("conversations", ("conversations",), lambda row: _conversation(row, "conversations")),
            Shape("prompt+completion", ("prompt", "completion"), self._completion),
            Shape("question+answer", ("question", "answer"), lambda row: self._pair(_question(row))),
            Shape("instruction+output", ("instruction", "output"), lambda row: self._pair(_instruction(row))),
            Shape("text", ("text",), lambda row: {"text": text_of(row, "text")}),
        ]
        if self.template:
            required = tuple(
                name for name in dict.fromkeys(self.template.columns) if name not in self.template.optional
            )
            self._shapes.insert(2, Shape("+".join(required), required, self._templated))

    def renamed(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The row with its columns called as `prepare.columns` says.

        Raises:
            ValueError: it lacks a column of the map.
        """
        if not self.columns:
            return fields
        for name in self.columns.values():
            if name not in fields:
                raise ValueError(f"has no {name!r}, which prepare.columns names (it has: {listed(fields)})")
        taken = set(self.columns.values())
        rest = {name: value for name, value in fields.items() if name not in taken}
        return rest | {ours: fields[theirs] for ours, theirs in self.columns.items()}

    def detect(self, fields: Fields) -> Shape:
        """The shape of a file whose first row this is.

        Raises:
            ValueError: its columns fit none, or not the template.
        """
        for shape in self._shapes:
            if fields.keys() >= set(shape.columns):
                self._check_template(shape)
                return shape
        wanted = "; ".join(", ".join(shape.columns) for shape in self._shapes)
        raise ValueError(f"no known columns (it has: {listed(fields)}; wanted: {wanted}); map them in prepare.columns")

    def content(self, fields: Fields, shape: Shape) -> Content:
        """A row's content.

        Raises:
            ValueError: it has another shape, or a column that does not hold what it should.
            EmptyError: it holds no text.
        """
        if not fields.keys() >= set(shape.columns):
            for other in self._shapes:
                if fields.keys() >= set(other.columns):
                    mend = "part them into two files"
                    raise ValueError(f"mixed shapes: this row is {other.name}, the first one {shape.name}; {mend}")
        return shape.content(fields)

    def asked(self, fields: Fields) -> Content:
        """What a row of prompts asks: `prompt` (the text to continue) or `messages`.

        Raises:
            ValueError: it has no column to ask with.
        """
        if "messages" in fields or "conversations" in fields:
            return _conversation(fields, "messages" if "messages" in fields else "conversations")
        if self.template and "prompt" not in self.template.columns and "prompt" in fields:
            return {"prompt": text_of(fields, "prompt")}
        if self.template:
            return {"prompt": self.template.prompt(_translated(fields) | dict(fields))}
        name = next((name for name in ("prompt", "question", "instruction") if name in fields), "prompt")
        asked = _instruction_text(fields) if name == "instruction" else text_of(fields, name)
        return {"messages": [{"role": "user", "content": asked}]}

    def _check_template(self, shape: Shape) -> None:
        if self.template is None or shape.name not in ("question+answer", "instruction+output"):
            return
        if missing := [name for name in self.template.columns if name not in _PAIR_NAMES]:
            raise ValueError(
                f"prepare.template wants {listed(missing)}, the rows are {shape.name}; "
                "change the template or map the columns in prepare.columns"
            )

    def _templated(self, row: Fields) -> Content:
        assert self.template is not None  # noqa: S101  the shape exists only with a template
        return _by(self.template, row)

    def _completion(self, row: Fields) -> Content:
        if self.template is None:
            return _turns(text_of(row, "prompt"), text_of(row, "completion"))
        return {"prompt": text_of(row, "prompt"), "completion": text_of(row, "completion")}

    def _pair(self, pair: tuple[str, str]) -> Content:
        if self.template is None:
            return _turns(*pair)
        return _by(self.template, _pair_names(*pair))


# What a template may call the two sides of a pair, whatever the file calls them.
_ASKING, _ANSWERING = ("question", "prompt", "instruction"), ("answer", "completion", "output")
_PAIR_NAMES = (*_ASKING, *_ANSWERING, "input")


def _pair_names(question: str, answer: str) -> dict[str, str]:
    return {**dict.fromkeys(_ASKING, question), "input": "", **dict.fromkeys(_ANSWERING, answer)}


def _question(row: Fields) -> tuple[str, str]:
    return text_of(row, "question"), text_of(row, "answer")


def _instruction(row: Fields) -> tuple[str, str]:
    return _instruction_text(row), text_of(row, "output")


def _instruction_text(row: Fields) -> str:
    """Alpaca's instruction and, where there is one, its input below."""
    instruction = text_of(row, "instruction")
    if row.get("input") in (None, ""):
        return instruction
    try:
        return f"{instruction}\n\n{text_of(row, 'input')}"
    except EmptyError:
        return instruction


def _translated(row: Fields) -> dict[str, Any]:
    """A question under all the names that a template may call it."""
    if "instruction" in row:
        return _pair_names(_instruction_text(row), "")
    name = next((name for name in _ASKING if name in row), None)
    return dict.fromkeys(_ASKING, row[name]) if name else {}


def _by(template: Template, row: Fields) -> Content:
    return {"prompt": template.prompt(row), "completion": template.completion(row)}


def _turns(question: str, answer: str) -> Content:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _conversation(row: Fields, name: str) -> Content:
    content: Content = {"messages": messages_of(row.get(name), name)}
    tools = parsed(row.get("tools") or None, "tools")
    if tools is not None:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError("'tools' must be a list of objects")
        content["tools"] = tools
    return content
