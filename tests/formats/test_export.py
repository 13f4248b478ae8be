"""Adapters written in each format and read back: the same numbers, or nothing on the disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.adapters import find
from stages.formats.base import Base
from stages.formats.export import FORMATS, export
from stages.formats.proof import compare
from stages.lora import adapter, adapter_files
from stages.lora.adapter_files import Saved
from stages.lora.lora_config import LoraConfig
from stages.model.load import load_base
from tests.support.adapters import attached, configure, fill
from tests.support.tiny import write_model

BARE = Base()


def saved_on(folder: Path, directory: Path, **options: Any) -> tuple[Saved, Base]:
    """An adapter with random matrices on a base model, saved by us and read, and the bare base."""
    model = load_base(folder)[0]
    config = configure(model, **options)
    adapter.attach(model, config, seed=0)
    fill(model)
    adapter.save(directory, model, config)
    return adapter_files.read(directory), Base(model=load_base(folder)[0])


def random_adapter(rank: int, width: int, rows: int, scale: float, names: list[str], *, dora: bool = False) -> Saved:
    rng = np.random.default_rng(rank * width + rows)
    arrays = {}
    for name in names:
        arrays[f"{name}.lora_a"] = mx.array(rng.normal(size=(width, rank)).astype(np.float32))
        arrays[f"{name}.lora_b"] = mx.array(rng.normal(size=(rank, rows)).astype(np.float32))
        if dora:
            arrays[f"{name}.m"] = mx.array(rng.uniform(0.5, 2, rows).astype(np.float32))
    config = LoraConfig(rank, scale, 0.0, tuple(sorted(names)), (), "dora" if dora else "lora")
    return Saved(config, arrays, Path("adapter_config.json"), Path("adapters.safetensors"))


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head"]


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 9),
    width=st.integers(1, 33),
    rows=st.integers(1, 33),
    scale=st.floats(1 / 64, 100),
    dora=st.booleans(),
)
def test_peft_gives_every_number_back(
    tmp_path_factory: pytest.TempPathFactory, rank: int, width: int, rows: int, scale: float, dora: bool
) -> None:
    ours, folder = random_adapter(rank, width, rows, scale, NAMES, dora=dora), tmp_path_factory.mktemp("peft")
    proof = export(ours, folder, "peft", BARE)
    assert find.read(folder).config.scale == pytest.approx(scale, rel=1e-15)
    assert proof.is_exact
    assert proof.modules == 3


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 300), alpha=st.floats(0.1, 1000))
def test_a_scale_that_was_alpha_over_the_rank_comes_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: float
) -> None:
    folder = tmp_path_factory.mktemp("peft")
    export(random_adapter(rank, 2, 2, alpha / rank, NAMES), folder, "peft", BARE)
    assert find.read(folder).config.scale == alpha / rank


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 9), width=st.integers(1, 33), scale=st.floats(1 / 64, 100))
def test_npz_gives_the_same_updates(
    tmp_path_factory: pytest.TempPathFactory, rank: int, width: int, scale: float
) -> None:
    ours, folder = random_adapter(rank, width, 7, scale, NAMES), tmp_path_factory.mktemp("npz")
    export(ours, folder, "npz", BARE)
    read = np.load(folder / "adapters.npz")
    for name in NAMES:
        wanted = scale * np.array(ours.arrays[f"{name}.lora_a"], np.float64) @ np.array(ours.arrays[f"{name}.lora_b"])
        got = 20 * read[f"{name}.lora_a"].astype(np.float64) @ read[f"{name}.lora_b"]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(("scale", "is_exact"), [(20.0, True), (10.0, True), (0.3, False)])
def test_npz_is_exact_where_the_scale_is_20_times_a_power_of_two(tmp_path: Path, scale: float, is_exact: bool) -> None:
    ours = random_adapter(4, 8, 6, scale, NAMES)
    proof = export(ours, tmp_path, "npz", BARE)
    back = find.read(tmp_path)
    assert proof.is_exact == (scale == 20)
    factor = np.float32(scale / 20)
    same = [
        np.array_equal(np.array(back.arrays[name]) / factor, np.array(ours.arrays[name]))
        for name in back.arrays
        if name.endswith("b")
    ]
    assert all(same) == is_exact


@pytest.mark.parametrize("layers", [2, [0, 2], [1]])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_ours_through_peft_is_the_same_folder(tiny_llama: Path, tmp_path: Path, layers: Any, kind: str) -> None:
    ours, base = saved_on(tiny_llama, tmp_path / "ours", type=kind, layers=layers, targets=["all-linear"], dropout=0.1)
    export(ours, tmp_path / "peft", "peft", base)
    there = find.read(tmp_path / "peft", model=base.model)
    export(there, tmp_path / "back", "mlx", base)
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_a_reader_with_scale_20_and_no_config_gives_our_logits(tiny_llama: Path, tmp_path: Path) -> None:
    """The example script's: LoRA layers of scale 20 on q and v, then `load_weights` of the archive."""
    from mlx_lm.tuner.lora import LoRALinear

    ours, _ = saved_on(tiny_llama, tmp_path / "ours", rank=8, alpha=6)
    export(ours, tmp_path / "npz", "npz", BARE)
    model, there = load_base(tiny_llama)[0], load_base(tiny_llama)[0]
    adapter.put(model, ours)
    for layer in there.layers[-2:]:
        layer.self_attn.q_proj = LoRALinear.from_base(layer.self_attn.q_proj, r=8, scale=20.0)
        layer.self_attn.v_proj = LoRALinear.from_base(layer.self_attn.v_proj, r=8, scale=20.0)
    there.load_weights(str(tmp_path / "npz/adapters.npz"), strict=False)
    tokens = mx.array([[1, 2, 3]])
    model.eval(), there.eval()
    np.testing.assert_allclose(there(tokens), model(tokens), rtol=0, atol=1e-4)


