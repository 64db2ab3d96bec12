"""Tensors by name as a safetensors file, written piece by piece.

safetensors' own writer keeps Python's lock while it puts the whole file together in memory: a background thread that
calls it stops the training for as long. And it reports a full disk in words of its own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]


def write_tensors(file: TensorFile, write: Callable[[bytes | memoryview], object]) -> None:
    """Hand the bytes of a safetensors file to ``write`` in order. The tensors must be on the host."""
    # Wide types first, as the format's own writer has them: every tensor is aligned then.
    names = sorted(file.tensors, key=lambda name: (-file.tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(file.metadata)} if file.metadata else {}
    end = 0
    for name in names:
        tensor = file.tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(struct.pack("<Q", len(text)) + text)
    for name in names:
        if file.tensors[name].numel():
            write(memoryview(file.tensors[name].contiguous().view(-1).view(torch.uint8).numpy()))
