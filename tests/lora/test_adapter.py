"""The adapter: what it is put on, how it is saved, what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from stages.decoding.decode import load_decoder, stream_tokens
from stages.decoding.stopping import ended
from stages.lora import adapter, adapter_files
from stages.lora.targets import resolve
from stages.model.load import load_base
from tests.support.adapters import KEYS, config, configure, fill
from tests.support.tiny import write_model


def test_just_the_targets_of_the_last_layers_are_trainable(model: Any) -> None:
    assert adapter.attach(model, config(), seed=0) == [f"model.layers.{i}.{key}" for i in (1, 2) for key in KEYS]
    assert list(adapter.weights(model)) == [
        f"model.layers.{i}.{key}.lora_{part}" for i in (1, 2) for key in KEYS for part in "ab"
    ]


def test_a_fresh_adapter_changes_nothing(model: Any) -> None:
    tokens = mx.array([[1, 2, 3]])
    before = model(tokens)
    adapter.attach(model, config(), seed=0)
    assert mx.array_equal(model(tokens), before).item()


def test_initial_weights_depend_on_the_seed_alone(tiny_llama: Path) -> None:
    def initial(seed: int, layers: int) -> dict[str, np.ndarray]:
        model = load_base(tiny_llama)[0]
        adapter.attach(model, config(layers=layers), seed=seed)
        return {name: np.array(array) for name, array in adapter.weights(model).items()}

    two, three, other = initial(0, 2), initial(0, 3), initial(1, 2)
    assert all(np.array_equal(two[name], three[name]) for name in two)
    assert not any(np.array_equal(two[name], other[name]) for name in two if name.endswith("lora_a"))
    a = [array for name, array in three.items() if name.endswith("lora_a")]
    assert len({array.tobytes() for array in a}) == len(a)


@pytest.mark.parametrize(("targets", "keys"), [(["q_proj"], KEYS[:1]), (["self_attn.v_proj", "q_proj"], KEYS)])
def test_targets_are_full_paths_or_last_parts(model: Any, targets: list[str], keys: tuple[str, ...]) -> None:
    assert resolve(model, targets, layers=(1, 2)) == keys


@pytest.mark.parametrize(
    ("target", "keys"),
    [
        ("mlp.*", ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]),
        ("[qk]_proj", ["self_attn.k_proj", "self_attn.q_proj"]),
        ("embed_tokens", ["model.embed_tokens"]),
        ("model.embed_tokens", ["model.embed_tokens"]),
    ],
)
def test_targets_are_globs_and_modules_outside_the_layers(model: Any, target: str, keys: list[str]) -> None:
    assert list(resolve(model, [target], layers=(1, 2))) == keys


@pytest.mark.parametrize("target", ["all-linear", "*"])
def test_all_linear_and_globs_stay_inside_the_layers(model: Any, target: str) -> None:
    keys = resolve(model, [target], layers=(0, 1, 2))
    assert len(keys) == 7
    assert all(key.startswith(("self_attn.", "mlp.")) for key in keys)


@pytest.mark.parametrize(("target", "near"), [("q_porj", "q_proj"), ("mlp", "mlp.*"), ("embed_token", "embed_tokens")])
def test_an_unknown_target_lists_what_there_is(model: Any, target: str, near: str) -> None:
    with pytest.raises(ValueError, match="is no linear module of a layer") as error:
        resolve(model, [target, "v_proj"], layers=(1, 2))
    message = str(error.value)
    assert message.startswith(f"lora.targets: {target!r} is")
    assert f"did you mean {near!r}?" in message
    assert "There are: mlp.down_proj, mlp.gate_proj" in message
    assert message.endswith("outside the layers: model.embed_tokens")


def test_all_unknown_targets_are_in_one_line(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"'q_porj', 'nothing' are no linear modules .* did you mean 'q_proj'\?"
    ) as error:
        resolve(model, ["q_porj", "v_proj", "nothing"], layers=(1, 2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layers", "indices"), [(2, (1, 2)), ("all", (0, 1, 2)), ([0, 2], (0, 2)), ([2, 0], (0, 2)), (3, (0, 1, 2))]
)
def test_layers_are_the_last_all_or_listed(model: Any, layers: Any, indices: tuple[int, ...]) -> None:
    names = adapter.attach(model, configure(model, layers=layers), seed=0)
    assert names == [f"model.layers.{i}.{key}" for i in indices for key in KEYS]


@pytest.mark.parametrize("layers", [2, [1, 2]])
def test_a_list_of_the_last_layers_is_the_last_layers(model: Any, layers: Any) -> None:
    assert configure(model, layers=layers).layers == 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (9, "lora.layers: 9 layers wanted, the base model has 3"),
        ([0, 3, 7], "lora.layers: 3, 7 wanted, the base model has the layers 0 to 2"),
    ],
)
def test_layers_that_the_base_lacks_are_refused(model: Any, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(model, layers=layers)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"alpha": 8.0}, 2.0),
        ({"alpha": None, "scale": 3.0}, 3.0),
        ({"alpha": 8.0, "rank_stabilized": True}, 4.0),
    ],
)
def test_the_scale_is_alpha_over_rank_or_its_root_or_as_told(model: Any, options: dict[str, Any], scale: float) -> None:
    config = configure(model, **options)
    assert config.scale == scale
    adapter.attach(model, config, seed=0)
    assert model.layers[2].self_attn.q_proj.scale == scale


def test_a_rank_beyond_the_width_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"lora.rank: 17 exceeds the width of model.layers.1.self_attn.v_proj, 16"):
        adapter.attach(model, config(rank=17), seed=0)


def test_initial_weights_are_uniform_within_the_root_of_what_goes_in(tmp_path: Path) -> None:
    model = load_base(write_model(tmp_path, "mixtral", intermediate_size=128))[0]
    adapter.attach(model, configure(model, targets=["q_proj", "down_proj", "embed_tokens"], layers=1), seed=0)
    layer = model.layers[2]
    goes_in = [(layer.self_attn.q_proj, 32), (layer.block_sparse_moe.switch_mlp.down_proj, 128)]
    for module, width in [*goes_in, (model.model.embed_tokens, 258)]:
        assert 0.9 < mx.abs(module.lora_a).max().item() * width**0.5 <= 1
        assert not module.lora_b.any().item()


def test_a_gate_may_be_narrower_than_the_rank(tmp_path: Path) -> None:
    model = load_base(write_model(tmp_path, "mixtral"))[0]
    names = adapter.attach(model, configure(model, targets=["gate", "up_proj"], layers=1), seed=0)
    assert model.layers[2].block_sparse_moe.gate.lora_b.shape == (4, 3)
    assert names == ["model.layers.2.block_sparse_moe.gate", "model.layers.2.block_sparse_moe.switch_mlp.up_proj"]


def test_dora_refuses_what_it_has_no_form_for(tmp_path: Path) -> None:
    model = load_base(write_model(tmp_path, "mixtral"))[0]
    config = configure(model, type="dora", targets=["q_proj", "up_proj", "embed_tokens"])
    message = r"lora.type: dora has no form for .* \(block_sparse_moe.switch_mlp.up_proj, model.embed_tokens\); take"
    with pytest.raises(ValueError, match=message):
        adapter.attach(model, config, seed=0)


def test_dora_refuses_a_row_of_zeros(model: Any) -> None:
    linear = model.layers[2].self_attn.q_proj
    linear.weight = linear.weight.at[3].multiply(0.0)
    with pytest.raises(
        ValueError, match=r"lora.type: dora divides .* model.layers.2.self_attn.q_proj has a row of zeros"
    ):
        adapter.attach(model, config(type="dora"), seed=0)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_dora_fits_a_base_of_any_bits(model: Any, bits: int) -> None:
    nn.quantize(model, group_size=32, bits=bits)
    adapter.attach(model, config(type="dora"), seed=0)
    assert model.layers[2].self_attn.q_proj.lora_a.shape == (32, 4)
    mx.eval(model(mx.array([[1, 2, 3]])))


def test_the_summary_counts_modules_and_parameters(model: Any) -> None:
    base = sum(array.size for _, array in tree_flatten(model.parameters()))
    adapter.attach(model, configure(model, targets=["q_proj", "v_proj", "embed_tokens"]), seed=0)
    groups, parameters = adapter.summary(model)
    assert groups == [
        adapter.Adapted("model.embed_tokens", 1, 4 * (258 + 32)),
        adapter.Adapted("self_attn.q_proj", 2, 2 * 4 * (32 + 32)),
        adapter.Adapted("self_attn.v_proj", 2, 2 * 4 * (32 + 16)),
    ]
    assert parameters == base + sum(group.parameters for group in groups)


def test_the_summary_of_a_packed_base_counts_its_weights(model: Any) -> None:
    adapter.attach(model, config(), seed=0)
    plain = adapter.summary(model)
    nn.quantize(model, group_size=32, bits=4)
    assert adapter.summary(model) == plain


def test_what_is_saved_is_what_loads(tiny_llama: Path, tmp_path: Path) -> None:
    model, again = load_base(tiny_llama)[0], load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    fill(model)
    adapter.save(tmp_path / "adapter", model, config())
    assert adapter.load(again, tmp_path / "adapter") == config()
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), again(tokens)).item()


def test_the_same_weights_give_the_same_bytes(model: Any, tmp_path: Path) -> None:
    adapter.attach(model, config(), seed=0)
    for name in ("one", "two"):
        adapter.save(tmp_path / name, model, config())
    digests = {
        hashlib.sha256((tmp_path / name / adapter_files.WEIGHTS_FILE).read_bytes()).hexdigest()
        for name in ("one", "two")
    }
    assert len(digests) == 1


CHOICES: list[dict[str, Any]] = [
    {},
    {"type": "dora"},
    {"layers": "all", "targets": ["all-linear"]},
    {"layers": [0, 2]},
    {"layers": [0, 2], "type": "dora"},
    {"targets": ["q_proj", "embed_tokens"], "layers": [1]},
]


def saved(tiny_llama: Path, folder: Path, **choice: Any) -> Any:
    """A model with a filled adapter that was written to the folder."""
    model = load_base(tiny_llama)[0]
    config = configure(model, **choice)
    adapter.attach(model, config, seed=0)
    fill(model)
    adapter.save(folder, model, config)
    return model


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_mlx_lm_loads_the_adapter(tiny_llama: Path, tmp_path: Path, choice: dict[str, Any]) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model = saved(tiny_llama, tmp_path, **choice)
    theirs = load_adapters(load_model(tiny_llama)[0], str(tmp_path))
    theirs.eval()
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), theirs(tokens)).item()
    assert dict(tree_flatten(theirs.parameters())).keys() == dict(tree_flatten(model.parameters())).keys()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_of_modules_is_restored(tiny_llama: Path, tmp_path: Path, choice: dict[str, Any]) -> None:
    model, again = saved(tiny_llama, tmp_path, **choice), load_base(tiny_llama)[0]
    assert adapter.load(again, tmp_path) == configure(load_base(tiny_llama)[0], **choice)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), again(tokens)).item()


@pytest.mark.parametrize(
    "mlx_lm_own", [{"num_layers": 2, "keys": None}, {"num_layers": -1, "keys": ["self_attn.q_proj", "mlp.up_proj"]}]
)
def test_an_adapter_that_mlx_lm_wrote_is_read(tiny_llama: Path, tmp_path: Path, mlx_lm_own: dict[str, Any]) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, again = load_base(tiny_llama)[0], load_base(tiny_llama)[0]
    lora = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, mlx_lm_own["num_layers"], lora | {"keys": mlx_lm_own["keys"]})
    fill(model)
    lora |= {"keys": mlx_lm_own["keys"]} if mlx_lm_own["keys"] else {}
    content = {"fine_tune_type": "lora", "num_layers": mlx_lm_own["num_layers"], "lora_parameters": lora}
    (tmp_path / adapter_files.CONFIG_FILE).write_text(json.dumps(content))
    mx.save_safetensors(str(tmp_path / adapter_files.WEIGHTS_FILE), adapter.weights(model))
    adapter.load(again, tmp_path)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), again(tokens)).item()


def mlx_lm(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mlx_lm", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("choice", [{}, {"type": "dora", "layers": [0, 2]}], ids=str)
def test_mlx_lm_generates_with_the_adapter_and_fuses_it(
    tiny_llama: Path, tmp_path: Path, choice: dict[str, Any]
) -> None:
    model = saved(tiny_llama, tmp_path / "adapter", **choice)
    base = ["--model", str(tiny_llama), "--adapter-path", str(tmp_path / "adapter")]
    decoder = load_decoder(tiny_llama, {})
    expected = "".join(
        piece
        for piece, _ in stream_tokens(model, decoder, decoder.encode("abc"), max_tokens=12, temperature=0.0, seed=0)
    )
    answer = mlx_lm("generate", *base, "--prompt", "abc", "--max-tokens", "12", "--verbose", "False")
    # mlx-lm prints the half character too on which the token limit fell.
    assert ended(answer.strip()) == expected.strip() != ""
    mlx_lm("fuse", *base, "--save-path", str(tmp_path / "fused"))
    fused = load_base(tmp_path / "fused")[0]
    tokens = mx.array([[1, 2, 3]])
    np.testing.assert_allclose(np.array(fused(tokens)), np.array(model(tokens)), atol=2e-4)


def test_every_tensor_that_does_not_fit_is_listed(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    adapter.save(tmp_path, model, config())
    path = tmp_path / adapter_files.CONFIG_FILE
    content = json.loads(path.read_text())
    content["lora_parameters"]["rank"] = 2
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="shape") as error:
        adapter.load(load_base(tiny_llama)[0], tmp_path)
    assert len(str(error.value).splitlines()) == 8
    assert "lora_a: shape (32, 4), the model wants (32, 2)" in str(error.value)


def test_no_adapter_is_one_clear_line(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json: no such file; make it with: python -m stages.train"):
        adapter.load(model, tmp_path)


def test_training_starts_from_a_saved_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    model, again = saved(tiny_llama, tmp_path), load_base(tiny_llama)[0]
    names = adapter.start_from(again, adapter_files.read(tmp_path), configure(again, dropout=0.5))
    assert names == [f"model.layers.{i}.{key}" for i in (1, 2) for key in KEYS]
    assert again.layers[2].self_attn.q_proj.dropout._p_1 == 0.5
    tokens = mx.array([[1, 2, 3]])
    again.eval()
    assert mx.array_equal(model(tokens), again(tokens)).item()


def test_every_mismatch_of_a_saved_adapter_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    saved(tiny_llama, tmp_path)
    model = load_base(tiny_llama)[0]
    wanted = configure(model, type="dora", rank=2, targets=["k_proj"], layers=[0, 2])
    with pytest.raises(ValueError, match=r"lora\.type") as error:
        adapter.start_from(model, adapter_files.read(tmp_path), wanted)
    lines = [line.removeprefix(f"{tmp_path / adapter_files.CONFIG_FILE}: ") for line in str(error.value).splitlines()]
    assert lines == [
        "lora.type is lora there and dora here; set lora.type to lora",
        "lora.rank is 4 there and 2 here; set lora.rank to 4",
        "lora.scale is 2.0 there and 4.0 here; set lora.scale to 2.0 and lora.alpha to null",
        "lora.targets is [self_attn.q_proj, self_attn.v_proj] there and [self_attn.k_proj] here; "
        "set lora.targets to [self_attn.q_proj, self_attn.v_proj]",
        "lora.layers is [1, 2] there and [0, 2] here; set lora.layers to [1, 2]",
    ]
    assert not adapter.weights(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file; make it with"), (b"cut off", "damaged: not safetensors .*; make it with")],
)
def test_weights_that_cannot_be_read_are_one_line(
    tiny_llama: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    saved(tiny_llama, tmp_path)
    path = tmp_path / adapter_files.WEIGHTS_FILE
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"adapters.safetensors: {message}") as error:
        adapter.load(load_base(tiny_llama)[0], tmp_path)
    assert "\n" not in str(error.value)


def test_a_full_fine_tune_is_no_adapter(model: Any, tmp_path: Path) -> None:
    content = {"fine_tune_type": "full", "num_layers": 2, "lora_parameters": {"keys": ["x"]}}
    (tmp_path / adapter_files.CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="fine_tune_type 'full' is no adapter"):
        adapter.load(model, tmp_path)


def test_an_adapter_for_other_modules_is_refused(model: Any, tmp_path: Path) -> None:
    adapter.attach(model, config(), seed=0)
    adapter.save(tmp_path, model, config(keys=("self_attn.qkv_proj",)))
    with pytest.raises(ValueError, match=r"the base model has no self_attn.qkv_proj to put the adapter on"):
        adapter.load(model, tmp_path)


def test_a_config_of_an_older_mlx_lm_is_read(tmp_path: Path) -> None:
    """Until `alpha` went, LoRALinear multiplied by scale · alpha / rank."""
    lora = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "scale": 10.0, "keys": list(KEYS)}
    old = {"lora_layers": 2, "lora_parameters": lora}
    path = tmp_path / adapter_files.CONFIG_FILE
    path.write_text(json.dumps(old))
    assert adapter_files.read_config(tmp_path) == config(rank=8, scale=20.0)
    path.write_text(json.dumps(old | {"use_dora": True, "lora_parameters": lora | {"alpha": 8}}))
    assert adapter_files.read_config(tmp_path) == config(rank=8, scale=10.0, type="dora")
    # Today's mlx-lm passes over an alpha beside the scale.
    path.write_text(json.dumps({"num_layers": 2, "fine_tune_type": "lora", "lora_parameters": lora}))
    assert adapter_files.read_config(tmp_path) == config(rank=8, scale=10.0)


def test_an_older_config_without_keys_is_read_from_the_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    model = saved(tiny_llama, tmp_path)
    old = {"lora_layers": 16, "lora_parameters": {"rank": 4, "alpha": 8, "dropout": 0.0, "scale": 1.0}}
    (tmp_path / adapter_files.CONFIG_FILE).write_text(json.dumps(old))
    again = load_base(tiny_llama)[0]
    assert adapter.load(again, tmp_path) == config(layers=(1, 2))
    tokens = mx.array([[1, 2, 3]])
    again.eval()
    assert mx.array_equal(model(tokens), again(tokens)).item()


def test_the_same_modules_named_in_full_are_a_start(tiny_llama: Path, tmp_path: Path) -> None:
    saved(tiny_llama, tmp_path)
    there = adapter_files.read(tmp_path)
    names = tuple(sorted({name.rpartition(".")[0] for name in there.arrays}))
    full = dataclasses.replace(there, config=dataclasses.replace(there.config, keys=names, layers=()))
    model = load_base(tiny_llama)[0]
    assert adapter.start_from(model, full, configure(model)) == adapter.attach(
        load_base(tiny_llama)[0], config(), seed=0
    )
    other = load_base(tiny_llama)[0]
    with pytest.raises(
        ValueError, match=r"names its modules one by one, and they are not those of lora.targets in lora.layers"
    ):
        adapter.start_from(other, full, configure(other, layers=3))
