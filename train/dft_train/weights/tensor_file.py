"""A safetensors file that is written while its tensors arrive, one at a time. Called by `export`.

The format (https://github.com/huggingface/safetensors) is eight bytes with the header's length, a JSON header with
the type, shape and place of each tensor, and their bytes. What a file will hold is known from shapes alone, so the
header goes out first and each tensor to its place: no more than one is in memory. The bytes are those of
`safetensors.torch.save_file`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_METADATA = {"format": "pt"}
_ALIGNMENT = 8


def size_in_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """(length and header, where each tensor's bytes begin in the file)."""
    # Wide types first: so every tensor is aligned, and a reader may map it as it is.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": _METADATA}
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        starts[name], end = end, end + size_in_bytes(tensor)
        shape = list(tensor.shape)
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


class TensorFile:
    """`path`, to hold `tensors` (name -> any tensor of that shape and dtype, meta ones too). Raises OSError."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._expected = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        head, self._starts = _header(tensors)
        self._file = path.open("wb")
        self._file.write(head)

    def put(self, name: str, tensor: Tensor) -> bool:
        """Write `tensor` to its place. True when it was the last one, and the file is on the disk."""
        assert self._expected.pop(name) == (tensor.shape, tensor.dtype), name
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.seek(self._starts[name])
        self._file.write(data.numpy().data)
        if self._expected:
            return False
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return True

    def close(self) -> None:
        """Give up. What is still buffered may not fit on the disk, and is not wanted."""
        with contextlib.suppress(OSError):
            self._file.close()
