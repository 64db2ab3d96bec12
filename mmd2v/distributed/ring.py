"""The ranks as a ring: each sends to the next and receives from the one before, while it computes.

Shapes: X any, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from mmd2v.distributed.collectives import all_gather_with_gradient, rank, world_size


class RankRing:
    """See `mmd2v_kernels.Ring`. All ranks must take part in each call, with tensors of the same shapes."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return world_size()

    def shift(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Begin to send ``tensors`` to the next rank; call the result to have those of the rank before.

        What is sent must not change before that. With one rank they are its own.
        """
        if self.size == 1:
            return lambda: list(tensors)
        sent = [tensor.contiguous() for tensor in tensors]
        received = [torch.empty_like(tensor) for tensor in sent]
        after, before = (rank() + 1) % self.size, (rank() - 1) % self.size
        # By two ranks, both are the same: the order of the operations tells tensors apart.
        operations = [dist.P2POp(dist.isend, tensor, after) for tensor in sent]
        operations += [dist.P2POp(dist.irecv, tensor, before) for tensor in received]
        works = dist.batch_isend_irecv(operations)

        def wait() -> list[torch.Tensor]:
            for work in works:
                work.wait()
            del sent[:]  # held until here
            return received

        return wait

    def summed(self, tensor_X: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks; its gradient is the sum of theirs."""
        return all_gather_with_gradient(tensor_X[None]).sum(0)
