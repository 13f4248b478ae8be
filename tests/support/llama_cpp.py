"""llama.cpp in this process (package xllamacpp): its server, asked for tokens and log-probabilities."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LlamaCpp:
    """A running server."""

    address: str

    def tokens(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """The ids of a text; `special`: control tokens in it count as such; `bos`: with what goes before a text."""
        return list(self._post("/tokenize", content=text, add_special=bos, parse_special=special)["tokens"])

    def generate(self, prompt: list[int], *, tokens: int) -> tuple[list[int], np.ndarray]:
        """The greedy continuation, and the log-probabilities of all tokens at each of its places, (tokens, V)."""
        answer, rows = list[int](), list[np.ndarray]()
        for _ in range(tokens):
            rows.append(self.next_token([*prompt, *answer]))
            answer.append(int(np.argmax(rows[-1])))
        said = self._complete(prompt, tokens)["tokens"]
        assert said == answer[: len(said)]  # the server's own choices, up to an end of the answer
        return answer, np.array(rows)

    def next_token(self, ids: list[int]) -> np.ndarray:
        """The log-probabilities of all tokens after these, (V,)."""
        # Inside of a character the server tells no probabilities. They are those before a bias, which makes it say "a".
        whole = self.tokens("a")[-1]
        place = self._complete(ids, 1, n_probs=1_000_000, logit_bias=[[whole, 1000.0]])
        choices = sorted(place["completion_probabilities"][0]["top_logprobs"], key=lambda choice: int(choice["id"]))
        return np.array([choice["logprob"] for choice in choices])

    def _complete(self, prompt: list[int], tokens: int, **options: Any) -> Any:
        fixed = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
        return self._post("/completion", prompt=prompt, n_predict=tokens, **fixed, **options)

    def chat(self, content: str) -> str:
        """The prompt that the server makes of a user's turn by the file's own chat template."""
        return str(self._post("/apply-template", messages=[{"role": "user", "content": content}])["prompt"])

    def _post(self, path: str, **body: Any) -> Any:
        host = self.address.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=120)
        connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with closing(connection), connection.getresponse() as answer:
            return json.load(answer)


@contextmanager
def serving(model: Path, *, adapter: Path | None = None, context: int = 256) -> Iterator[LlamaCpp]:
    """llama.cpp with a model, and perhaps an adapter on it, on a free port of this machine."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.port, params.warmup, params.verbosity = context, 1, 0, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    yield LlamaCpp(server.listening_address)
    del server
