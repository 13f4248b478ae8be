"""The schemas that raw rows come in, and the way from each to a prepared row's content.

| Columns | become |
|---|---|
| `messages`, or ShareGPT's `conversations` | messages |
| all columns of `prepare.template` | prompt and completion by the template |
| `prompt`, `completion` | themselves; without a template, or given as turns, messages |
| `question`, `answer` | prompt and completion by the template; without one, messages |
| `instruction`, `output` (with `input`, if any; Alpaca) | the same, instruction and input together asking |
| `text` | text |

Messages take `system` and `tools` beside them, pairs that become messages `history` too. The first line of the table
that a file's first row fits is the file's schema, and every row of it must have that schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.schemas import messages
from stages.schemas.content import Content, Reading
from stages.schemas.media import refuse_marks, refuse_media
from stages.schemas.preferences import LABELS, Labels, Preferences, resolve_label, resolve_pair, truth_of
from stages.schemas.template import Template
from stages.schemas.text import holds, listed, text_of

Fields = Mapping[str, Any]

_BESIDE_TURNS = ("system", "tools", "functions")
_BESIDE_PAIRS = ("system", "history", "tools", "functions")


@dataclass(frozen=True)
class Schema:
    """A name, the columns that a row must have, those that it may have, and how its content is read."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields], Reading]

    def fits(self, fields: Fields) -> bool:
        return all(name in fields for name in self.required)

    def unread(self, fields: Fields) -> tuple[str, ...]:
        """The columns of a row that hold something which nobody reads."""
        names = (name for name in fields if name not in self.required and name not in self.optional)
        return tuple(name for name in names if holds(fields[name]))