def test_an_archive_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    ours = random_adapter(4, 8, 6, 2.0, NAMES)
    for name in "ab":
        export(ours, tmp_path / name, "npz", BARE)
    assert (tmp_path / "a/adapters.npz").read_bytes() == (tmp_path / "b/adapters.npz").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_embedding_crosses(tmp_path: Path, tied: bool) -> None:
    folder = write_model(tmp_path / "base", "llama", tie_word_embeddings=tied)
    ours, base = saved_on(folder, tmp_path / "ours", targets=["q_proj", "embed_tokens"])
    proof = export(ours, tmp_path / "peft", "peft", base)
    assert proof.is_exact
    names = mx.load(str(tmp_path / "peft/adapter_model.safetensors"))
    assert ("base_model.model.lm_head.lora_A.weight" in names) == tied


def test_an_adapter_on_the_embedding_needs_the_base_model(tiny_llama: Path, tmp_path: Path) -> None:
    ours, base = saved_on(tiny_llama, tmp_path / "ours", targets=["embed_tokens"])
    with pytest.raises(ValueError, match=r"adapts model.embed_tokens, and only the base model says .*--manifest$"):
        export(ours, tmp_path / "peft", "peft", BARE)
    export(ours, tmp_path / "peft", "peft", base)
    with pytest.raises(ValueError, match=r"adapts model.embed_tokens, and only the base model says .*--manifest$"):
        find.read(tmp_path / "peft")


def test_an_embedding_adapted_without_its_tied_head_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    untied = write_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    ours, base = saved_on(untied, tmp_path / "ours", targets=["embed_tokens"])
    export(ours, tmp_path / "peft", "peft", base)
    with pytest.raises(ValueError, match=r"adapts model.embed_tokens and not its head with it.*merge_and_unload"):
        find.read(tmp_path / "peft", model=load_base(tiny_llama)[0])


def test_a_tied_head_adapted_without_its_embedding_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    untied = write_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    ours, base = saved_on(untied, tmp_path / "ours", targets=["lm_head"])
    export(ours, tmp_path / "peft", "peft", base)
    with pytest.raises(ValueError, match=r"adapts lm_head and not its embedding with it.*merge_and_unload"):
        find.read(tmp_path / "peft", model=load_base(tiny_llama)[0])


