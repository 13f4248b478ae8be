"""A conversation with a model: its turns, and the cache that saves computing again what the model has read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from stages.decoding.decode import stream_tokens
from stages.params import schema
from stages.schemas.text import is_blank
from stages.serving.models import Models


@dataclass
class _Read:
    """What a model has read: a cache, and the tokens that are in it."""

    cache: list[Any]
    tokens: list[int] = field(default_factory=list)


class Conversation:
    """Turns of a user and a model.

    Under prepare.template each question is asked alone; by a chat template the conversation grows. Each model has a
    cache of its own: what one has read, another has not. `computed` counts the prompt's tokens that the last answer
    had to compute.
    """

    def __init__(self, models: Models, options: schema.Generate) -> None:
        self._models = models
        self._options = options.model_dump(exclude={"batch_size"})
        self._read: dict[str, _Read] = {}
        self.messages: list[dict[str, str]] = []
        self.computed = 0

    def clear(self) -> None:
        """Forget all turns."""
        self.messages, self._read = [], {}

    def ask(self, words: str, *, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer to the next question, piece by piece, until `stopped` says so.

        Question and answer become turns of the conversation, unless the answer is blank.

        Raises:
            ValueError: the chat template rejects the turns, or they are longer than the model's context.
        """
        turns = [*self.messages, {"role": "user", "content": words}]
        pieces = []
        for piece in self._answer(turns, stopped):
            pieces.append(piece)
            yield piece
        answer = "".join(pieces)
        # A turn of nothing is none that a conversation can go on from.
        if not is_blank(answer):
            self.messages = [*turns, {"role": "assistant", "content": answer}]

    def ask_again(self, name: str, *, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """What another model answers to the last question; the conversation stays as it is.

        Raises:
            ValueError: nothing has been asked, or there is no such model.
        """
        if not self.messages:
            raise ValueError("nothing has been asked yet")
        before = self._models.name
        self._models.switch(name)
        try:
            yield from self._answer(self.messages[:-1], stopped)
        finally:
            self._models.switch(before)

    def _answer(self, turns: list[dict[str, str]], stopped: Callable[[], bool]) -> Iterator[str]:
        ids = self._models.prompts.of_conversation({"messages": turns}).ids
        self._models.check_length(len(ids))
        # Until the answer is whole, nobody knows what its cache holds.
        read = self._shared(self._read.pop(self._models.name, None), ids)
        self.computed = len(ids) - len(read.tokens)
        options = self._options
        if (most := self._models.context_tokens) is not None:
            options = options | {"max_tokens": min(options["max_tokens"], most - len(ids))}
        tokens = stream_tokens(
            self._models.model,
            self._models.decoder,
            ids[len(read.tokens) :],
            cache=read.cache,
            cached=read.tokens,
            **options,
        )
        said: list[int] = []
        for piece, token in tokens:
            said.append(token)
            if piece:
                yield piece
            if stopped():
                tokens.close()
        self._read[self._models.name] = _Read(read.cache, [*ids, *said])

    def _shared(self, read: _Read | None, ids: list[int]) -> _Read:
        """What has been read of a prompt, all but its last token at most; the rest is cut off the cache."""
        if read is not None:
            pairs = zip(read.tokens, ids[:-1], strict=False)
            same = next((place for place, (old, new) in enumerate(pairs) if old != new), None)
            same = min(len(read.tokens), len(ids) - 1) if same is None else same
            surplus = len(read.tokens) - same
            if same and (not surplus or can_trim_prompt_cache(read.cache)):
                trim_prompt_cache(read.cache, surplus)
                return _Read(read.cache, ids[:same])
        return _Read(make_prompt_cache(self._models.model))
