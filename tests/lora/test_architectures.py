"""The same adapter on every architecture: trained, saved, read again, merged, and the merged model opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import SuScaledRoPE
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model, save_model

from stages.baseline import baseline
from stages.evaluate import evaluate
from stages.fetch import fetch
from stages.generate import generate
from stages.lora import adapter
from stages.lora.batches import Batch, collate
from stages.lora.execution import narrow_head
from stages.lora.loss import token_losses
from stages.merge import merge as merge_stage
from stages.merging import fuse as merge
from stages.merging.agreement import divergences, log_probabilities
from stages.model.load import floating_dtype, load_base, on_cpu
from stages.model.phi3 import LongRoPE
from stages.prepare import prepare
from stages.tokenize import tokenize
from stages.tokens.row import TokenRow
from stages.train import train as train_stage
from tests.support import adapters
from tests.support.adapters import TARGETS, attached, fill
from tests.support.adapters import configure_named as configure
from tests.support.rows import one_by_one
from tests.support.tiny import CONFIGS, small_params, write_model

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7, 8]])


@pytest.fixture(scope="session", params=list(CONFIGS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An architecture's name and a tiny model of it."""
    return request.param, write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session", params=list(CONFIGS))
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The same in 4 bits."""
    folder = tmp_path_factory.mktemp(f"{request.param}_packed")
    return request.param, write_model(folder, request.param, quantize=True, dtype="float16")


def mean_loss(model: Any, batch: Batch) -> mx.array:
    return token_losses(model, batch).mean()


def train(model: Any, rows: list[TokenRow], steps: int = 4) -> list[float]:
    """The loss before each update on the same batch, and after the last."""
    batch, optimizer = collate(rows), optim.Adam(1e-2)
    step = nn.value_and_grad(model, mean_loss)
    losses = []
    model.train()
    for _ in range(steps):
        loss, gradients = step(model, batch)
        optimizer.update(model, gradients)
        losses.append(loss.item())
    return [*losses, mean_loss(model, batch).item()]


def assert_trains_the_adapter_alone(model: Any, rows: list[TokenRow]) -> None:
    trained = set(adapter.weights(model))
    before = {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(model.parameters())}
    losses = train(model, rows)
    assert losses[-1] < losses[0]
    changed = {
        name
        for name, array in tree_flatten(model.parameters())
        if not np.array_equal(np.array(array.astype(mx.float32)), before[name])
    }
    assert changed == trained


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_updates_lower_the_loss_and_change_the_adapter_alone(
    base: tuple[str, Path], rows: list[TokenRow], kind: str
) -> None:
    name, directory = base
    model = load_base(directory)[0]
    adapter.attach(model, configure(model, name, kind), seed=0)
    assert_trains_the_adapter_alone(model, rows[5:9])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_packed_base_trains_without_being_unpacked(packed: tuple[str, Path], rows: list[TokenRow], kind: str) -> None:
    name, directory = packed
    model = load_base(directory, dtype="float32", dequantize=False)[0]
    adapter.attach(model, configure(model, name, kind), seed=0)
    assert any("Quantized" in type(module).__name__ for module in model.modules())
    assert_trains_the_adapter_alone(model, rows[:4])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fresh_adapter_changes_nothing(base: tuple[str, Path], kind: str) -> None:
    name, directory = base
    model = load_base(directory)[0]
    before = model(TOKENS)
    adapter.attach(model, configure(model, name, kind), seed=0)
    np.testing.assert_allclose(np.array(model(TOKENS)), np.array(before), atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_saved_is_what_loads(base: tuple[str, Path], tmp_path: Path, kind: str) -> None:
    name, directory = base
    model, config = attached(directory, name, kind)
    adapter.save(tmp_path, model, config)
    again = load_base(directory)[0]
    plain = again(TOKENS)
    assert adapter.load(again, tmp_path) == config
    assert mx.array_equal(again(TOKENS), model(TOKENS)).item()
    assert not mx.allclose(again(TOKENS), plain, atol=1e-2).item()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_base_in_bfloat16_trains_and_stays_in_it(tmp_path: Path, rows: list[TokenRow], kind: str) -> None:
    model = load_base(write_model(tmp_path, "gemma", dtype="bfloat16"), dtype="bfloat16")[0]
    adapter.attach(model, configure(model, "gemma", kind), seed=0)
    assert model(TOKENS).dtype == mx.bfloat16
    assert {array.dtype for array in adapter.weights(model).values()} == {mx.float32}
    losses = train(model, rows[5:9], steps=8)
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not on_cpu(), reason="a GPU computes experts in any type")
def test_experts_on_a_cpu_are_float32_or_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path, "mixtral", dtype="bfloat16")
    assert floating_dtype(load_base(directory)[0]) == mx.float32
    with pytest.raises(
        ValueError, match=r"model.dtype: MLX computes experts on a CPU in float32 alone; set it to auto"
    ):
        load_base(directory, dtype="bfloat16")
    # Merging only adds weights.
    assert floating_dtype(load_base(directory, keep_dtype=True)[0]) == mx.bfloat16


# mlx-lm opens no Phi-3-Vision.
@pytest.mark.parametrize("base", [name for name in CONFIGS if name != "phi3_v"], indirect=True)
def test_mlx_lm_loads_the_adapter_of_listed_layers(base: tuple[str, Path], tmp_path: Path) -> None:
    name, directory = base
    model = load_base(directory)[0]
    config = adapters.configure(model, targets=TARGETS[name], layers=[0, 2])
    adapter.attach(model, config, seed=0)
    fill(model)
    adapter.save(tmp_path, model, config)
    theirs = load_adapters(load_model(directory)[0], str(tmp_path))
    theirs.eval()
    assert mx.array_equal(model(TOKENS), theirs(TOKENS)).item()


def test_a_narrowed_head_gives_the_same_loss_and_gradients(base: tuple[str, Path], rows: list[TokenRow]) -> None:
    model, _ = attached(base[1], base[0])
    model.train()
    step, batch = nn.value_and_grad(model, mean_loss), collate(rows[:5])
    plain_loss, plain = step(model, batch)
    assert narrow_head(model).passed
    loss, gradients = step(model, batch)
    assert loss.item() == pytest.approx(plain_loss.item(), abs=1e-5)
    narrow = dict(tree_flatten(gradients))
    for name, gradient in tree_flatten(plain):
        np.testing.assert_allclose(np.array(narrow[name]), np.array(gradient), rtol=1e-3, atol=1e-5, err_msg=name)


def write_merged(folder: Path, model: Any, config: dict[str, Any]) -> Path:
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_merged_model_opens_and_says_what_the_adapter_said(
    base: tuple[str, Path], rows: list[TokenRow], tmp_path: Path, kind: str
) -> None:
    name, directory = base
    said = log_probabilities(attached(directory, name, kind)[0], one_by_one(rows))
    model, config = load_base(directory)
    names = adapter.attach(model, configure(model, name, kind), seed=0)
    fill(model)
    assert sorted(merge.fuse(model, dtype=mx.float32, requantize=False)) == sorted(names)
    opened, _ = load_base(write_merged(tmp_path / "merged", model, config))
    found = divergences(said, log_probabilities(opened, one_by_one(rows)))
    assert found.max() < 1e-4
    plain = divergences(said, log_probabilities(load_base(directory)[0], one_by_one(rows)))
    assert plain.mean() > 1e-2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_packed_base_merges_unpacked(
    packed: tuple[str, Path], rows: list[TokenRow], tmp_path: Path, kind: str
) -> None:
    name, directory = packed
    said = log_probabilities(attached(directory, name, kind, dtype="float32")[0], one_by_one(rows))
    model, config = load_base(directory, dequantize=True, dtype="float32")
    adapter.attach(model, configure(model, name, kind), seed=0)
    fill(model)
    merge.fuse(model, dtype=mx.float32, requantize=False)
    opened, _ = load_base(write_merged(tmp_path / "merged", model, config), dtype="float32")
    assert divergences(said, log_probabilities(opened, one_by_one(rows))).max() < 1e-4


def unpacked(module: Any) -> np.ndarray:
    options = {"group_size": module.group_size, "bits": module.bits}
    return np.array(mx.dequantize(module.weight, module.scales, module.biases, **options))


def test_a_packed_base_merges_packed(packed: tuple[str, Path], tmp_path: Path) -> None:
    name, directory = packed
    plain, _ = attached(directory, name, dequantize=True, dtype="float32")
    merge.fuse(plain, dtype=mx.float32, requantize=False)
    model, config = load_base(directory, dequantize=False, dtype="float32")
    names = adapter.attach(model, configure(model, name), seed=0)
    fill(model)
    merge.fuse(model, dtype=mx.float32, requantize=True)
    opened, _ = load_base(write_merged(tmp_path / "merged", model, config), dequantize=False, dtype="float32")
    exact, found = dict(plain.named_modules()), dict(opened.named_modules())
    for module in names:
        rounding = np.abs(unpacked(found[module]) - np.array(exact[module].weight)).max()
        assert 0 < rounding <= 1.01 * np.abs(np.array(found[module].scales)).max()


def test_the_language_model_of_a_phi_3_vision_is_a_plain_phi_3(tmp_path: Path) -> None:
    model, config = load_base(write_model(tmp_path, "phi3_v"))
    assert (config["model_type"], config["architectures"]) == ("phi3", ["Phi3ForCausalLM"])
    assert config["rope_scaling"]["type"] == "longrope"
    assert not {"embd_layer", "img_processor", "auto_map"} & set(config)
    assert not any("vision" in name for name, _ in tree_flatten(model.parameters()))


def test_every_stage_runs_on_a_phi_3_vision(project: Path, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "phi3_v", "phi3_v", max_position_embeddings=1024)
    (project / "params.yaml").write_text(small_params(source=str(directory)), encoding="utf-8")
    fetch()
    prepare()
    tokenize()
    train_stage(overrides=["lora.targets=[self_attn.qkv_proj]"])
    for stage in (baseline, merge_stage, evaluate, generate):
        stage()
    merged = json.loads(Path("artifacts/merged/config.json").read_text(encoding="utf-8"))
    assert merged["model_type"] == "phi3"
    assert json.loads(Path("artifacts/details/merge.json").read_text(encoding="utf-8"))["same_choice"] == 1.0


def test_transformers_reads_the_merged_config_of_a_phi_3_vision(tmp_path: Path) -> None:
    from transformers import AutoConfig

    _, config = load_base(write_model(tmp_path / "base", "phi3_v"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Phi3Config"


def angles(rope: Any, length: int, offset: Any = 0) -> np.ndarray:
    """The angle by which each position turns the first component of a pair, (length, pairs)."""
    x = mx.concatenate([mx.ones((1, 1, length, 4)), mx.zeros((1, 1, length, 4))], axis=-1)
    turned = np.array(rope(x, offset=offset))[0, 0]
    return np.arctan2(turned[:, 4:], turned[:, :4])


@pytest.mark.parametrize("as_array", [False, True])
def test_long_context_positions_are_those_of_the_reference(tmp_path: Path, as_array: bool) -> None:
    """Short factors within the original context of 32, long ones beyond: angle = position / (factor · base^i)."""
    model, config = load_base(write_model(tmp_path, "phi3_v"))
    rope, scaling = model.layers[0].self_attn.rope, config["rope_scaling"]
    assert isinstance(rope, LongRoPE)
    base_freqs = 10000.0 ** (np.arange(0, 8, 2) / 8)
    for offset, factor in ((0, "short_factor"), (22, "short_factor"), (23, "long_factor")):
        positions = np.arange(offset, offset + 10)[:, None]
        expected = positions / (np.array(scaling[factor]) * base_freqs)
        found = angles(rope, 10, mx.array([offset]) if as_array else offset)
        np.testing.assert_allclose(np.exp(1j * found), np.exp(1j * expected), atol=1e-4)


def test_long_context_positions_scale_the_attention_as_before(tmp_path: Path) -> None:
    model, config = load_base(write_model(tmp_path, "phi3_v"))
    theirs = SuScaledRoPE(8, 10000.0, 512, 32, config["rope_scaling"]["short_factor"], [1.03, 1.5, 12.0, 48.0])
    x = mx.random.normal((1, 1, 40, 8), key=mx.random.key(0))
    assert mx.array_equal(model.layers[0].self_attn.rope(x), theirs(x)).item()
