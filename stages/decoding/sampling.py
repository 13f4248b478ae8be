"""How the next token is chosen from its logits, by mlx-lm's samplers and penalties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

CONTEXT_TOKENS = 20  # the last tokens, the prompt's among them, that penalties look at

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def sampler_of(*, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Sampler:
    """Log-probabilities (batch, vocabulary) → tokens (batch). At temperature 0 the likeliest, whatever the others."""
    return make_sampler(temperature, top_p=top_p, top_k=top_k, min_p=min_p)


def penalties_of(
    *,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    before: Sequence[int] = (),
) -> list[LogitsProcessor]:
    """What changes the logits of tokens that came lately; `before`: those that a cache already holds."""
    made = make_logits_processors(
        # To mlx-lm 0 is none, a factor of 1 would be computed.
        repetition_penalty=0.0 if repetition_penalty == 1 else repetition_penalty,
        repetition_context_size=CONTEXT_TOKENS,
        presence_penalty=presence_penalty,
        presence_context_size=CONTEXT_TOKENS,
        frequency_penalty=frequency_penalty,
        frequency_context_size=CONTEXT_TOKENS,
    )
    if not before:
        return made
    earlier = mx.array(list(before[-CONTEXT_TOKENS:]))
    return [_after(earlier, processor) for processor in made]


def _after(earlier: mx.array, processor: Any) -> LogitsProcessor:
    return lambda tokens, logits: processor(mx.concatenate([earlier, tokens]), logits)
