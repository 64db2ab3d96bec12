"""How `expert_mlp`'s kernels find their work: each expert's rows are cut into pieces, and a program takes one.

The host counts the pieces and hands over where each expert's rows end and where its weights lie; `find_piece` says in
the kernel which rows a program has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mmd2v_kernels.host_lists import on_device

__all__ = ["count_pieces", "find_piece", "sum_per_expert", "upload_addresses", "upload_stops"]


@triton.jit
def find_piece(piece, stops_ptr, experts, SIZE: tl.constexpr):
    """Return the expert of a piece, its first row and its end: each expert's rows are cut into pieces of SIZE."""
    expert = 0
    first = 0
    end = 0
    begin = 0
    before = 0
    for e in range(0, experts):
        stop = tl.load(stops_ptr + e)
        count = tl.cdiv(stop - begin, SIZE)
        here = (piece >= before) & (piece < before + count)
        start = begin + (piece - before) * SIZE
        expert = tl.where(here, e, expert)
        first = tl.where(here, start, first)
        end = tl.where(here, tl.minimum(start + SIZE, stop), end)
        before += count
        begin = stop
    return expert, first, end


def count_pieces(rows: Sequence[tuple[int, int]], size: int) -> list[int]:
    """Return into how many pieces of at most ``size`` rows each expert's are cut (see `find_piece`)."""
    return [triton.cdiv(stop - start, size) for start, stop in rows]


def upload_stops(rows: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Return where each expert's rows end, int32 [E], on the device."""
    return on_device([stop for _, stop in rows], torch.int32, device)


def upload_addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return where the tensors lie, int64 [E], on their device."""
    return on_device([t.data_ptr() for t in tensors], torch.int64, tensors[0].device)


def sum_per_expert(partial_PX: torch.Tensor, pieces: list[int]) -> list[torch.Tensor]:
    """Add up the partial sums of each expert's pieces; 0 where it has none."""
    return [part.sum(dim=0) for part in partial_PX.split(pieces)]
