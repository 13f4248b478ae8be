"""A GGUF whose matrices are packed in llama.cpp's many kinds of blocks, of random content."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

# Where in a block the float16 scales lie: these bytes cannot be random.
_SCALES = {
    Kind.Q4_0: (0,),
    Kind.Q5_0: (0,),
    Kind.Q5_1: (0, 2),
    Kind.Q8_0: (0,),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}
KINDS = tuple(_SCALES)
# Scales by which all kinds have values of about the same size.
_SIZES = {Kind.Q2_K: 0.004, Kind.Q3_K: 0.0015, Kind.Q4_K: 0.0003, Kind.Q5_K: 0.00015, Kind.Q6_K: 0.00004}


def repacked(path: Path, out: Path, kind: Kind) -> Path:
    """Write a GGUF again, its matrices replaced by random blocks of a kind; rows are multiples of 256."""
    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for i, tensor in enumerate(reader.tensors):
        shape = [int(size) for size in reversed(tensor.shape)]
        if len(shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        else:
            writer.add_tensor(tensor.name, random_blocks(kind, (shape[0], shape[1]), seed=i), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def random_blocks(kind: Kind, shape: tuple[int, int], *, seed: int) -> np.ndarray:
    """Rows of packed bytes."""
    random = np.random.default_rng(seed)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (shape[0] * shape[1] // values, size), dtype=np.uint8)
    for place in _SCALES[kind]:
        scale = (_SIZES.get(kind, 0.004) * random.uniform(0.5, 1.5, len(blocks))).astype("<f2")
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)
