"""A GGUF file's metadata, and its tensors as MLX or NumPy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np

GROUP_SIZE = 32  # values that share a scale in every GGUF quantisation that MLX packs as it is
_PLAIN = {"F32", "F16", "BF16"}
_AS_IN_MLX = {"F32", "F16", "Q4_0", "Q4_1", "Q8_0"}


class GgufFile:
    """A GGUF file, opened.

    Raises:
        ValueError: it is none, or cut off.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self._path = path
        try:
            self._reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in self._reader.fields.items()}
        # The reader checks little: a file that is cut off fails wherever it ends.
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise
            raise self._unreadable(error) from None

    def _unreadable(self, error: object) -> ValueError:
        reason = " ".join(str(error).split())[:200]
        return ValueError(f"{self._path.name} cannot be read as GGUF: {reason}; take a whole copy")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata; `default` is the GGUF specification's, where it has one.

        Raises:
            ValueError: there is neither.
        """
        if key not in self.metadata and default is None:
            raise ValueError(f"the GGUF has no {key!r}")
        return self.metadata.get(key, default)

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors by name, rows first.

        Where MLX packs each kind in the file as it is (Q4_0, Q4_1, Q8_0), a packed weight comes as MLX's `weight`,
        `scales` and `biases`. Else every tensor comes as values: of other kinds (Q4_K, Q6_K, …) in float16, rounded.

        Raises:
            ValueError: a kind that cannot be unpacked, or values too large for float16.
        """
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors}
        return self._packed() if kinds <= _AS_IN_MLX else self._unpacked()

    def _packed(self) -> dict[str, np.ndarray]:
        import mlx.core as mx

        try:
            arrays = cast(dict[str, mx.array], mx.load(str(self._path)))
        except RuntimeError as error:
            raise self._unreadable(error) from None
        return {name: np.array(array) for name, array in arrays.items()}

    def _unpacked(self) -> dict[str, np.ndarray]:
        import gguf

        result = {}
        for tensor in self._reader.tensors:
            try:
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(
                    f"{self._path.name}: {tensor.name} is packed as {tensor.tensor_type.name}, which is not known; "
                    "take a file in another quantisation, such as Q4_K_M or Q8_0"
                ) from None
            values = np.array(values).reshape([int(size) for size in reversed(tensor.shape)])
            if tensor.tensor_type.name not in _PLAIN:
                with np.errstate(over="ignore"):
                    values = values.astype(np.float16)
                if not np.isfinite(values).all():
                    raise ValueError(f"{self._path.name}: {tensor.name} holds values too large for float16")
            result[tensor.name] = values
        return result
