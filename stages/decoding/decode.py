"""Answers to prompts, which come as token ids: many at once in one batch, or one as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_tokenizer


@dataclass(frozen=True)
class Answer:
    """The text without the token that ended it; `stopped` tells whether there was one, before the limit was reached."""

    text: str
    tokens: int
    stopped: bool


def load_decoder(directory: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer in mlx-lm's wrapper, which knows every token that ends an answer."""
    return load_tokenizer(directory, {"trust_remote_code": trust_remote_code}, eos_token_ids=config.get("eos_token_id"))


def answer_all(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[int, Answer]]:
    """Each prompt's index and answer, as they finish; up to `batch_size` are worked on at a time."""
    mx.random.seed(seed)
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(tokenizer.eos_token_ids)],
        sampler=make_sampler(temperature),
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
    )
    uids = generator.insert([list(prompt) for prompt in prompts], [max_tokens] * len(prompts))
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    try:
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason != "stop":
                    tokens[response.uid].append(response.token)
                if response.finish_reason is not None:
                    answered = tokens.pop(response.uid)
                    # The token limit may fall inside a character.
                    text = tokenizer.decode(answered).rstrip("\N{REPLACEMENT CHARACTER}").strip()
                    yield uids.index(response.uid), Answer(text, len(answered), response.finish_reason == "stop")
    finally:
        generator.close()


def answer_stream(
    model: nn.Module, tokenizer: Any, prompt: Sequence[int], *, max_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """The answer to one prompt, piece by piece."""
    mx.random.seed(seed)
    sampler = make_sampler(temperature)
    for response in stream_generate(model, tokenizer, list(prompt), max_tokens=max_tokens, sampler=sampler):
        yield response.text