def test_layers_with_different_modules_cross(tiny_llama: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.o_proj"]
    ours = random_adapter(4, 32, 32, 2.0, names)
    export(ours, tmp_path / "peft", "peft", BARE)
    there = find.read(tmp_path / "peft")
    export(there, tmp_path / "mlx", "mlx", BARE)
    model = load_base(tiny_llama)[0]
    adapter.load(model, tmp_path / "mlx")
    assert sorted({name.rpartition(".")[0] for name in adapter.weights(model)}) == sorted(names)
    tokens, again = mx.array([[1, 2, 3]]), load_base(tiny_llama)[0]
    from mlx_lm.tuner.utils import load_adapters

    load_adapters(again, str(tmp_path / "mlx"))
    again.eval()
    assert mx.array_equal(model(tokens), again(tokens)).item()


@pytest.mark.parametrize("to", ["peft", "npz"])
def test_experts_are_refused_by_name(tmp_path: Path, to: str) -> None:
    folder = write_model(tmp_path / "base", "mixtral")
    model, config = attached(folder, "mixtral")
    adapter.save(tmp_path / "ours", model, config)
    with pytest.raises(ValueError, match=r"switch_mlp\.\w+.*merge the adapter.*python -m stages.merge") as error:
        export(adapter_files.read(tmp_path / "ours"), tmp_path / "out", to, BARE)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_module_that_the_checkpoint_names_otherwise_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    weights = cast(dict[str, mx.array], mx.load(str(tiny_llama / "model.safetensors")))
    renamed = {name.replace("self_attn.q_proj", "attn.query"): array for name, array in weights.items()}
    (tmp_path / "base").mkdir()
    mx.save_safetensors(str(tmp_path / "base/model.safetensors"), renamed)
    ours, base = saved_on(tiny_llama, tmp_path / "ours", targets=["q_proj"])
    export(ours, tmp_path / "peft", "peft", dataclasses.replace(base, directory=tiny_llama))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj has another name in the base model's files"):
        export(ours, tmp_path / "out", "peft", dataclasses.replace(base, directory=tmp_path / "base"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["dora", "embedding"])
def test_npz_refuses_what_its_reader_does_not_know(tmp_path: Path, what: str) -> None:
    names = ["model.embed_tokens"] if what == "embedding" else NAMES
    ours = random_adapter(4, 8, 6, 2.0, names, dora=what == "dora")
    with pytest.raises(ValueError, match=rf"no form for {'DoRA' if what == 'dora' else 'model.embed_tokens'}"):
        export(ours, tmp_path / "out", "npz", BARE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["a", "b", "m", "scale", "name"])
def test_any_difference_fails_the_proof(what: str) -> None:
    ours = random_adapter(4, 8, 6, 2.0, NAMES, dora=True)
    arrays, config = dict(ours.arrays), ours.config
    key = f"lm_head.{'m' if what == 'm' else f'lora_{what}'}"
    if what == "scale":
        config = dataclasses.replace(config, scale=2.001)
    elif what == "name":
        arrays = {name.replace("lm_head", "head"): array for name, array in arrays.items()}
    else:
        changed = np.array(arrays[key])
        changed.flat[0] *= 1.001
        arrays[key] = mx.array(changed)
    with pytest.raises(ValueError, match=r"the update of|head is (missing|new)"):
        compare(ours, dataclasses.replace(ours, arrays=arrays, config=config))


def test_a_damaged_adapter_is_one_line(tmp_path: Path) -> None:
    ours = random_adapter(4, 8, 6, 2.0, NAMES)
    arrays = {name: array for name, array in ours.arrays.items() if name != "lm_head.lora_b"}
    with pytest.raises(
        ValueError, match=r"lm_head has lora_a, and a lora adapter has lora_a, lora_b; take a whole copy"
    ):
        export(dataclasses.replace(ours, arrays=arrays), tmp_path, "mlx", BARE)
    wrong = dataclasses.replace(ours, config=dataclasses.replace(ours.config, rank=2))
    with pytest.raises(ValueError, match=r"has rank 4, adapter_config.json says 2; take both files"):
        export(wrong, tmp_path, "peft", BARE)


def test_every_format_is_read_back_by_its_files(tmp_path: Path) -> None:
    ours = random_adapter(4, 8, 6, 2.0, NAMES)
    for to in ("mlx", "peft", "npz"):
        export(ours, tmp_path / to, to, BARE)
        assert find.kind_of(tmp_path / to) == to
        assert {path.name for path in (tmp_path / to).iterdir()} == set(FORMATS[to].files)
