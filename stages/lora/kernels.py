"""CPU kernels: SiLU, GELU, softmax, attention and cross-entropy by NumPy's vector code.

MLX computes exp on a CPU one number after another, 12 ns each, where NumPy's vector loops take 0.5. These functions do
the same mathematics with other rounding in the last bits; patches.py lets a model's code see them in place of MLX's.

They evaluate their inputs, so `mx.compile` cannot trace them: a step that is to be compiled does without them. What
they do not cover (another device or type than float32, attention sinks, quantised caches) goes on to MLX. A row is
summed by one thread, so the bytes do not depend on how many there are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import activations
from mlx_lm.models import base as mlx_lm_base

Array = np.ndarray[Any, np.dtype[np.float32]]


threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_pool = ThreadPoolExecutor(8, thread_name_prefix="cpu-kernels")

# Numbers that a kernel works on at a time: a few arrays of as many stay in a core's own cache.
_CHUNK = 1 << 16
# Numbers for which another thread is worth waking.
_SHARE = 1 << 18
# Query rows of attention at a time: under a causal mask, what lies right of them is not computed.
_QUERY_ROWS = 128


def _suits(*arrays: mx.array) -> bool:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return on_cpu and all(array.dtype == mx.float32 and array.size > 0 for array in arrays)


def view(array: mx.array) -> Array:
    """MLX's own memory, evaluated. Only an array that nobody else has seen yet is written to."""
    return np.array(array, copy=False)


def detached(array: mx.array) -> mx.array:
    """A copy that remembers nothing of how it came about, so that what is made of it is not kept for gradients."""
    return mx.array(view(array))


def _rows(array: mx.array) -> Array:
    """(…, D) → (rows, D)."""
    content = view(array)
    return content.reshape(-1, content.shape[-1] if content.ndim else 1)