class Schemas:
    """The schemas that rows may have under a template (None: the chat template serves all) and a map of column names.

    Raises:
        ValueError: see `Template`.
    """

    def __init__(
        self,
        template: str | None,
        columns: Mapping[str, str] | None = None,
        *,
        preferences: Preferences = "error",
        labels: Labels = "error",
    ) -> None:
        self.template = Template(template) if template is not None else None
        self._columns, self._preferences, self._labels = dict(columns or {}), preferences, labels
        # A column that the parameters name is used as they say, whatever it looks like.
        self._named = {*self._columns.values(), *(self.template.columns if self.template else ())}
        self._schemas = [
            Schema("messages", ("messages",), _BESIDE_TURNS, lambda row: messages.of_conversation(row, "messages")),
            Schema(
                "conversations",
                ("conversations",),
                _BESIDE_TURNS,
                lambda row: messages.of_conversation(row, "conversations"),
            ),
            Schema("prompt+completion", ("prompt", "completion"), _BESIDE_PAIRS, self._completion),
            Schema("question+answer", ("question", "answer"), _BESIDE_PAIRS, self._question),
            Schema("instruction+output", ("instruction", "output"), ("input", *_BESIDE_PAIRS), self._instruction),
            Schema("text", ("text",), (), lambda row: Reading({"text": text_of(row, "text")})),
        ]
        if self.template:
            optional = tuple(self.template.optional)
            required = tuple(name for name in dict.fromkeys(self.template.columns) if name not in optional)
            self._schemas.insert(2, Schema("+".join(required), required, (*optional, *_BESIDE_PAIRS), self._templated))

    def row(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The row with its columns called as `prepare.columns` says, its answer the one that is wanted.

        Raises:
            ValueError: it lacks a column of the map, holds more than text, or says which answers are wanted where the
                parameters do not say what to make of it.
            UnwantedError: its label says that it is not wanted.
        """
        fields = self._renamed(fields)
        refuse_media(fields, self._named)
        resolve_label(fields, self._labels, self._named)
        return resolve_pair(fields, self._preferences, self._named)

    def detect(self, fields: Fields) -> Schema:
        """The schema of a file whose first row this is.

        Raises:
            ValueError: its columns fit none, or not the template.
        """
        for schema in self._schemas:
            if schema.fits(fields):
                self._check_template(schema)
                return schema
        wanted = "; ".join(dict.fromkeys(", ".join(schema.required) for schema in self._schemas))
        raise ValueError(f"no known columns (it has: {listed(fields)}; wanted: {wanted}); map them in prepare.columns")

    def read(self, fields: Fields, schema: Schema) -> Reading:
        """A row's content, and the names of what it holds that nobody reads.

        Raises:
            ValueError: it has another schema, or a column that does not hold what it should.
            EmptyError: it holds no text.
        """
        if not schema.fits(fields):
            for other in self._schemas:
                if other.fits(fields):
                    hint = "part them into two files"
                    raise ValueError(f"mixed schemas: this row is {other.name}, the first one {schema.name}; {hint}")
        reading = schema.read(fields)
        if refuse_media(fields, self._named):
            refuse_marks(reading.content)
        columns = schema.unread(fields)
        if self._labels == "drop_false":
            columns = tuple(n for n in columns if n not in LABELS or truth_of(fields[n], self._labels) is None)
        return Reading(reading.content, (*columns, *reading.unread))

    def asked(self, fields: Fields) -> Content:
        """The question of a row of prompts, as `prompt` (the text to continue) or `messages`.

        Raises:
            ValueError: it has no column to ask with, or holds more than text.
        """
        refuse_media(fields, self._named)
        name = next((name for name in ("messages", "conversations") if name in fields), None)
        if name is None and isinstance(fields.get("prompt"), list):
            name = "prompt"
        if name is not None:
            return messages.of_conversation(fields, name).content
        if self.template and "prompt" not in self.template.columns and "prompt" in fields:
            return {"prompt": text_of(fields, "prompt")}
        if self.template:
            self._check_held(fields)
            return {"prompt": self.template.prompt(_translated(fields) | dict(fields))}
        name = next((name for name in ("prompt", "question", "instruction") if name in fields), "prompt")
        asked = _instruction_text(fields) if name == "instruction" else text_of(fields, name)
        return messages.of_pair(fields, asked, None).content

    def _renamed(self, fields: dict[str, Any]) -> dict[str, Any]:
        if not self._columns:
            return fields
        for name in self._columns.values():
            if name not in fields:
                raise ValueError(f"has no {name!r}, which prepare.columns names (it has: {listed(fields)})")
        taken = set(self._columns.values())
        rest = {name: value for name, value in fields.items() if name not in taken}
        return rest | {ours: fields[theirs] for ours, theirs in self._columns.items()}

    def _check_template(self, schema: Schema) -> None:
        if self.template is None or schema.name not in ("question+answer", "instruction+output"):
            return
        if missing := [name for name in self.template.columns if name not in _PAIR_NAMES]:
            raise ValueError(
                f"prepare.template wants {listed(missing)}, the rows are {schema.name}; "
                "change the template or map the columns in prepare.columns"
            )

    def _check_held(self, row: Fields) -> None:
        """Raise ValueError if the row has beside its pair what only messages could hold."""
        assert self.template is not None  # noqa: S101
        if lost := [name for name in _BESIDE_PAIRS if name not in self.template.columns and holds(row.get(name))]:
            raise ValueError(
                f"has {listed(lost)}, which prepare.template leaves out; set prepare.template: null for the chat "
                "template, or name the column in the template"
            )

    def _templated(self, row: Fields) -> Reading:
        assert self.template is not None  # noqa: S101
        if {"prompt", "completion"} <= set(self.template.columns) and _has_turns(row):
            return messages.of_prompt_and_completion(row)
        return Reading(self._by_template(row, row))

    def _by_template(self, row: Fields, pair: Fields) -> Content:
        assert self.template is not None  # noqa: S101
        self._check_held(row)
        return {"prompt": self.template.prompt(pair), "completion": self.template.completion(pair)}

    def _completion(self, row: Fields) -> Reading:
        if _has_turns(row):
            return messages.of_prompt_and_completion(row)
        prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
        if self.template is None:
            return messages.of_pair(row, prompt, completion)
        self._check_held(row)
        return Reading({"prompt": prompt, "completion": completion})

    def _question(self, row: Fields) -> Reading:
        return self._pair(row, text_of(row, "question"), text_of(row, "answer"))

    def _instruction(self, row: Fields) -> Reading:
        return self._pair(row, _instruction_text(row), text_of(row, "output"))

    def _pair(self, row: Fields, question: str, answer: str) -> Reading:
        if self.template is None:
            return messages.of_pair(row, question, answer)
        return Reading(self._by_template(row, _pair_names(question, answer)))


# What a template may call the two sides of a pair, whatever the file calls them.
_ASKING, _ANSWERING = ("question", "prompt", "instruction"), ("answer", "completion", "output")
_PAIR_NAMES = (*_ASKING, *_ANSWERING, "input")


def _pair_names(question: str, answer: str) -> dict[str, str]:
    return {**dict.fromkeys(_ASKING, question), "input": "", **dict.fromkeys(_ANSWERING, answer)}


def _has_turns(row: Fields) -> bool:
    return any(isinstance(row.get(name), list | Mapping) for name in ("prompt", "completion"))


def _instruction_text(row: Fields) -> str:
    """Alpaca's instruction and, where there is one, its input below."""
    instruction = text_of(row, "instruction")
    return f"{instruction}\n\n{text_of(row, 'input')}" if holds(row.get("input")) else instruction


def _translated(row: Fields) -> dict[str, Any]:
    """A question under all the names that a template may call it."""
    if "instruction" in row:
        return _pair_names(_instruction_text(row), "")
    name = next((name for name in _ASKING if name in row), None)
    return dict.fromkeys(_ASKING, row[name]) if name else {}
