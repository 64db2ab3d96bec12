"""Self-attention of packed sequences: each token sees the tokens of its own sequence.

Shapes: T rows of all sequences, H heads, K width of a head.
On CUDA xformers' ``memory_efficient_attention`` with a ``BlockDiagonalMask``; elsewhere torch's SDPA.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
import torch.nn.functional as F

from mmd2v.models.packed import Layout

logger = logging.getLogger(__name__)


def attend(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return softmax(q kᵀ / √K) v within every sequence of ``layout``, [T, H, K]."""
    if len(q_THK) == 0:
        return v_THK  # nothing to see, on the way to whose weights the gradient of nothing goes
    if layout.joint:
        return _attend_joint(q_THK, k_THK, v_THK, layout)
    # Rows of padding (a reproduction of the source alone has them) need a mask that xformers' packed form has not.
    if q_THK.device.type == "cuda" and not (layout.keys or layout.key_masks) and xformers_available():
        form = (q_THK.dtype, q_THK.shape[-1])
        if form not in _without_kernel:
            try:
                return _attend_xformers(q_THK, k_THK, v_THK, layout)
            except NotImplementedError as error:  # said before anything is computed
                _without_kernel.add(form)
                logger.warning("attention: torch SDPA for heads of %d in %s: %s", form[1], form[0], _reasons(error))
    return attend_sdpa(q_THK, k_THK, v_THK, layout)


_without_kernel: set[tuple[torch.dtype, int]] = set()
"""Dtypes and widths of a head for which xformers has no kernel here: all of them where its extension does not load (a
build for another CUDA), else widths that are no multiple of 8 in 16 bits, and fp32 on devices newer than its kernel."""


def _reasons(error: NotImplementedError) -> str:
    """Shorten xformers' list of inputs and of all its kernels to the reasons, each once."""
    lines = [line.strip() for line in str(error).splitlines()]
    starts = [i for i, line in enumerate(lines) if line.endswith("not supported because:")]
    if not starts:
        return "; ".join(lines[:1])
    return "; ".join(dict.fromkeys(lines[i] for i in range(starts[0], len(lines)) if i not in starts and lines[i]))


@cache
def xformers_available() -> bool:
    """Tell whether xformers can be used on this machine's CUDA device; says loudly when it cannot."""
    if importlib.util.find_spec("xformers") is None:
        logger.warning("attention: xformers is not installed, using torch SDPA with padding (pip install mmd2v[gpu])")
        return False
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:  # a build for another torch raises all kinds of errors at import
        logger.warning("attention: xformers does not load (%s), using torch SDPA with padding", error)
        return False
    return True


def _attend_xformers(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, layout: Layout) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = layout.once(
        "xformers_mask", lambda: BlockDiagonalMask.from_seqlens(layout.all_lengths, device=layout.device)
    )
    return memory_efficient_attention(q_THK[None], k_THK[None], v_THK[None], attn_bias=mask)[0]


def attend_sdpa(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Do the same with torch's SDPA: equally long sequences as a view, others padded to the longest."""
    dtype = q_THK.dtype
    if q_THK.device.type == "cpu" and dtype == torch.bfloat16:
        # The backward of torch's CPU kernel is seven times slower in bf16 than in fp32 at 26 tokens (262 against
        # 41 ms for 128 sequences of 12 heads on one core).
        q_THK, k_THK, v_THK = q_THK.float(), k_THK.float(), v_THK.float()
    parts = []
    of_modality = [layout.split(x) for x in (q_THK, k_THK, v_THK)]
    for modality in layout.modalities:
        qkv = [x[modality] for x in of_modality]
        if len(qkv[0]) == 0:
            parts.append(qkv[2])
        elif layout.is_rectangular(modality):
            parts.append(_rectangular(*(layout.unflatten(x, modality) for x in qkv), layout.is_key(modality)))
        else:
            parts.append(_padded(*qkv, layout, modality))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _rectangular(
    q_SLHK: torch.Tensor, k_SLHK: torch.Tensor, v_SLHK: torch.Tensor, is_key_SL: torch.Tensor | None
) -> torch.Tensor:
    q_SHLK, k_SHLK, v_SHLK = (x.transpose(1, 2) for x in (q_SLHK, k_SLHK, v_SLHK))
    mask = None if is_key_SL is None else is_key_SL[:, None, None, :]
    return _sdpa(q_SHLK, k_SHLK, v_SHLK, mask).transpose(1, 2).flatten(0, 1)


def _attend_joint(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The i-th sequences of all modalities as one."""
    sequences = len(next(iter(layout.lengths.values())))
    dtype = q_THK.dtype
    if q_THK.device.type == "cpu" and dtype == torch.bfloat16:  # as in `attend_sdpa`
        q_THK, k_THK, v_THK = q_THK.float(), k_THK.float(), v_THK.float()

    def together(x_THK: torch.Tensor) -> torch.Tensor:
        parts = [rows.unflatten(0, (sequences, -1)) for rows in layout.split(x_THK).values()]
        return torch.cat(parts, dim=1).transpose(1, 2)

    masks = [
        torch.ones(sequences, int(layout.lengths[name][0]), dtype=torch.bool, device=q_THK.device)
        if layout.is_key(name) is None
        else layout.is_key(name)
        for name in layout.modalities
    ]
    mask = None
    if layout.keys or layout.key_masks:
        mask = torch.cat(masks, dim=1)[:, None, None, :]
    out_SLHK = _sdpa(together(q_THK), together(k_THK), together(v_THK), mask).transpose(1, 2)
    sizes = [int(layout.lengths[name][0]) for name in layout.modalities]
    return torch.cat([part.flatten(0, 1) for part in out_SLHK.split(sizes, dim=1)]).to(dtype)


def _padded(
    q_RHK: torch.Tensor, k_RHK: torch.Tensor, v_RHK: torch.Tensor, layout: Layout, modality: str
) -> torch.Tensor:
    padding = layout.padding(modality)
    q_SHLK, k_SHLK, v_SHLK = (x[padding.row_of_slot].transpose(1, 2) for x in (q_RHK, k_RHK, v_RHK))
    out_SHLK = _sdpa(q_SHLK, k_SHLK, v_SHLK, padding.is_token[:, None, None, :])
    return out_SHLK.transpose(1, 2).flatten(0, 1)[padding.slot_of_row]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    # Autocast would undo the choice of dtype made above.
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
