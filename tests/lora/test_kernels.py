"""The fast CPU kernels: MLX's values and gradients to float32 rounding, one model at a time, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import activations
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import QuantizedKVCache

from stages.baseline import baseline
from stages.evaluate import evaluate
from stages.fetch import fetch
from stages.lora import adapter, kernels, patches
from stages.lora.batches import collate
from stages.lora.execution import set_up, use_kernels
from stages.lora.loss import sum_loss
from stages.lora.selfcheck import relative_difference
from stages.merge import merge
from stages.model.load import load_base, on_cpu
from stages.params.loading import load_params
from stages.prepare import prepare
from stages.tokenize import tokenize
from stages.tokens.row import TokenRow
from stages.train import train
from stages.training import checkpoint
from tests.support.adapters import attached, configure_named, fill
from tests.support.imports import ROOT
from tests.support.tiny import CONFIGS, write_model

pytestmark = pytest.mark.skipif(not on_cpu(), reason="the kernels are for CPUs")

Function = Callable[..., mx.array]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, scale=3.0, key=mx.random.key(seed))


def assert_close(fast: mx.array, plain: mx.array, tolerance: float = 1e-5) -> None:
    """Every number to within `tolerance` of the largest."""
    assert fast.shape == plain.shape and fast.dtype == plain.dtype
    assert np.abs(np.array(fast) - np.array(plain)).max() <= tolerance * np.abs(np.array(plain)).max()


def assert_same(fast: Function, plain: Function, *inputs: mx.array) -> None:
    cotangent = normal(*plain(*inputs).shape, seed=9)
    ours_and_theirs = (mx.vjp(function, list(inputs), [cotangent]) for function in (fast, plain))
    for ours, theirs in zip(*ours_and_theirs, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 300, 257)])
@pytest.mark.parametrize(
    ("fast", "plain"),
    [(kernels.silu, nn.silu), (kernels.gelu_approx, nn.gelu_approx), (kernels.tanh, mx.tanh)],
)
def test_activations_are_those_of_mlx(fast: Function, plain: Function, shape: tuple[int, ...]) -> None:
    assert_same(fast, plain, normal(*shape))


def test_activations_of_huge_numbers_are_finite() -> None:
    huge = mx.array([-1e30, -200.0, -89.0, 0.0, 89.0, 200.0, 1e30])
    assert_same(kernels.silu, nn.silu, huge)
    assert_same(kernels.swiglu, activations.swiglu, huge, huge / 1e30)


def test_swiglu_is_that_of_mlx_lm_also_on_the_halves_of_one_array() -> None:
    both = normal(2, 30, 64)
    assert_same(kernels.swiglu, activations.swiglu, both, normal(2, 30, 64, seed=1))
    assert_same(
        lambda x: kernels.swiglu(*mx.split(x, 2, axis=-1)), lambda x: activations.swiglu(*mx.split(x, 2, axis=-1)), both
    )


def test_softmax_is_that_of_mlx() -> None:
    scores = normal(3, 4, 5)
    assert_same(lambda x: kernels.softmax(x, axis=-1, precise=True), lambda x: mx.softmax(x, axis=-1), scores)
    assert_same(lambda x: kernels.softmax(x, axis=1), lambda x: mx.softmax(x, axis=1), scores)


def test_norm_is_that_of_mlx_and_its_weights_can_be_trained() -> None:
    assert_same(
        lambda x, w: kernels.rms_norm(x, w, 1e-5),
        lambda x, w: mx.fast.rms_norm(x, w, 1e-5),
        normal(2, 9, 16),
        normal(16, seed=1),
    )


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [16, 12])
@pytest.mark.parametrize("freqs", [None, mx.array([1.0, 2.0, 5.0, 9.0, 20.0, 30.0, 50.0, 90.0])])
def test_positions_are_those_of_mlx(traditional: bool, dims: int, freqs: mx.array | None) -> None:
    if freqs is not None:
        freqs = freqs[: dims // 2]
    options: dict[str, Any] = {"traditional": traditional, "scale": 0.5, "offset": 3, "freqs": freqs}
    options["base"] = 10_000.0 if freqs is None else None
    x = normal(2, 9, 3, 16).transpose(0, 2, 1, 3)
    assert_same(lambda x: kernels.rope(x, dims, **options), lambda x: mx.fast.rope(x, dims, **options), x)


MASKS: dict[str, Any] = {
    "none": lambda rows, seen: None,
    "causal": lambda rows, seen: "causal",
    "booleans": lambda rows, seen: mx.arange(seen) <= mx.arange(rows)[:, None] + seen // 3,
    "booleans by row": lambda rows, seen: mx.arange(seen) < mx.array([seen, seen // 2])[:, None, None, None],
}


def test_terms_of_a_mask_keep_their_gradient() -> None:
    x, terms = normal(1, 2, 5, 8), normal(1, 2, 5, 5, seed=5)

    def through(attention: Any) -> mx.array:
        return mx.grad(lambda mask: attention(x, x, x, None, scale=0.3, mask=mask).square().sum())(terms)

    assert not kernels._attends(x, x, x, terms, None)
    plain = through(scaled_dot_product_attention)
    assert mx.any(mx.abs(plain) > 1e-2).item() and mx.array_equal(through(kernels.attention), plain).item()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("rows", "seen"), [(1, 1), (7, 7), (5, 9), (300, 300), (130, 200)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_is_that_of_mlx(mask: str, rows: int, seen: int, heads: int, kv_heads: int) -> None:
    options: dict[str, Any] = {"scale": 0.3, "mask": MASKS[mask](rows, seen)}
    # As models have them: turned views of (B, L, heads, D).
    queries = normal(2, rows, heads, 8).transpose(0, 2, 1, 3)
    keys = normal(2, seen, kv_heads, 8, seed=1).transpose(0, 2, 1, 3)
    values = normal(2, seen, kv_heads, 8, seed=2).transpose(0, 2, 1, 3)
    assert kernels._attends(queries, keys, values, options["mask"], None)
    assert_same(
        lambda q, k, v: kernels.attention(q, k, v, None, **options),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, None, **options),
        queries,
        keys,
        values,
    )


def test_sinks_and_quantised_caches_are_left_to_mlx() -> None:
    queries, sinks = normal(1, 2, 4, 32), normal(2)
    ours = kernels.attention(queries, queries, queries, None, 0.5, "causal", sinks)
    theirs = scaled_dot_product_attention(queries, queries, queries, None, 0.5, "causal", sinks)
    assert mx.array_equal(ours, theirs)
    cache = QuantizedKVCache(group_size=32, bits=8)
    keys, values = cache.update_and_fetch(queries, queries)
    # mlx-lm scales the queries that it is given in place.
    ours = kernels.attention(queries + 0, keys, values, cache, 0.5, None)
    assert mx.array_equal(ours, scaled_dot_product_attention(queries + 0, keys, values, cache, 0.5, None))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_other_types_are_left_to_mlx(dtype: mx.Dtype) -> None:
    x = normal(1, 2, 4, 8).astype(dtype)
    pairs = [
        (kernels.silu(x), nn.silu(x)),
        (kernels.swiglu(x, x), activations.swiglu(x, x)),
        (kernels.softmax(x, axis=-1), mx.softmax(x, axis=-1)),
        (kernels.tanh(x), mx.tanh(x)),
        (kernels.rms_norm(x, x[0, 0, 0], 1e-5), mx.fast.rms_norm(x, x[0, 0, 0], 1e-5)),
        (kernels.fast_attention(x, x, x, scale=0.5), mx.fast.scaled_dot_product_attention(x, x, x, scale=0.5)),
    ]
    for ours, theirs in pairs:
        assert ours.dtype == dtype and mx.array_equal(ours, theirs)


def test_cross_entropy_and_its_gradient_are_those_of_mlx() -> None:
    logits, targets = normal(9, 5000), mx.arange(9) * 500
    logits[3, 1500] = 90.0  # the likeliest
    plain = nn.losses.cross_entropy(logits, targets)
    losses, gradient = kernels.cross_entropy_with_gradient(logits, targets)
    assert_close(losses, plain)
    assert_close(gradient, mx.grad(lambda x: nn.losses.cross_entropy(x, targets).sum())(logits))
    losses, correct = kernels.cross_entropy(logits, targets)
    assert_close(losses, plain)
    assert correct.tolist() == (mx.argmax(logits, axis=-1) == targets).tolist()
    assert correct[3].item()


def test_bytes_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SHARE", 1000)
    x, targets = normal(1, 6, 150, 64), mx.arange(900) % 64

    def everything() -> list[mx.array]:
        def attend(x: mx.array) -> mx.array:
            return kernels.fast_attention(x, x[:, :2], x[:, 2:4], scale=0.2, mask="causal")

        functions: list[Function] = [
            kernels.silu,
            kernels.gelu_approx,
            lambda x: kernels.rms_norm(x, x[0, 0, 0], 1e-5),
            attend,
        ]
        out = [part for f in functions for parts in mx.vjp(f, [x], [x]) for part in parts]
        return out + list(kernels.cross_entropy_with_gradient(x.reshape(900, 64), targets))

    by_threads = []
    for count in (1, 2, 5):
        monkeypatch.setattr(kernels, "threads", count)
        by_threads.append([np.array(array).tobytes() for array in everything()])
    assert by_threads[0] == by_threads[1] == by_threads[2]


def fast_modules(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "plain_kind" in vars(type(module))}


def adapted(directory: Path, name: str, kind: str = "lora") -> nn.Module:
    """A model with an adapter that does something, and leaves attention as unsaturated as a trained one does."""
    model, _ = attached(directory, name, kind)
    model.load_weights([(key, 0.1 * array) for key, array in adapter.weights(model).items()], strict=False)
    model.eval()
    return model


def loss_and_gradient(model: nn.Module, rows: list[TokenRow]) -> tuple[mx.array, mx.array]:
    loss, gradients = nn.value_and_grad(model, sum_loss)(model, collate(rows))
    return loss, mx.concatenate([gradient.flatten() for _, gradient in tree_flatten(gradients)])


@pytest.fixture(scope="module", params=list(CONFIGS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_architecture_has_the_same_loss_and_gradient(
    base: tuple[str, Path], rows: list[TokenRow], kind: str, recompute: bool
) -> None:
    name, directory = base
    model = adapted(directory, name, kind)
    plain = loss_and_gradient(model, rows[5:9])
    assert use_kernels(model, rows).passed
    assert any("Attention" in kind for kind in fast_modules(model))
    if recompute:
        patches.patch_layers(model.layers)
    fast = loss_and_gradient(model, rows[5:9])
    assert not mx.array_equal(fast[1], plain[1])  # or it was not used
    off = [relative_difference({"": ours}, {"": theirs}) for ours, theirs in zip(fast, plain, strict=True)]
    assert off[0] < 1e-6 and off[1] < 1e-4


def test_other_models_and_the_model_afterwards_are_as_before(base: tuple[str, Path], rows: list[TokenRow]) -> None:
    name, directory = base
    one, other = (adapted(directory, name) for _ in range(2))
    before = loss_and_gradient(one, rows[5:9])
    assert use_kernels(one, rows).passed
    assert not fast_modules(other)
    for a, b in zip(loss_and_gradient(other, rows[5:9]), before, strict=True):
        assert mx.array_equal(a, b)
    patches.unpatch_kernels(one)
    assert not fast_modules(one)
    for a, b in zip(loss_and_gradient(one, rows[5:9]), before, strict=True):
        assert mx.array_equal(a, b)


def replace_attention(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    plain, _ = patches._REPLACED["scaled_dot_product_attention"]
    monkeypatch.setitem(patches._REPLACED, "scaled_dot_product_attention", (plain, function))


def test_a_model_that_then_says_something_else_is_left_as_it_was(
    model: Any, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_attention(
        monkeypatch, lambda q, k, v, cache, scale, mask: kernels.attention(q, k, v, cache, 2 * scale, mask)
    )
    reason = use_kernels(model, rows).reason
    assert reason is not None and " off in the " in reason
    assert not fast_modules(model)


@pytest.mark.parametrize("wrong", [2.0, float("nan")])
def test_a_model_with_another_gradient_is_left_as_it_was(
    model: Any, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    def attention(q: mx.array, k: mx.array, v: mx.array, cache: Any, scale: float, mask: Any) -> mx.array:
        out = kernels.attention(q, k, v, cache, scale, mask)
        return mx.stop_gradient(out * (1 - wrong)) + out * wrong if wrong == wrong else out * wrong

    replace_attention(monkeypatch, attention)
    adapter.attach(model, configure_named(model, "llama"), seed=0)
    fill(model)
    reason = use_kernels(model, rows).reason
    assert reason is not None and " off in the " in reason


def test_a_model_whose_code_does_not_fit_is_left_as_it_was(
    model: Any, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_attention(monkeypatch, lambda q: q)
    reason = use_kernels(model, rows).reason
    assert reason is not None and "it fails (TypeError" in reason
    assert not fast_modules(model)


def test_a_model_in_half_precision_is_left_as_it_is(tiny_llama: Path, rows: list[TokenRow]) -> None:
    model = load_base(tiny_llama, dtype="float16")[0]
    assert use_kernels(model, rows).note == "model.cpu_kernels is not used: the kernels need model.dtype float32"
    assert not fast_modules(model)


def test_dropout_does_not_look_like_a_difference(model: Any, rows: list[TokenRow]) -> None:
    adapter.attach(model, replace(configure_named(model, "llama"), dropout=0.5), seed=0)
    fill(model)
    model.train()
    options = load_params(ROOT / "params.yaml").model
    made = set_up(model, rows, adapted=adapter.weights(model), options=options, base="a", cache_gb=1)
    assert kernels.in_use(model) and not [note for note in made.notes if "not used" in note]


def swiglu(x: mx.array, gate: mx.array) -> mx.array:
    """One of a model's own, which takes its arguments the other way round."""
    return activations.swiglu(gate, x)


