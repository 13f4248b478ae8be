"""PEFT on PyTorch, on the same batches: a plain training loop without needless work.

`python -m benchmarks.peft_peer SPEC RECORD` in the peers' environment; nothing of this project is imported. float32,
all cores, causal attention without a padding mask (rows are padded at their end, where no trained token looks), no
graph below the first adapted layer (PyTorch records none where nothing is trained), the head on trained positions only.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

Rows = list[dict[str, Any]]


def load(spec: dict[str, Any]) -> Any:
    """The base with the adapter that everybody starts from."""
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation="sdpa")
    lora, layers = spec["lora"], len(base.model.layers)
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["scale"] * lora["rank"],
        lora_dropout=0.0,
        target_modules=lora["modules"],
        layers_to_transform=list(range(layers - lora["layers"], layers)),
    )
    model = get_peft_model(base, config)
    start = load_file(spec["start"])
    with torch.no_grad():
        for name, parameter in adapter(model).items():
            parameter.copy_(start[name].T)
    return model


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """The trained matrices under mlx-lm's names; PEFT holds them transposed."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            found[name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = parameter
    return found


def sum_loss(model: Any, rows: Rows) -> tuple[torch.Tensor, int]:
    """Sum over the trained tokens, and how many these are."""
    longest = max(len(row["ids"]) for row in rows)
    ids, trained = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row["ids"])] = torch.tensor(row["ids"])
        trained[i, max(row["first"], 1) : len(row["ids"])] = True
    inner = model.base_model.model
    hidden = inner.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = inner.lm_head(hidden[trained[:, 1:]])
    targets = ids[:, 1:][trained[:, 1:]]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), len(targets)


def tokens(rows: Rows) -> int:
    return sum(len(row["ids"]) for row in rows)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(os.cpu_count() or 1)
    content = json.loads(Path(spec["rows"]).read_text())
    model, training = load(spec), spec["training"]
    optimizer = torch.optim.AdamW(
        adapter(model).values(),
        lr=training["learning_rate"],
        betas=tuple(training["betas"]),
        weight_decay=training["weight_decay"],
    )
    record: dict[str, Any] = {"seconds": [], "tokens": [], "losses": []}
    model.train()
    for rows in content["train"][: training["updates"]]:
        started = time.perf_counter()
        total, count = sum_loss(model, rows)
        loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record["losses"].append(loss.item())
        record["seconds"].append(time.perf_counter() - started)
        record["tokens"].append(tokens(rows))
        record.setdefault("seconds_to_first_update", time.perf_counter() - STARTED)
    unit = 1 if sys.platform == "darwin" else 1024
    record["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    model.eval()
    started = time.perf_counter()
    with torch.inference_mode():
        for rows in content["evaluate"]:
            sum_loss(model, rows)[0].item()
    seconds = time.perf_counter() - started
    record["evaluate_tokens_per_second"] = sum(map(tokens, content["evaluate"])) / seconds
    out = Path(spec["adapter"])
    out.mkdir(parents=True)
    save_file(
        {name: array.detach().T.contiguous() for name, array in adapter(model).items()}, out / "adapters.safetensors"
    )
    Path(sys.argv[2]).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
