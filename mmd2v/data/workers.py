"""Which of a loader's processes this is."""

from __future__ import annotations

from torch.utils.data import get_worker_info


def worker_share() -> tuple[int, int]:
    """(this worker, number of workers); (0, 1) in the training process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)
