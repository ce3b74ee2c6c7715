"""Write the header of a safetensors file: the length of its JSON in 8 bytes, little-endian, then the JSON.

The layout is canonical: the same names, dtypes and shapes in the same order always give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence

DTYPES: dict[str, tuple[str, int]] = {  # torch's name: the name in the file, and the bytes of a value
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


def dtype_name(dtype: object) -> str:
    """Return the name in a safetensors file of a `torch.dtype`. KeyError for one that is not in `DTYPES`."""
    return DTYPES[str(dtype).removeprefix("torch.")][0]


def safetensors_header(
    tensors: Iterable[tuple[str, object, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the header of tensors that lie one after the other in the order given, without gaps.

    Each tensor is a name, a `torch.dtype` and a shape. `metadata` comes first, as `__metadata__`. The JSON is padded
    with spaces to a multiple of 8 bytes, so that the data begins aligned.
    """
    fields: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        file_dtype, itemsize = DTYPES[str(dtype).removeprefix("torch.")]
        end = offset + math.prod(shape) * itemsize
        fields[name] = {"dtype": file_dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
