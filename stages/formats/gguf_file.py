"""A GGUF file: written tensor by tensor, and read back tensor by tensor against what it was to hold.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md); the `gguf` package writes, reads and packs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value

from stages.sources.gguf_architectures import permute, unpermute

BLOCK = 32  # values of a Q8_0 block
DTYPES = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its name in GGUF, its shape (rows first), its type in the file, and how to read its values.

    `read` gives float32 as the source has them. `heads`: llama.cpp interleaves the rows of so many heads. `shift` is
    added to the values in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], np.ndarray]
    heads: int | None = None
    shift: int = 0

    def stored(self) -> np.ndarray:
        """The values as the file has them, before packing."""
        array = self.read()
        array = permute(array, heads=self.heads) if self.heads else array
        return array + np.float32(self.shift) if self.shift else array

    def restored(self, stored: np.ndarray) -> np.ndarray:
        """The source's values from those of the file."""
        array = unpermute(stored, heads=self.heads) if self.heads else stored
        return array - np.float32(self.shift) if self.shift else array


def kind_for(shape: Sequence[int], dtype: str) -> Kind:
    """The type of a tensor in a file of `dtype`: vectors stay float32, rows that no whole blocks fill float16."""
    if len(shape) < 2:
        return Kind.F32
    return Kind.F16 if dtype == "q8_0" and shape[-1] % BLOCK else DTYPES[dtype]


def write(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Write a GGUF; one tensor is in memory at a time. The same content gives the same bytes.

    Raises:
        ValueError: a value is not finite, or too large for the type.
    """
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor in tensors:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
            writer.add_tensor_info(
                tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape, dtype=np.int64)), tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_packed(tensor.stored(), tensor))
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: Value.BOOL, int: Value.UINT32, float: Value.FLOAT32, str: Value.STRING}
    if isinstance(value, list):
        if value:
            items = {int: Value.INT32}.get(type(value[0]), kinds[type(value[0])])
            writer.add_key_value(key, value, Value.ARRAY, sub_type=items)
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def _packed(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The bytes of a float32 array in the tensor's type."""
    if not np.isfinite(array).all():
        raise ValueError(f"{tensor.name}: holds a value that is not finite; train or merge again")
    if tensor.kind == Kind.F16:
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"{tensor.name}: holds {np.abs(array).max():g}, too large for f16; take bf16 or f32")
        return half.view(np.uint8)
    return np.ascontiguousarray(gguf.quantize(array, tensor.kind)).view(np.uint8)


def verify(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Compare a file with what it was to hold, from the file back: values unpacked, rows in the source's order.

    Values in f32, f16 and bf16 must be the source's in that type, bit for bit (norms stored plus 1: to float32's
    rounding); in q8_0 within half a step of their block.

    Raises:
        ValueError: anything is missing, left over or different.
    """
    reader = gguf.GGUFReader(path)
    for key, value in metadata.items():
        if not isinstance(value, list) or value:
            field = reader.get_field(key)
            if field is None or not _equal(field.contents(), value):
                raise ValueError(f"{path.name}: {key} reads back as another value than was written; export again")
    there = {tensor.name: tensor for tensor in reader.tensors}
    if there.keys() != {tensor.name for tensor in tensors}:
        raise ValueError(f"{path.name}: reads back with other tensors than were written; export again")
    for tensor in tensors:
        found = there[tensor.name]
        values = gguf.dequantize(found.data, found.tensor_type).astype(np.float32, copy=False).reshape(tensor.shape)
        wanted = tensor.read()
        if not _within(tensor.restored(values), wanted, tensor):
            raise ValueError(f"{path.name}: {tensor.name} reads back with other values than were written; export again")


def _equal(found: Any, wanted: Any) -> bool:
    first = wanted[0] if isinstance(wanted, list) else wanted
    if isinstance(first, float):
        return bool(np.array_equal(np.array(found, np.float32), np.array(wanted, np.float32)))
    return bool(found == wanted)


def _within(found: np.ndarray, wanted: np.ndarray, tensor: Tensor) -> bool:
    if tensor.kind == Kind.Q8_0:
        blocks = wanted.reshape(-1, BLOCK)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        # Half a step of 1/127, and what float16 loses of the step itself, 127 times.
        bound = largest * (0.5 / 127 + 2**-11) * 1.001 + 127 * 2.0**-25
        return bool((np.abs(found.reshape(-1, BLOCK) - blocks) <= bound).all())
    if tensor.kind == Kind.F32:
        slack = 2.0**-23 if tensor.shift else 0.0  # adding 1 rounds
        return bool((np.abs(found - wanted) <= slack * np.maximum(np.abs(wanted), 1)).all())
    packed = gguf.quantize(wanted, tensor.kind)
    return bool(np.array_equal(found, gguf.dequantize(packed, tensor.kind).reshape(wanted.shape)))
