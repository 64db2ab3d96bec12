"""BEiT-2, converted by `mmd2v convert`, as a teacher: timm's graph with the weights of the folder.

Shapes: B images, T tokens (the CLS and the patches), D width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mmd2v.config.schema import TeacherConfig
from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.checkpoints.converted import Architecture, load_state, read_architecture
from mmd2v.models.images import Normalize
from mmd2v.models.teachers.base import Targets, Teacher
from mmd2v.models.timm_backbone import load_exactly

if TYPE_CHECKING:
    from timm.models.beit import Beit


class BEiT2Teacher(Teacher):
    """``beit2:FOLDER``; CLS and tokens are those after the final norm."""

    def __init__(self, folder: str, config: TeacherConfig, where: str) -> None:
        super().__init__(config)
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # slow to import: here, where it is used

        if config.modality != "image":
            raise UserError(f"{where}: 'beit2' sees images; set modality: image, found {config.modality}")
        if config.kwargs:
            raise UserError(f"{where}: a converted checkpoint takes no kwargs; remove them")
        architecture = read_architecture(folder, "beit2", where)
        if config.image_size not in (None, architecture.image_size):
            raise UserError(f"{where}: image_size is {config.image_size}, but {folder} takes {architecture.image_size}")
        self.model = beit_of(architecture)
        load_exactly(self.model, load_state(folder, "beit2", where), f"{where}: the weights in {folder} do not fit")
        mean, std = config.mean or IMAGENET_DEFAULT_MEAN, config.std or IMAGENET_DEFAULT_STD
        self.normalize = Normalize(mean, std, architecture.image_size)
        self.width = architecture.width

    def encode(self, batch: Batch) -> Targets:
        """Return CLS and all tokens after the final norm, [B, T, D] with the CLS in front."""
        tokens_BTD = self.model.forward_features(self.normalize(batch.images, self.dtype))
        return Targets(tokens_BTD[:, 0], tokens_BTD)


def beit_of(architecture: Architecture) -> Beit:
    """Return BEiT-2's graph with random weights."""
    from timm.layers import LayerNorm
    from timm.models.beit import Beit

    return Beit(
        img_size=architecture.image_size,
        patch_size=architecture.patch_size,
        embed_dim=architecture.width,
        depth=architecture.depth,
        num_heads=architecture.heads,
        mlp_ratio=architecture.mlp_ratio,
        norm_layer=partial(LayerNorm, eps=architecture.eps),
        num_classes=0,
        global_pool="token",  # else the norm would come after a mean over the patches
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        init_values=1.0,  # makes the layer scales exist; their values are loaded
    )