def each(kernel: Callable[..., None], *arrays: Any) -> None:
    """Call `kernel` with the same few rows of all arrays, until all rows are done; large arrays in several threads."""
    count, width = len(arrays[0]), max(1, arrays[0][0].size)
    step = max(1, _CHUNK // width)
    parts = max(1, min(threads, count, count * width // _SHARE))

    def work(first: int, end: int) -> None:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for start in range(first, end, step):
                kernel(*(array[start : min(start + step, end)] for array in arrays))

    bounds = [count * part // parts for part in range(parts + 1)]
    others = [_pool.submit(work, bounds[part], bounds[part + 1]) for part in range(1, parts)]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


# --- x σ(z(x)): SiLU, and the tanh form of GELU, where z = 2 √(2/π) (x + 0.044715 x³) ---

_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = _GELU_LINEAR * 0.044715


def _sigmoid_of(z: Array) -> None:
    np.negative(z, out=z)
    np.exp(z, out=z)
    z += 1
    np.reciprocal(z, out=z)


def _silu_and_slope(x: Array, value: Array, slope: Array) -> None:
    """x σ, and σ + x σ (1 - σ)."""
    np.copyto(slope, x)
    _sigmoid_of(slope)
    np.multiply(x, slope, out=value)
    rest = 1 - slope
    rest *= value
    slope += rest


def _gelu_and_slope(x: Array, value: Array, slope: Array) -> None:
    """x σ(z), and σ + x σ (1 - σ) z'."""
    square = x * x
    np.multiply(square, _GELU_CUBIC, out=slope)
    slope += _GELU_LINEAR
    slope *= x
    _sigmoid_of(slope)
    np.multiply(x, slope, out=value)
    square *= 3 * _GELU_CUBIC
    square += _GELU_LINEAR
    square *= value
    square *= 1 - slope
    slope += square


def _silu_value(x: Array, value: Array) -> None:
    np.negative(x, out=value)
    np.exp(value, out=value)
    value += 1
    np.divide(x, value, out=value)


def _gelu_value(x: Array, value: Array) -> None:
    np.multiply(x, x, out=value)
    value *= _GELU_CUBIC
    value += _GELU_LINEAR
    value *= x
    _sigmoid_of(value)
    value *= x


def _activation(forward: Callable[[Array, Array], None], both: Callable[[Array, Array, Array], None]) -> Any:
    """A function of one array out of its kernels."""

    @mx.custom_function
    def function(x: mx.array) -> mx.array:
        out = mx.zeros(x.shape)
        each(forward, _rows(x), _rows(out))
        return out

    @function.vjp
    def vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        d_x = mx.zeros(x.shape)

        def kernel(x: Array, d_out: Array, d_x: Array) -> None:
            both(x, np.empty_like(x), d_x)
            d_x *= d_out

        each(kernel, _rows(x), _rows(cotangent), _rows(d_x))
        return d_x

    return function


_silu, _gelu_approx = _activation(_silu_value, _silu_and_slope), _activation(_gelu_value, _gelu_and_slope)


def silu(x: mx.array) -> mx.array:
    """`mlx.nn.silu`."""
    return _silu(x) if _suits(x) else nn.silu(x)


def gelu_approx(x: mx.array) -> mx.array:
    """`mlx.nn.gelu_approx`."""
    return _gelu_approx(x) if _suits(x) else nn.gelu_approx(x)


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    out = mx.zeros(gate.shape)

    def kernel(gate: Array, up: Array, out: Array) -> None:
        _silu_value(gate, out)
        out *= up

    each(kernel, _rows(gate), _rows(up), _rows(out))
    return out


@_swiglu.vjp
def _swiglu_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    d_gate, d_up = mx.zeros(gate.shape), mx.zeros(up.shape)

    def kernel(gate: Array, up: Array, d_out: Array, d_gate: Array, d_up: Array) -> None:
        _silu_and_slope(gate, d_up, d_gate)
        d_gate *= up
        d_gate *= d_out
        d_up *= d_out

    each(kernel, _rows(gate), _rows(up), _rows(cotangent), _rows(d_gate), _rows(d_up))
    return d_gate, d_up


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """mlx-lm's `swiglu`: SiLU of `gate`, times `x`."""
    if not _suits(gate, x) or gate.shape != x.shape:
        return cast(mx.array, activations.swiglu(gate, x))
    return cast(mx.array, _swiglu(gate, x))


# --- Norm and positions ---


def _rms_norm(eps: float) -> Any:
    """RMSNorm (…, D) by weights (D,) as a custom function. Source: Zhang and Sennrich (arXiv 1910.07467)."""

    def inverse_rms(x: Array) -> Array:
        squares: Array = np.einsum("ij,ij->i", x, x)[:, None]
        squares /= x.shape[-1]
        squares += eps
        np.sqrt(squares, out=squares)
        return np.reciprocal(squares, out=squares)

    @mx.custom_function
    def norm(x: mx.array, weight: mx.array) -> mx.array:
        out, weight_D = mx.zeros(x.shape), view(weight)

        def kernel(x: Array, out: Array) -> None:
            np.multiply(x, inverse_rms(x), out=out)
            out *= weight_D

        each(kernel, _rows(x), _rows(out))
        return out

    @norm.vjp
    def vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        x, weight = primals
        d_x, weight_D = mx.zeros(x.shape), view(weight)

        def kernel(x: Array, d_out: Array, d_x: Array) -> None:
            inverse = inverse_rms(x)
            np.multiply(d_out, weight_D, out=d_x)
            along = np.einsum("ij,ij->i", d_x, x)[:, None] * inverse**2 / x.shape[-1]
            d_x -= x * along
            d_x *= inverse

        each(kernel, _rows(x), _rows(cotangent), _rows(d_x))
        # Not computed unless somebody trains the norm.
        unit = x * mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + eps)
        return d_x, (cotangent * unit).reshape(-1, x.shape[-1]).sum(axis=0)

    return norm


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **options: Any) -> mx.array:
    """`mx.fast.rms_norm`."""
    if weight is None or options or not _suits(x, weight):
        return mx.fast.rms_norm(x, weight, eps, **options)
    return _rms_norm(eps)(x, weight)


def rope(x: mx.array, dims: int, *, scale: float, **options: Any) -> mx.array:
    """`mx.fast.rope`, of whose steps none is kept for the way back: there it turns by the negative angles."""
    if not _suits(x):
        return mx.fast.rope(x, dims, scale=scale, **options)

    @mx.custom_function
    def rotate(x: mx.array) -> mx.array:
        return mx.fast.rope(detached(x), dims, scale=scale, **options)

    @rotate.vjp
    def vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return mx.fast.rope(detached(cotangent), dims, scale=-scale, **options)

    return cast(mx.array, rotate(x))


# --- Rows ---


@mx.custom_function
def _take(x_RxD: mx.array, rows_N: mx.array) -> mx.array:
    return mx.array(view(x_RxD)[np.array(rows_N, copy=False)])


@_take.vjp
def _take_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x_RxD, rows_N = primals
    d_x_RxD = np.zeros(x_RxD.shape, np.float32)
    np.add.at(d_x_RxD, np.array(rows_N, copy=False), view(cotangent))
    return mx.array(d_x_RxD), mx.zeros_like(rows_N)


def take(x_RxD: mx.array, rows_N: mx.array, *, axis: int) -> mx.array:
    """`mx.take` of rows, the gradient of which MLX adds up one number after another."""
    return cast(mx.array, _take(x_RxD, rows_N)) if axis == 0 and _suits(x_RxD) else mx.take(x_RxD, rows_N, axis=axis)


# --- Attention ---


def _softmax_of(scores: Array) -> None:
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)


def _softmax_slope(probabilities: Array, slope: Array) -> None:
    """d P → d S, in place: P (dP - Σ dP P)."""
    slope -= np.einsum("...i,...i->...", slope, probabilities)[..., None]
    slope *= probabilities


@mx.custom_function
def _softmax(scores: mx.array) -> mx.array:
    out = detached(scores)
    each(_softmax_of, _rows(out))
    return out


@_softmax.vjp
def _softmax_vjp(_: mx.array, cotangent: mx.array, out: mx.array) -> mx.array:
    slope = detached(cotangent)
    each(_softmax_slope, _rows(out), _rows(slope))
    return slope


def softmax(x: mx.array, axis: Any = None, **options: Any) -> mx.array:
    """`mx.softmax`, fast along the last axis."""
    if axis in (-1, x.ndim - 1) and _suits(x) and not set(options) - {"precise"}:
        return cast(mx.array, _softmax(x))
    return mx.softmax(x, axis, **options)


@mx.custom_function
def _tanh(x: mx.array) -> mx.array:
    out = mx.zeros(x.shape)
    each(lambda x, out: np.tanh(x, out=out), _rows(x), _rows(out))
    return out


@_tanh.vjp
def _tanh_vjp(_: mx.array, cotangent: mx.array, out: mx.array) -> mx.array:
    return cotangent * (1 - out * out)


def tanh(x: mx.array, **options: Any) -> mx.array:
    """`mx.tanh`."""
    return cast(mx.array, _tanh(x)) if _suits(x) and not options else mx.tanh(x, **options)


def _attention(scale: float, mask: Any) -> Any:
    """Attention of queries (B, H, L, D) over keys and values (B, K, M, D), K a divisor of H, as a custom function.

    It gives the output and, for the way back, the probabilities of each block of query rows. Queries that share a key
    head are stacked, so that each of the B · K products is one matrix product.
    """
    causal = isinstance(mask, str)

    def blocks(queries: mx.array, keys: mx.array) -> list[tuple[int, int, int]]:
        """First query row, the one behind the last, and how many keys the block sees."""
        length, seen = queries.shape[2], keys.shape[2]
        before = seen - length
        bounds = [(start, min(start + _QUERY_ROWS, length)) for start in range(0, length, _QUERY_ROWS)]
        return [(start, end, before + end if causal else seen) for start, end in bounds]

    def stacked(array_BxHxLxD: mx.array, kv_heads: int, start: int, end: int) -> mx.array:
        batch, _, _, width = array_BxHxLxD.shape
        return array_BxHxLxD[:, :, start:end].reshape(batch, kv_heads, -1, width)

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        batch, heads = queries.shape[:2]
        if isinstance(mask, mx.array):
            allowed_BxHxLxM = np.broadcast_to(
                np.array(mask, copy=False), (batch, heads, queries.shape[2], keys.shape[2])
            )
        outputs, kept = [], []
        for start, end, seen in blocks(queries, keys):
            scores = stacked(queries, keys.shape[1], start, end) @ keys[:, :, :seen].swapaxes(-1, -2)
            scores_HxLxM = view(scores).reshape(batch * heads, end - start, seen)
            if mask is None or causal:
                each(_scaled_softmax(scale, end - start if causal else 0), scores_HxLxM)
            else:
                part = allowed_BxHxLxM[:, :, start:end].reshape(scores_HxLxM.shape)
                each(_masked_softmax(scale), scores_HxLxM, part)
            outputs.append((scores @ values[:, :, :seen]).reshape(batch, heads, end - start, -1))
            kept.append(scores)
        return (outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2), *kept)

    @attend.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        queries, keys, values = primals
        d_output, kv_heads = cotangents[0], keys.shape[1]
        d_queries, d_keys, d_values = [], np.zeros(keys.shape, np.float32), np.zeros(values.shape, np.float32)
        for (start, end, seen), probabilities in zip(blocks(queries, keys), outputs[1:], strict=True):
            d_block = stacked(d_output, kv_heads, start, end)
            slope = d_block @ values[:, :, :seen].swapaxes(-1, -2)

            def kernel(probabilities: Array, slope: Array) -> None:
                _softmax_slope(probabilities, slope)
                slope *= scale

            each(kernel, _rows(probabilities), _rows(slope))
            d_queries.append((slope @ keys[:, :, :seen]).reshape(*queries.shape[:2], end - start, -1))
            d_keys[:, :, :seen] += view(slope.swapaxes(-1, -2) @ stacked(queries, kv_heads, start, end))
            d_values[:, :, :seen] += view(probabilities.swapaxes(-1, -2) @ d_block)
        return mx.concatenate(d_queries, axis=2), mx.array(d_keys), mx.array(d_values)

    return attend


