"""Answers to prompts, which come as token ids: many at once in one batch, or one as a stream.

Both take the options of `generate` in params.yaml, and give the same text at temperature 0.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.utils import load_tokenizer

from stages.decoding.sampling import penalties_of, sampler_of
from stages.decoding.stopping import AnswerText, ended


@dataclass(frozen=True)
class Answer:
    """The text without the token or the stop string that ended it.

    `stopped` tells whether there was one before the limit was reached; `tokens` counts a stop string's, too.
    """

    text: str
    tokens: int
    stopped: bool


@dataclass
class _Growing:
    """An answer in the making: its tokens, and its text if stop strings are looked for."""

    detokenizer: Any
    text: AnswerText
    shown: str = ""
    tokens: list[int] = field(default_factory=list)

    def add(self, token: int) -> bool:
        """Take a token; True if a stop string came with it."""
        self.tokens.append(token)
        if self.detokenizer is None:
            return False
        self.detokenizer.add_token(token)
        self.shown += self.text.feed(self.detokenizer.last_segment)
        return self.text.stopped

    def end(self, tokenizer: Any) -> str:
        """The whole text."""
        if self.detokenizer is None:
            return ended(tokenizer.decode(self.tokens)).strip()
        self.detokenizer.finalize()
        self.shown += self.text.feed(self.detokenizer.last_segment)
        return self.shown if self.text.stopped else self.shown + self.text.end()


def load_decoder(
    directory: Path, config: dict[str, Any], *, chat_template: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The directory's tokenizer in mlx-lm's wrapper, which knows every token that ends an answer.

    A `chat_template` takes the place of the tokenizer's own: it tells how a model writes thoughts and tool calls.
    """
    extra = {"trust_remote_code": trust_remote_code} | ({"chat_template": chat_template} if chat_template else {})
    return load_tokenizer(directory, extra, eos_token_ids=config.get("eos_token_id"))


def answer_all(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    **penalties: Any,
) -> Iterator[tuple[int, Answer]]:
    """Each prompt's index and answer, as they finish; up to `batch_size` are worked on at a time."""
    mx.random.seed(seed)
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(tokenizer.eos_token_ids)],
        sampler=sampler_of(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p),
        logits_processors=penalties_of(**penalties),
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
    )
    uids = generator.insert([list(prompt) for prompt in prompts], [max_tokens] * len(prompts))
    growing = {uid: _Growing(tokenizer.detokenizer if stop else None, AnswerText(stop)) for uid in uids}
    try:
        while responses := generator.next_generated():
            for response in responses:
                answer, reason = growing[response.uid], response.finish_reason
                if reason != "stop" and answer.add(response.token):
                    if reason is None:
                        generator.remove([response.uid])
                    reason = "stop"
                if reason is not None:
                    text = growing.pop(response.uid).end(tokenizer)
                    yield uids.index(response.uid), Answer(text, len(answer.tokens), reason == "stop")
    finally:
        generator.close()


def stream_tokens(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    cache: list[Any] | None = None,
    cached: Sequence[int] = (),
    **penalties: Any,
) -> Generator[tuple[str, int], None, None]:
    """Each token of the answer to one prompt, with the text that may be shown when it has come.

    A `cache` holds the tokens `cached`, which precede the prompt; it comes to hold the prompt and each token yielded.
    """
    mx.random.seed(seed)
    text = AnswerText(stop)
    responses = stream_generate(
        model,
        tokenizer,
        list(prompt),
        max_tokens=max_tokens,
        sampler=sampler_of(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p),
        logits_processors=penalties_of(**penalties, before=cached),
        prompt_cache=cache,
    )
    for response in responses:
        piece = text.feed(response.text)
        if response.finish_reason is not None and not text.stopped:
            piece += text.end()
        yield piece, response.token
        if text.stopped:
            return
