"""A queue of the newest teacher vectors of all ranks, of which each rank holds its share.

The queue is one ring of ``size`` places; place p is with rank p mod W, so that every rank has its share of the filled
part from the first step on. All ranks see the same rows come in in the same order, hence the queue does not depend on
the number of ranks. Its tensors are no buffers of a module: what is done to buffers (averaged over ranks, saved once
for all ranks, cast to the engine's precision) is wrong for them.

Shapes: W ranks, K places of this rank, M new rows of all ranks, q queries of this rank, Q of all ranks, C width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from mmd2v.data.batch import Batch
from mmd2v.distributed.collectives import all_gather_with_gradient, rank, world_size
from mmd2v.errors import UserError
from mmd2v_kernels import candidate_logsumexp

UNKNOWN = 0
"""Owner of a row whose sample has no id: it is a candidate of every query."""


class MemoryBank:
    """Rows with their samples' ids; a place counts once a row that counts was put there."""

    def __init__(self, size: int, width: int, dtype: torch.dtype, where: str) -> None:
        """``size`` are the places of all ranks. Raises UserError when the ranks cannot have equally many."""
        ranks = world_size()
        if size % ranks:
            raise UserError(
                f"{where}: found {size}, expected a multiple of the {ranks} ranks, such as {size - size % ranks}"
            )
        self.size, self.where = size, where
        self.rows_KC = torch.zeros(size // ranks, width, dtype=dtype)
        self.owners_K = torch.zeros(size // ranks, dtype=torch.int64)
        self.counts_K = torch.zeros(size // ranks, dtype=torch.bool)
        self.inserted = 0
        """Rows put in since the start: the next place, known on the host because batch sizes are."""

    def logsumexp(self, query_qC: torch.Tensor, owner_q: torch.Tensor) -> torch.Tensor:
        """Return [q], log Σ exp(query · row) over the rows of all ranks that are of another sample than the query.

        Every rank computes the part of its own rows for the queries of all ranks; every rank must call it and take
        part in the backward pass.
        """
        self._follow(query_qC.device)
        if world_size() == 1:
            return candidate_logsumexp(query_qC, self.rows_KC, self.counts_K, owner_q, self.owners_K)
        query_QC, owner_Q = all_gather_with_gradient(query_qC), all_gather_with_gradient(owner_q)
        part_Q = candidate_logsumexp(query_QC, self.rows_KC, self.counts_K, owner_Q, self.owners_K)
        # The gather's backward brings each part the gradient of the rank that owns the query.
        parts_WQ = all_gather_with_gradient(part_Q[None])
        return parts_WQ.narrow(1, rank() * len(query_qC), len(query_qC)).logsumexp(dim=0)

    @torch.no_grad()
    def push(self, row_MC: torch.Tensor, owner_M: torch.Tensor, counts_M: torch.Tensor) -> None:
        """Put new rows, which are the same on every rank, in the place of the oldest.

        A row that is not finite takes its place without counting: it would spoil the loss of many steps to come.
        """
        self._follow(row_MC.device)
        finite_M = row_MC.isfinite().all(dim=1)
        row_MC, counts_M = row_MC.where(finite_M[:, None], 0), counts_M & finite_M
        ranks, own = world_size(), len(self.rows_KC)
        overrun = max(0, len(row_MC) - self.size)  # rows that later ones of the same step would push out again
        place = self.inserted + overrun
        first = (rank() - place) % ranks
        start = (place + first) // ranks % max(own, 1)
        new = [tensor[overrun + first :: ranks] for tensor in (row_MC, owner_M, counts_M)]
        before_the_end = own - start
        for held, rows in zip((self.rows_KC, self.owners_K, self.counts_K), new, strict=True):
            head, tail = rows[:before_the_end], rows[before_the_end:]
            held[start : start + len(head)] = head.to(held.dtype)
            held[: len(tail)] = tail.to(held.dtype)
        self.inserted += len(row_MC)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what this rank must keep to go on."""
        return {
            "rows": self.rows_KC,
            "owners": self.owners_K,
            "counts": self.counts_K,
            "inserted": torch.tensor([self.inserted]),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a state. Raises UserError when it is of a bank of another size, width or precision."""
        own = self.state()
        if missing := own.keys() - state.keys():
            raise UserError(f"{self.where}: the checkpoint holds no {', '.join(sorted(missing))} of the bank")
        for name, value in own.items():
            found = state[name]
            if found.shape != value.shape or found.dtype != value.dtype:
                raise UserError(f"{self.where}: checkpoint {_form(found)} ({name} of a rank), this run {_form(value)}")
        self.rows_KC, self.owners_K, self.counts_K = state["rows"], state["owners"], state["counts"]
        self.inserted = int(state["inserted"])

    def dealt(self, states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return this rank's state of a bank whose ``states`` [V] another number of ranks, V, wrote; in their order.

        The ring is put together and dealt anew, so the queue is to the bit that of a run that always had as many ranks
        as this one. Raises UserError when the states are not of one bank.
        """
        expected = self.state().keys()
        if missing := [name for state in states for name in expected if name not in state]:
            raise UserError(f"{self.where}: the checkpoint holds no {missing[0]} of the bank")
        forms = {tuple(f"{name} {_form(state[name])}" for name in expected) for state in states}
        counters = {int(state["inserted"]) for state in states}
        if len(forms) > 1 or len(counters) > 1:
            raise UserError(f"{self.where}: the checkpoint is damaged: its ranks wrote parts of different banks")
        ring = {
            # Place p was row p // V of rank p mod V.
            name: torch.stack([state[name] for state in states], dim=1).flatten(0, 1)
            for name in ("rows", "owners", "counts")
        }
        own = {name: value[rank() :: world_size()].contiguous() for name, value in ring.items()}
        return {**own, "inserted": states[0]["inserted"]}

    def _follow(self, device: torch.device) -> None:
        """Be where the rows are: the engine moves modules, and this is none."""
        if self.rows_KC.device != device:
            self.rows_KC, self.owners_K, self.counts_K = (
                tensor.to(device) for tensor in (self.rows_KC, self.owners_K, self.counts_K)
            )


def _form(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def sample_numbers(batch: Batch) -> torch.Tensor:
    """Return int64 [B] on the batch's device: 63 bits of a hash of each sample's id, `UNKNOWN` where it has none."""
    device = batch.images.device
    if not batch.sample_ids:
        return torch.full((len(batch),), UNKNOWN, dtype=torch.int64, device=device)
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in batch.sample_ids)
    numbers = torch.tensor([max(1, int.from_bytes(digest, "little") >> 1) for digest in digests], dtype=torch.int64)
    # From pinned memory: else the host would wait for the device.
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
