"""A row of prompts, or a user's words → the tokens that a model is to continue, just as training rendered them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.params import schema
from stages.schemas import normalize
from stages.schemas.schemas import Schemas
from stages.templating.strings import Message, without_thought
from stages.templating.template import ChatTemplate
from stages.templating.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Prompt:
    """The text to continue, and its tokens."""

    text: str
    ids: list[int]


class Prompts:
    """Makes prompts with the tokenizer and the parameters that training rows were rendered by."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None,
        columns: Mapping[str, str],
        normalize: normalize.Form | None,
        options: schema.Tokenize,
    ) -> None:
        self._schemas, self._columns, self._form, self._options = Schemas(template), columns, normalize, options
        self._tokenizer = TextTokenizer(tokenizer)
        self._chat = ChatTemplate(tokenizer, options.chat_template, date=options.date, control=self._tokenizer.control)

    @classmethod
    def under(cls, params: schema.Params, tokenizer: Any) -> Prompts:
        """Prompts under params.yaml."""
        prepare = params.prepare
        return cls(
            tokenizer,
            template=prepare.template,
            columns=prepare.columns,
            normalize=prepare.normalize,
            options=params.tokenize,
        )

    def ask(self, fields: Mapping[str, Any], place: str) -> Prompt:
        """The prompt of a row of a file.

        Raises:
            ValueError: it has none; the message begins with its place.
        """
        try:
            return self.of_row(fields)
        except ValueError as error:
            raise ValueError(f"{place}: {error}; correct the row or prepare.template") from None

    def of_row(self, fields: Mapping[str, Any]) -> Prompt:
        """The prompt of a row with the template's columns before the answer, `prompt` (text to continue) or `messages`.

        Raises:
            ValueError: it has none of them, or the chat template rejects it.
        """
        renamed = dict(fields) | {ours: fields[theirs] for ours, theirs in self._columns.items() if theirs in fields}
        asked = normalize.normalized(self._schemas.asked(renamed), self._form)
        if "messages" in asked:
            return self._of_turns(asked["messages"], asked.get("tools"))
        return self._of_text(asked["prompt"])

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
        return self.of_text(words)

    @property
    def by_template(self) -> bool:
        """True if prepare.template asks, False if the chat template does."""
        return self._schemas.template is not None

    def of_conversation(self, fields: Mapping[str, Any]) -> Prompt:
        """The prompt of `messages`, perhaps with `tools`; under prepare.template that of the last question alone.

        Raises:
            ValueError: they are no messages, the last is no question, or the chat template rejects them.
        """
        if not self.by_template:
            return self.of_row(fields)
        messages = self._schemas.asked(fields)["messages"]
        if messages[-1]["role"] != "user":
            raise ValueError(f"the last message is the {messages[-1]['role']}'s; prepare.template wants a question")
        return self.of_words(messages[-1]["content"])

    def of_text(self, text: str) -> Prompt:
        """The prompt that is a text to continue."""
        return self._of_text(normalize.normalized(text, self._form))

    def _of_turns(self, messages: list[Message], tools: list[Any] | None) -> Prompt:
        if self._options.thoughts == "drop":
            messages = [without_thought(message) for message in messages]
        hidden = self._hides([messages, tools])
        if hidden:
            messages, tools = self._tokenizer.control.hide([messages, tools])
        text = self._chat.ask(messages, tools)
        ids = self._tokenizer.prompt_ids(text, rendered=True, hidden=hidden)
        return Prompt(self._tokenizer.control.show(text) if hidden else text, ids)

    def _of_text(self, text: str) -> Prompt:
        hidden = self._tokenizer.hide_control(text) if self._hides(text) else text
        return Prompt(text, self._tokenizer.prompt_ids(hidden, rendered=False, hidden=hidden != text))

    def _hides(self, value: Any) -> bool:
        """True if control tokens in these strings are to be text.

        Raises:
            ValueError: there are some, and params.yaml makes that an error.
        """
        token = self._tokenizer.control.spelled(value) if self._options.special_in_content != "allow" else None
        if token and self._options.special_in_content == "error":
            raise ValueError(f"spells the control token {token}, which tokenize.special_in_content makes an error")
        return token is not None
