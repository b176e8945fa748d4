"""Safetensors files written tensor by tensor and read through a memory map.

The `safetensors` package copies all tensors before it writes them and each one that it reads.  Where the tensors are as
large as a model's weights, these functions keep one at a time in memory.  The format is the package's own: eight bytes
with the length of the header (little-endian), the header in JSON, the data.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.errors import DataError

Array = NDArray[Any]
DTYPES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}
"""The format's word for each numpy type."""
ALIGNMENT = 8


def write_tensors(path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[Array]) -> None:
    """Write a file; it is on disk, complete, when this returns, and not there at all after an error.

    Args:
        path: its folder must exist.
        specs: numpy type and shape by name, in the order of `tensors`.
        tensors: taken one after another, each one let go before the next.

    Raises:
        ValueError: a tensor is not as its spec says, or there are more or fewer of them.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, (dtype, shape)), tensor in zip(specs.items(), tensors, strict=True):
                if tensor.dtype != np.dtype(dtype) or tensor.shape != tuple(shape):
                    raise ValueError(f"{name}: {tensor.dtype} {tensor.shape}, announced as {dtype} {shape}")
                file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def map_tensors(path: Path) -> dict[str, Array]:
    """The tensors of a file, read-only; pages are read when they are looked at and can be dropped at any time.

    Raises:
        DataError: the file is damaged or of another kind.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(mapped[:8], "little")
        if 8 + length > len(mapped):
            raise ValueError("the header is cut short")
        header = json.loads(mapped[8 : 8 + length])
        types = {word: name for name, word in DTYPES.items()}
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                dtype = np.dtype(types[entry["dtype"]])
                count = (end - start) // dtype.itemsize
                flat = np.frombuffer(mapped, dtype, count, 8 + length + start)
                found[name] = flat.reshape(entry["shape"])
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            str(path), found=f"a file that cannot be read ({error})", wanted="a safetensors file",
            cause="it is damaged or was cut short", remedy="delete it and compile again",
        ) from error
