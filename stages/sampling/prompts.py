"""A row of prompts, or a user's words → the tokens that a model is to continue, just as training rendered them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.chat.template import ChatTemplate
from stages.chat.tokenizer import TextTokenizer
from stages.schemas import normalize
from stages.schemas.schemas import Schemas


@dataclass(frozen=True)
class Prompt:
    """The text to continue, and its tokens."""

    text: str
    ids: list[int]


class Prompts:
    """What makes prompts: the tokenizer, and of params.yaml what training rows were rendered by."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None,
        columns: Mapping[str, str],
        normalize: normalize.Form | None,
        chat_template: str | None,
    ) -> None:
        self._schemas, self._columns, self._form = Schemas(template), columns, normalize
        self._chat, self._tokenizer = ChatTemplate(tokenizer, chat_template), TextTokenizer(tokenizer)

    def of_row(self, fields: Mapping[str, Any]) -> Prompt:
        """The prompt of a row with the template's columns before the answer, `prompt` (text to continue) or `messages`.

        Raises:
            ValueError: it has none of them, or the chat template rejects it.
        """
        renamed = dict(fields) | {ours: fields[theirs] for ours, theirs in self._columns.items() if theirs in fields}
        asked = normalize.normalized(self._schemas.asked(renamed), self._form)
        if "messages" in asked:
            text = self._chat.render(asked["messages"], asked.get("tools"), ask=True)
            return Prompt(text, self._tokenizer.prompt_ids(text, rendered=True))
        return Prompt(asked["prompt"], self._tokenizer.prompt_ids(asked["prompt"], rendered=False))

    def of_words(self, words: str) -> Prompt:
        """The prompt that asks a user's words: in the template's one column before the answer, or by the chat template.

        Where the template has several such columns or none, the words are the text to continue.
        """
        template = self._schemas.template
        if template is None:
            return self.of_row({"prompt": words})
        columns = {name for name in template.columns[:-1] if name not in template.optional}
        if len(columns) == 1:
            return self.of_row({columns.pop(): words})
        text = normalize.normalized(words, self._form)
        return Prompt(text, self._tokenizer.prompt_ids(text, rendered=False))
