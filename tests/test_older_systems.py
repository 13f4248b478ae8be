"""What the older trainers did works here: the parameters of docs/from-*.md on tiny models, and their losses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from ruamel.yaml import YAML

from stages.baseline import baseline
from stages.evaluate import evaluate
from stages.fetch import fetch
from stages.generate import generate
from stages.lora import adapter, adapter_files
from stages.merge import merge
from stages.model.load import load_base
from stages.params.loading import load_params
from stages.prepare import prepare
from stages.tokenize import tokenize
from stages.tokens.row import TokenRow
from stages.train import train
from tests.support.adapters import configure
from tests.support.imports import ROOT
from tests.support.runs import make_trainer
from tests.support.tiny import write_model

TRAIN_LORA, TUTORIAL = "from-train-lora.md", "from-tutorial-7.md"


def parameters(page: str) -> dict[str, Any]:
    """The YAML on a page of docs."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    found: dict[str, Any] = YAML(typ="safe").load(block)
    return found


def set_up(project: Path, page: str, base: Path, **lora: Any) -> None:
    """A project with the parameters of a page, on a tiny base model, and rows with a `text`."""
    yaml = YAML()
    path = project / "params.yaml"
    params = yaml.load(path.read_text(encoding="utf-8"))
    for section, values in parameters(page).items():
        params[section].update(values)
    params["model"]["source"] = str(base)
    params["lora"].update(lora)
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    rows = [f'{{"text": "Q: {a} + {b}?\\nA: {a + b}"}}\n' for a in range(10) for b in range(4)]
    (project / "data" / "raw" / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (project / "data" / "prompts.jsonl").write_text('{"prompt": "Q: 1 + 1?\\nA:"}\n', encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "architecture", "options", "lora", "adapted"),
    [
        (TRAIN_LORA, "mixtral", {}, {"layers": 2}, {"self_attn.q_proj", "self_attn.v_proj", "block_sparse_moe.gate"}),
        (TUTORIAL, "phi3", {}, {}, {"self_attn.qkv_proj"}),
        (TUTORIAL, "phi3_v", {"max_position_embeddings": 1024}, {}, {"self_attn.qkv_proj"}),
        (TUTORIAL, "phi3", {"quantize": True, "bits": 8}, {}, {"self_attn.qkv_proj"}),
    ],
    ids=["mixtral", "phi3", "phi3_vision", "phi3_8_bits"],
)
def test_the_parameters_of_the_pages_run_through_all_stages(
    project: Path,
    tmp_path: Path,
    page: str,
    architecture: str,
    options: dict[str, Any],
    lora: dict[str, Any],
    adapted: set[str],
) -> None:
    set_up(project, page, write_model(tmp_path / "base", architecture, **options), **lora)
    for stage in (fetch, prepare, tokenize, baseline, train, merge, evaluate, generate):
        stage()
    names = {name.rpartition(".")[0] for name in adapter_files.saved_names(Path("artifacts/adapter"))}
    layers = {int(name.split(".")[2]) for name in names}
    assert {re.sub(r".*layers\.\d+\.", "", name) for name in names} == adapted
    assert len(layers) == load_params(Path("params.yaml")).lora.layers
    assert max(layers) == len(load_base(tmp_path / "base")[0].layers) - 1
    assert Path("artifacts/samples/samples.md").exists()


def test_epochs_and_iters_both_given_are_an_error(project: Path) -> None:
    with pytest.raises(ValueError, match=r"set exactly one of train\.epochs and train\.iters"):
        train(overrides=["train.epochs=2", "train.iters=600"])


# --- The old rules, in a few lines


class OldLoRA(nn.Module):
    """y = W x + 20 (x A) B."""

    def __init__(self, linear: Any, a: mx.array, b: mx.array) -> None:
        super().__init__()
        self.linear, self.lora_a, self.lora_b = linear, a, b

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + 20.0 * ((x @ self.lora_a) @ self.lora_b)


def old_losses(base: Path, start: dict[str, mx.array], batches: list[list[TokenRow]], rate: float) -> list[float]:
    """Each update's loss: padded batches, mean over real targets, Adam."""
    model = load_base(base)[0]
    modules = dict(model.named_modules())
    names = sorted({name.rpartition(".")[0] for name in start})
    wrapped = [(name, OldLoRA(modules[name], start[f"{name}.lora_a"], start[f"{name}.lora_b"])) for name in names]
    model.update_modules(tree_unflatten(wrapped))
    model.freeze()
    for _, module in wrapped:
        module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)

    def loss(model: Any, inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        return (nn.losses.cross_entropy(model(inputs), targets) * mask).sum() / mask.sum()

    optimizer, found = optim.Adam(learning_rate=rate), []
    for rows in batches:
        longest = max(len(row.input_ids) for row in rows)
        padded = mx.array(np.stack([np.pad(row.input_ids, (0, longest - len(row.input_ids))) for row in rows]))
        lengths = mx.array([[len(row.input_ids)] for row in rows])
        mask = mx.arange(1, longest)[None] < lengths
        value, gradients = nn.value_and_grad(model, loss)(model, padded[:, :-1], padded[:, 1:], mask)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        found.append(value.item())
    return found


def test_the_losses_of_the_old_rules_are_reproduced(tiny_llama: Path, rows: list[TokenRow]) -> None:
    values = parameters(TRAIN_LORA)
    whole = [TokenRow(row.id, row.source, row.input_ids, np.arange(len(row.input_ids)) > 0, 0, False) for row in rows]
    model = load_base(tiny_llama)[0]
    lora = values["lora"] | {"type": "lora", "rank_stabilized": False, "dropout": 0.0, "layers": 2}
    adapter.attach(model, configure(model, **(lora | {"targets": ["q_proj", "v_proj"]})), seed=0)
    start = {name: mx.array(np.array(array)) for name, array in adapter.weights(model).items()}
    options = {key: value for key, value in values["train"].items() if not key.startswith(("steps_", "val_"))}
    options |= {"epochs": None, "iters": 8, "batch_size": 4, "learning_rate": 3e-3}
    run = make_trainer(model, whole, [], **options)
    batches = [run._rows(step) for step in range(1, 9)]
    list(run.run())
    ours = [report.loss for report in run.progress.reports]
    wanted = old_losses(tiny_llama, start, batches, 3e-3)
    assert wanted[0] - wanted[-1] > 0.1  # it learns
    assert ours == pytest.approx(wanted, rel=2e-5)
