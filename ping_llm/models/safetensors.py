"""Safetensors files read tensor by tensor, each into memory of its own.

The library maps the file; pages once touched count as resident, in the end a whole model. Here a
tensor takes its own size and is gone when let go. bfloat16 is read too, as an ml_dtypes array.
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ping_llm.errors import CheckpointError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MAX_HEADER = 100_000_000  # as in the reference implementation


class SafetensorsFile:
    """One open file; a context manager.

    Attributes:
        shapes: Shape of each tensor by its name.
        dtypes: Dtype of each tensor by its name.
    """

    def __init__(self, path: Path):
        """Reads the header.

        Raises:
            CheckpointError: The file is absent, truncated, or its header is not sound.
        """
        self._path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            self._file.close()
            raise CheckpointError(
                f"{path} is not a sound safetensors file ({error}); fetch it again"
            ) from None

    def _read_header(self) -> None:
        size = self._path.stat().st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"its {size} bytes do not hold a header of {length}")
        header: dict[str, Any] = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._starts: dict[str, int] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                known = ", ".join(DTYPES)
                raise ValueError(f"{name} has dtype {entry['dtype']}, not one of {known}")
            dtype, shape = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            start, end = entry["data_offsets"]
            if min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} {shape} does not fit its bytes {start}..{end}")
            if not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"{name} ends at byte {8 + length + end}, the file at {size}")
            self.shapes[name], self.dtypes[name] = shape, dtype
            self._starts[name] = 8 + length + start

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        tensor = np.empty(self.shapes[name], self.dtypes[name])
        self._file.seek(self._starts[name])
        flat = memoryview(tensor.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        if self._file.readinto(flat) != flat.nbytes:
            raise CheckpointError(f"{self._path} ended within {name}; fetch it again")
        return tensor

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
