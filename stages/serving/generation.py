"""mlx-lm's generation thread for the models that are configured, and no others."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Event
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import GenerationContext, ModelProvider, Response, ResponseGenerator

from stages.decoding.stopping import held_back
from stages.serving.models import Models

_CACHED_PROMPTS = 10
# What mlx-lm's command line would say.
_ARGUMENTS: dict[str, Any] = {
    "model": None, "adapter_path": None, "draft_model": None, "num_draft_tokens": 0, "pipeline": False,
    "trust_remote_code": False, "chat_template": "", "chat_template_args": {}, "use_default_chat_template": False,
    "allowed_origins": [], "max_tokens": 1, "temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    "decode_concurrency": 32, "prompt_concurrency": 8, "prefill_step_size": 2048, "prompt_cache_bytes": None,
    "kv_bits": None, "kv_group_size": 64, "quantized_kv_start": 0,
}  # fmt: skip


class Provider(ModelProvider):
    """The models that `open_models` opens; it is called in the generation thread, whose streams are its own.

    `ready` is set when they are there, or when that failed: `failure`.
    """

    models: Models
    vocabulary: int

    def __init__(self, open_models: Callable[[], Models]) -> None:
        super().__init__(Namespace(**_ARGUMENTS))
        self._open = open_models
        self.ready = Event()
        self.failure: Exception | None = None

    def load_default(self) -> None:
        try:
            self.models = self._open()
            self.model, self.tokenizer = self.models.model, self.models.decoder
            # A graph's shape is known before it is computed.
            self.vocabulary = self.model(mx.array([[0]])).shape[-1]
            self.is_batchable = all(hasattr(cache, "merge") for cache in make_prompt_cache(self.model))
        except Exception as error:
            self.failure = error
            raise SystemExit from None  # ends this thread
        finally:
            self.ready.set()

    def load(self, model_path: str, adapter_path: Any = None, draft_model_path: Any = None) -> tuple[Any, Any]:
        """Switch to a model by its name; no path is ever opened."""
        self.models.switch(model_path)
        self.model_key = (model_path, None, None)
        return self.model, self.tokenizer


class Generation(ResponseGenerator):
    """Answers to prompts that come as tokens. Stop strings are found in the text, wherever its tokens part it.

    `dead` is set when its thread has ended, after which nothing is answered.
    """

    def __init__(self, provider: Provider) -> None:
        self.dead = Event()
        super().__init__(provider, LRUPromptCache(_CACHED_PROMPTS))

    def _run_generate(self) -> None:
        try:
            super()._run_generate()
        finally:
            self.dead.set()

    def generate(
        self, request: Any, generation_args: Any, progress_callback: Any = None
    ) -> tuple[GenerationContext, Iterator[Response]]:
        stops, without = generation_args.stop_words, replace(generation_args, stop_words=[])
        context, responses = super().generate(request, without, progress_callback)
        return context, until_stop(responses, stops)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple[list[int], Any, list[str], str, None]:
        ids, state = request.prompt, "normal"
        if request.request_type == "chat":
            if tokenizer.has_thinking and tokenizer.rfind_think_start(ids) > tokenizer.rfind_think_end(ids):
                state = "reasoning"
            state = tokenizer.response_initial_state or state
        return ids, [ids], ["assistant"], state, None


def until_stop(responses: Iterator[Response], stops: list[str]) -> Iterator[Response]:
    """The responses up to the first stop string, which is cut; those whose text may be its start wait for more."""
    waiting: list[Response] = []
    for response in responses:
        waiting.append(response)
        text = "".join(each.text for each in waiting)
        if places := [place for place in map(text.find, stops) if place >= 0]:
            yield from _cut(waiting, text[: min(places)])
            return
        if response.finish_reason is not None or not held_back(text, stops):
            yield from waiting
            waiting = []


def _cut(waiting: list[Response], text: str) -> Iterator[Response]:
    """A response for each that waited, the text in the first of them; the last one ends the answer, and has none."""
    *others, last = waiting
    if text and not others:
        others = [last]
    for number, each in enumerate(others):
        yield replace(each, text="" if number else text, finish_reason=None)
    yield replace(last, text="", finish_reason="stop")
