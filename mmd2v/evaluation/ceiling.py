"""What recall a perfect reader of the captions reaches on a generated world: retrieval by the facts they name.

Shapes: M images, N captions.
"""

from __future__ import annotations

import numpy as np

from mmd2v.data.generate import facts_from_json
from mmd2v.data.shards import ShardSet
from mmd2v.data.synthetic import facts_score_matrix, scene
from mmd2v.errors import UserError
from mmd2v.evaluation.retrieval import RECALL_AT


def facts_ceiling(shards: ShardSet) -> dict[str, float]:
    """Return recall (``i2t_R@1`` … ``t2i_R@10``) when the score is the share of a caption's facts true of a scene.

    Raises UserError when the shards were not written by ``mmd2v data synth``.
    """
    scenes, facts, owners = [], [], []
    for position in range(len(shards)):
        sample = shards.read(*shards.locate(position))
        if "facts" not in sample.meta or "scene" not in sample.meta:
            raise UserError(f"{sample.where}: carries no facts; expected shards written by `mmd2v data synth`")
        scenes.append(scene(**sample.meta["scene"]))
        facts += [facts_from_json(record) for record in sample.meta["facts"]]
        owners += [position] * len(sample.meta["facts"])
    return score_recall(facts_score_matrix(facts, scenes), np.array(owners))


def score_recall(scores_NM: np.ndarray, caption_image_N: np.ndarray) -> dict[str, float]:
    """Return recall in both directions from a caption × image score matrix, ties by lowest index.

    ``caption_image_N`` gives the image each caption belongs to. Images without caption are candidates, no queries.
    """
    captions, images = scores_NM.shape
    own_N = scores_NM[np.arange(captions), caption_image_N][:, None]
    column_M = np.arange(images)
    ahead = (scores_NM > own_N) | ((scores_NM == own_N) & (column_M < caption_image_N[:, None]))
    text_rank_N = ahead.sum(axis=1)

    positive_NM = caption_image_N[:, None] == column_M
    described_M = positive_NM.any(axis=0)
    best_row_M = np.where(positive_NM, scores_NM, -np.inf).argmax(axis=0)  # argmax takes the lowest of equals
    best_M = scores_NM[best_row_M, column_M]
    row_N = np.arange(captions)[:, None]
    ahead = ~positive_NM & ((scores_NM > best_M) | ((scores_NM == best_M) & (row_N < best_row_M)))
    image_rank_M = ahead.sum(axis=0)[described_M]
    ranks = {"i2t": image_rank_M, "t2i": text_rank_N}
    return {f"{name}_R@{k}": float((rank < k).mean()) for name, rank in ranks.items() for k in RECALL_AT}
