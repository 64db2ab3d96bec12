"""Operators that mmd2v calls by name, so that a faster form can stand behind the same call.

They import nothing of mmd2v.
"""

from mmd2v_kernels.add_layer_norm import add_layer_norm
from mmd2v_kernels.candidate_logsumexp import candidate_logsumexp
from mmd2v_kernels.contrastive import ContrastiveWeights, contrastive
from mmd2v_kernels.cosine_topk import cosine_topk
from mmd2v_kernels.dispatch import describe
from mmd2v_kernels.distill_target import distill_loss, distill_target
from mmd2v_kernels.expert_mlp import Expert, expert_mlp
from mmd2v_kernels.half_products import linear
from mmd2v_kernels.rank_count import RankCounts, best_positives, count_ahead, rank_count
from mmd2v_kernels.rank_sides import Best
from mmd2v_kernels.ring import Ring, ring_contrastive, ring_siglip
from mmd2v_kernels.routing import Route, leave_out, route
from mmd2v_kernels.siglip import siglip

__all__ = [
    "Best",
    "ContrastiveWeights",
    "Expert",
    "RankCounts",
    "Ring",
    "Route",
    "add_layer_norm",
    "best_positives",
    "candidate_logsumexp",
    "contrastive",
    "cosine_topk",
    "count_ahead",
    "describe",
    "distill_loss",
    "distill_target",
    "expert_mlp",
    "leave_out",
    "linear",
    "rank_count",
    "ring_contrastive",
    "ring_siglip",
    "route",
    "siglip",
]
