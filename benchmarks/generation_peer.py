"""One contender's answers, timed: `python -m benchmarks.generation_peer NAME SPEC RATES`.

Each `answer` function takes the prompts' tokens and the number of tokens to answer with, and returns how many it said.
Each is called once before it is timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
Answer = Callable[[Prompts, int], int]


def lorabuild(spec: dict[str, Any]) -> Answer:
    from stages.decoding.decode import answer_all, load_decoder
    from stages.model.load import load_base

    model, config = load_base(Path(spec["model"]), dtype="float32")
    decoder = load_decoder(Path(spec["model"]), config)
    decoder._eos_token_ids = set()

    def answer(prompts: Prompts, tokens: int) -> int:
        size = len(prompts)
        answers = answer_all(model, decoder, prompts, max_tokens=tokens, temperature=0.0, batch_size=size, seed=0)
        return sum(done.tokens for _, done in answers)

    return answer


def mlx_lm(spec: dict[str, Any]) -> Answer:
    from mlx_lm import batch_generate, load

    from stages.model.load import load_base

    model, _ = load_base(Path(spec["model"]), dtype="float32")
    tokenizer = load(spec["model"], lazy=True)[1]
    tokenizer._eos_token_ids = set()

    def answer(prompts: Prompts, tokens: int) -> int:
        return batch_generate(model, tokenizer, prompts, max_tokens=tokens).stats.generation_tokens

    return answer


def transformers(spec: dict[str, Any]) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()

    def answer(prompts: Prompts, tokens: int) -> int:
        ids = torch.tensor(prompts)
        fixed = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)
        return int(whole[:, ids.shape[1] :].numel())

    return answer


def llama_cpp(spec: dict[str, Any]) -> Answer:
    import http.client
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    params, most = xllamacpp.CommonParams(), max(spec["rows"])
    params.model.path = spec["gguf"]
    params.n_ctx = most * (spec["prompt_tokens"] + spec["tokens"] + 16)
    params.n_parallel, params.port, params.verbosity = most, 0, 0
    server = xllamacpp.Server(params)
    host = server.listening_address.removeprefix("http://")

    def one(prompt: list[int], tokens: int) -> int:
        connection = http.client.HTTPConnection(host, timeout=600)
        fixed = {"temperature": 0, "cache_prompt": False, "ignore_eos": True, "return_tokens": True}
        body = json.dumps({"prompt": prompt, "n_predict": tokens, **fixed}).encode()
        connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        return int(json.load(connection.getresponse())["tokens_predicted"])

    def answer(prompts: Prompts, tokens: int) -> int:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(lambda prompt: one(prompt, tokens), prompts))

    return answer


CONTENDERS = {"lorabuild": lorabuild, "mlx-lm": mlx_lm, "transformers": transformers, "llama.cpp": llama_cpp}


def main() -> None:
    name, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    answer = CONTENDERS[name](spec)
    # Any tokens will do, and each prompt begins with another, so that none is found in a cache.
    prompts = [[row + 5, *range(1000, 1000 + spec["prompt_tokens"] - 1)] for row in range(max(spec["rows"]))]
    answer(prompts[:1], 2)
    rates = {}
    for rows in spec["rows"]:
        began = time.perf_counter()
        said = answer(prompts[:rows], spec["tokens"])
        rates[rows] = said / (time.perf_counter() - began)
        if said != rows * spec["tokens"]:
            raise ValueError(f"{name} said {said} tokens, not {rows * spec['tokens']}")
    Path(sys.argv[3]).write_text(json.dumps(rates))


if __name__ == "__main__":
    if sys.argv[1] in ("lorabuild", "mlx-lm"):
        from stages.model import blas

        blas.preload()
    main()