def _scaled_softmax(scale: float, causal_rows: int) -> Callable[[Array], None]:
    """Softmax of scaled scores; of the last `causal_rows` columns, row i sees the first i + 1."""
    beyond = np.triu(np.full((causal_rows, causal_rows), -np.inf, np.float32), k=1)

    def kernel(scores_HxLxM: Array) -> None:
        scores_HxLxM *= scale
        if causal_rows:
            scores_HxLxM[..., -causal_rows:] += beyond
        _softmax_of(scores_HxLxM)

    return kernel


def _masked_softmax(scale: float) -> Callable[[Array, Any], None]:
    """Softmax of scaled scores under a mask of booleans: which may be seen."""

    def kernel(scores_HxLxM: Array, mask_HxLxM: Any) -> None:
        scores_HxLxM *= scale
        np.copyto(scores_HxLxM, np.finfo(np.float32).min, where=~mask_HxLxM)
        _softmax_of(scores_HxLxM)

    return kernel


def _attends(queries: mx.array, keys: mx.array, values: mx.array, mask: Any, sinks: Any) -> bool:
    """True if `_attention` covers this case."""
    if sinks is not None or not _suits(queries, keys, values) or queries.shape[1] % keys.shape[1]:
        return False
    if mask is None:
        return True
    if isinstance(mask, str):
        return mask == "causal" and keys.shape[2] >= queries.shape[2]
    # Terms to add may have a gradient of their own, as in multi-head latent attention.
    return mask.ndim <= 4 and mask.dtype == mx.bool_