class OwnSwiGLU(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return swiglu(x, 2 * x)


def test_a_function_of_the_same_name_is_another_function() -> None:
    assert patches.kernel_kind(OwnSwiGLU) is None


def test_no_rows_need_no_kernels(model: Any) -> None:
    assert use_kernels(model, []).passed
    assert not fast_modules(model)


def adapter_and_scores() -> tuple[bytes, Any]:
    return (
        Path("artifacts/adapter/adapters.safetensors").read_bytes(),
        json.loads(Path("artifacts/details/evaluate.json").read_text(encoding="utf-8")),
    )


def test_a_run_with_them_ends_where_one_without_them_does(project: Path) -> None:
    for stage in (fetch, prepare, tokenize, baseline, train, merge, evaluate):
        stage()
    weights, scores = adapter_and_scores()
    for stage in (baseline, train, merge, evaluate):
        stage(overrides=["model.cpu_kernels=false"])
    plain_weights, plain_scores = adapter_and_scores()
    assert weights != plain_weights
    for who in ("base", "adapter"):
        found, plain = (numbers["models"][who]["loss"]["value"] for numbers in (scores, plain_scores))
        assert found == pytest.approx(plain, abs=2e-4)


def test_evaluate_uses_them_only_when_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (fetch, prepare, tokenize, baseline, train, merge):
        stage()
    seen: list[int] = []
    plain = patches.patch_kernels

    def patch(model: nn.Module) -> None:
        seen.append(1)
        plain(model)

    monkeypatch.setattr(patches, "patch_kernels", patch)
    baseline(overrides=["model.cpu_kernels=false"])
    evaluate(overrides=["model.cpu_kernels=false"])
    assert seen == []
    baseline()
    assert seen == [1]
    evaluate()
    assert seen == [1, 1, 1]  # base model with adapter, merged model


@pytest.mark.parametrize("stage", [baseline, train, evaluate])
def test_the_user_hears_why_they_are_off(project: Path, capsys: pytest.CaptureFixture[str], stage: Any) -> None:
    for earlier in (fetch, prepare, tokenize, baseline, train, merge):
        earlier()
    capsys.readouterr()
    stage(overrides=["model.dtype=bfloat16"])
    assert "model.cpu_kernels is not used: the kernels need model.dtype float32" in capsys.readouterr().out


def test_a_run_with_them_is_not_taken_up_without_them(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (fetch, prepare, tokenize):
        stage()
    runs: list[str] = []
    whole = checkpoint.fingerprint

    def fingerprint(*ranks: Any, **parts: Any) -> str:
        runs.append(whole(*ranks, **parts))
        return runs[-1]

    monkeypatch.setattr(checkpoint, "fingerprint", fingerprint)
    train()
    train(overrides=["model.cpu_kernels=false"])
    assert runs[0] != runs[1]
