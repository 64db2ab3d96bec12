"""Operators that mmd2v calls by name, so that a faster form can stand behind the same call.

They import nothing of mmd2v.
"""

from mmd2v_kernels.contrastive import contrastive
from mmd2v_kernels.distill_target import distill_target
from mmd2v_kernels.expert_mlp import Expert, expert_mlp

__all__ = ["Expert", "contrastive", "distill_target", "expert_mlp"]
