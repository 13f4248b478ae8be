"""NumPy archives of LoRA matrices, read; nothing pickled is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stages.adapters import find, npz

NAME = "model.layers.1.self_attn.q_proj"
PAIR: dict[str, Any] = {
    f"{NAME}.lora_a": np.ones((32, 4), np.float32),
    f"{NAME}.lora_b": np.full((4, 16), 0.5, np.float32),
}


def test_an_archive_of_the_example_script_has_the_scale_20(tmp_path: Path) -> None:
    mx.savez(str(tmp_path / "adapters.npz"), **{name: mx.array(array) for name, array in PAIR.items()})
    saved = npz.read(tmp_path / "adapters.npz")
    assert (saved.config.rank, saved.config.scale, saved.config.type) == (4, 20.0, "lora")
    assert (saved.config.keys, saved.config.layers) == (("self_attn.q_proj",), (1,))
    assert all(np.array_equal(saved.arrays[name], array) for name, array in PAIR.items())


def test_a_config_of_early_mlx_lm_beside_it_has_the_scale(tmp_path: Path) -> None:
    np.savez(tmp_path / "adapters.npz", **PAIR)
    before = find.digest(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text('{"lora_layers": 1, "lora_parameters": {"rank": 4, "alpha": 6, "scale": 10.0, "dropout": 0.0}}')
    assert find.digest(tmp_path) != before
    for path in (tmp_path, tmp_path / "adapters.npz"):
        assert find.read(path).config.scale == 15.0
    config.write_text('{"lora_parameters": {}}')
    with pytest.raises(ValueError, match=r"adapter_config.json: not an adapter's config \(KeyError: 'scale'\)"):
        find.read(tmp_path)
    (tmp_path / "adapters.safetensors").touch()
    assert find.read(tmp_path / "adapters.npz").config.scale == 20.0


def test_modules_of_other_ranks_are_padded(tmp_path: Path) -> None:
    other = NAME.replace("q_proj", "v_proj")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(32, 2)).astype(np.float32), rng.normal(size=(2, 16)).astype(np.float32)
    arrays: dict[str, Any] = {**PAIR, f"{other}.lora_a": a, f"{other}.lora_b": b}
    np.savez(tmp_path / "a.npz", **arrays)
    saved = npz.read(tmp_path / "a.npz")
    padded = np.array(saved.arrays[f"{other}.lora_a"]), np.array(saved.arrays[f"{other}.lora_b"])
    assert (saved.config.rank, padded[0].shape, padded[1].shape) == (4, (32, 4), (4, 16))
    np.testing.assert_array_equal(padded[0] @ padded[1], a @ b)


def test_bfloat16_and_halves_are_read(tmp_path: Path) -> None:
    arrays = {name: mx.array(array).astype(mx.bfloat16) for name, array in PAIR.items()}
    mx.savez(str(tmp_path / "b.npz"), **arrays)
    halves: dict[str, Any] = {name: array.astype(np.float16) for name, array in PAIR.items()}
    np.savez(tmp_path / "h.npz", **halves)
    for file in ("b.npz", "h.npz"):
        saved = npz.read(tmp_path / file)
        assert all(np.array_equal(saved.arrays[name], array) for name, array in PAIR.items())
        assert {array.dtype for array in saved.arrays.values()} == {mx.float32}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({**PAIR, "x": np.ones(2, np.float32)}, "x is no LoRA matrix"),
        ({**PAIR, "x": np.array([{"a": 1}], dtype=object)}, "Object arrays cannot be loaded"),
        ({f"{NAME}.lora_a": PAIR[f"{NAME}.lora_a"]}, "has one of lora_a and lora_b alone"),
        ({**PAIR, f"{NAME}.lora_b": np.ones((3, 16), np.float32)}, r"A \(32, 4\), B \(3, 16\) do not fit"),
        ({name: array.astype(np.int32) for name, array in PAIR.items()}, "no array of floating-point numbers"),
        ({f"{NAME}.lora_a": np.ones((2, 3, 4), "f4"), f"{NAME}.lora_b": np.ones((2, 5, 3), "f4")}, "three dimensions"),
        ({f"{NAME}.lora_a": np.ones(4, "f4"), f"{NAME}.lora_b": np.ones(4, "f4")}, "do not fit"),
        ({**PAIR, f"{NAME}.lora_b": np.full((4, 16), np.nan, np.float32)}, "q_proj holds NaN or infinity"),
        ({}, "empty"),
    ],
)
def test_foreign_archives_are_one_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        npz.read(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "trapped",)

    path = tmp_path / "a.npz"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"a.npz: damaged or not an archive of arrays"):
        npz.read(path)
    assert not (tmp_path / "trapped").exists()


def test_damaged_archives_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **PAIR)
    content = path.read_bytes()
    damaged = [content[:cut] for cut in range(0, len(content), 37)]
    damaged += [content[:at] + b"\xff\x00\xff" + content[at + 3 :] for at in range(0, len(content), 41)]
    refused = 0
    for each in damaged:
        path.write_bytes(each)
        try:
            npz.read(path)  # a byte that nothing depends on may change
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
    assert refused > len(damaged) / 2
    np.save(tmp_path / "single.npy", np.ones(3))
    (tmp_path / "single.npy").rename(path)
    with pytest.raises(ValueError, match="a single array"):
        npz.read(path)
    with pytest.raises(ValueError, match=r"nowhere.npz: no such file"):
        find.read(tmp_path / "nowhere.npz")
