"""Weights of an ONNX graph: inside the file while it is small, in a file of raw bytes beside it past 1 GB.

Legend: N output features, K input features, G blocks of 32 along K.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

MAX_INLINE_BYTES = 1 << 30  # a protobuf ends at 2 GB, and one that is built holds its bytes twice
BLOCK, ZERO_POINT = 32, 128  # MatMulNBits' block along K, and its zero for 8 bits
PAGE = 4096  # tensors begin at multiples of it, so that a runtime can map them


class Initializers:
    """Collects a graph's weights. A context manager: leaving it closes the data file."""

    def __init__(self, data_file: Path | None) -> None:
        self.tensors: list[onnx.TensorProto] = []
        self._file = data_file.open("wb") if data_file is not None else None
        self._location = data_file.name if data_file is not None else ""

    def add(self, name: str, array: NDArray[np.generic]) -> str:
        """Store one array; returns its name."""
        data = np.ascontiguousarray(array)
        tensor = onnx.TensorProto(
            name=name, dims=data.shape, data_type=helper.np_dtype_to_tensor_dtype(data.dtype)
        )
        # Constants that shape inference reads must be in the graph itself.
        if self._file is None or data.nbytes < PAGE:
            tensor.raw_data = data.tobytes()
        else:
            self._file.write(bytes(-self._file.tell() % PAGE))
            entries = {"location": self._location, "offset": self._file.tell(), "length": data.nbytes}
            self._file.write(data.data)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def quantize_rows(weight_NK: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """8-bit blocks (N, G, 32) and their scales (N, G): value = (byte - 128) · scale, rounded to the nearest.

    Rows that are no multiple of 32 are filled up with zeros.
    """
    num_rows, width = weight_NK.shape
    padded_NK = np.pad(weight_NK, ((0, 0), (0, -width % BLOCK)))
    blocks_NGB = padded_NK.reshape(num_rows, -1, BLOCK)
    scales_NG = np.abs(blocks_NGB).max(axis=-1) / np.float32(127)
    safe_NG1 = np.where(scales_NG == 0, np.float32(1), scales_NG)[..., None]
    bytes_NGB = (np.rint(blocks_NGB / safe_NG1) + ZERO_POINT).astype(np.uint8)
    return bytes_NGB, scales_NG