def fast_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any = None, **options: Any
) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`."""
    if set(options) <= {"sinks"} and _attends(queries, keys, values, mask, options.get("sinks")):
        return _attention(scale, mask)(queries, keys, values)[0]
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, **options)


def attention(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention`."""
    if hasattr(cache, "bits"):
        return mlx_lm_base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    return fast_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


# --- Cross-entropy ---


def cross_entropy_with_gradient(logits_NxV: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array]:
    """Losses in nats (N,), and the gradient of their sum by the logits (N, V), with one exp a logit; float32."""
    gradient_NxV, losses_N = mx.zeros(logits_NxV.shape), mx.zeros(targets_N.shape)

    def kernel(logits: Array, targets: Any, gradient: Array, losses: Array) -> None:
        at = np.arange(len(logits)), targets
        np.subtract(logits, logits.max(axis=-1, keepdims=True), out=gradient)
        chosen = gradient[at]
        np.exp(gradient, out=gradient)
        total = gradient.sum(axis=-1)
        np.subtract(np.log(total), chosen, out=losses)
        gradient *= (1 / total)[:, None]
        gradient[at] -= 1

    each(kernel, view(logits_NxV), view(targets_N), view(gradient_NxV), view(losses_N))
    return losses_N, gradient_NxV


def cross_entropy(logits_NxV: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array]:
    """Losses in nats (N,), and whether the target is the likeliest token (N,); float32."""
    losses_N, correct_N = mx.zeros(targets_N.shape), mx.zeros(targets_N.shape, dtype=mx.bool_)

    def kernel(logits: Array, targets: Any, losses: Array, correct: Any) -> None:
        rows, best = np.arange(len(logits)), logits.argmax(axis=-1)
        shifted = logits - logits[rows, best][:, None]
        chosen = shifted[rows, targets]
        np.exp(shifted, out=shifted)
        np.subtract(np.log(shifted.sum(axis=-1)), chosen, out=losses)
        np.equal(best, targets, out=correct)

    each(kernel, view(logits_NxV), view(targets_N), view(losses_N), view(correct_N))
    return losses_N, correct_N


def in_use(model: nn.Module) -> bool:
    """True if a model's code sees these functions in place of MLX's (see patches.py)."""
    return bool(getattr(model, "has_cpu_kernels", False))
