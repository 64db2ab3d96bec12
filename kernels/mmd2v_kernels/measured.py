"""What was measured to be the fastest path of an operator, by device.

`benchmarks/kernels` and `benchmarks/retrieval` write the rows, of what is in `benchmarks/results`; nothing is entered
here that was not measured. Without a row for a device the kernels of this package are not chosen on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["MEASURED", "Measurement", "fastest"]


class Measurement(NamedTuple):
    """The fastest path of an operator, or of one part of it, on one kind of device."""

    operator: str
    """Such as "distill_target", or "expert_mlp/wgrad" for a part."""
    device: str
    """As the driver names it."""
    dtype: torch.dtype
    from_rows: int
    """Holds from this many rows on, up to the next entry."""
    path: str


_H100, _BF16 = "NVIDIA H100 80GB HBM3", torch.bfloat16

MEASURED: tuple[Measurement, ...] = (
    Measurement("expert_mlp", _H100, _BF16, 10_240, "reference"),
    Measurement("expert_mlp", _H100, _BF16, 81_920, "triton"),
    # fc2 alone is faster by our kernel (0.60 against 0.65 ms at 81,920 rows), the whole is not.
    *(
        Measurement(f"expert_mlp/{part}", _H100, _BF16, 0, "segmented")
        for part in ("fc1", "fc2", "dgrad2", "wgrad", "dgrad1")
    ),
    Measurement("distill_target", _H100, _BF16, 0, "triton"),
    Measurement("add_layer_norm", _H100, _BF16, 0, "triton"),
    *(
        Measurement(operator, _H100, dtype, 0, "triton")
        for operator in ("rank_count", "cosine_topk")
        for dtype in (torch.float32, _BF16)
    ),
)


def fastest(
    operator: str, device: str, dtype: torch.dtype, rows: int | None, table: tuple[Measurement, ...] = MEASURED
) -> str | None:
    """Return the path measured to be the fastest, None where nothing was measured.

    ``rows`` None asks for the entry of the most rows.
    """
    found = [
        entry
        for entry in table
        if (entry.operator, entry.device, entry.dtype) == (operator, device, dtype)
        and (rows is None or entry.from_rows <= rows)
    ]
    return max(found, key=lambda entry: entry.from_rows).path if found else None
