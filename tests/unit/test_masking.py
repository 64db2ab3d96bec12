"""data2vec's masks: counts, CLS, blocks, padding, and that a sample's masks are its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small import StubTokenizer, random_batch, small_config

from mmd2v.config.schema import MaskingConfig
from mmd2v.errors import UserError
from mmd2v.models.draws import draw
from mmd2v.models.masking import Masking, draw_blocks, gather_visible
from mmd2v.models.packed import Layout
from mmd2v.models.student import build_student

GRID = (14, 14)
CPU = torch.device("cpu")


def draw_masks(batch, kind, lengths, grid=None, has_cls=True, **config):
    layout = Layout.build({kind: lengths}, CPU)
    return Masking(MaskingConfig(**config), kind, grid, has_cls)(batch, layout, kind), layout


def image_masks(images=6, seed=5, grid=GRID, has_cls=True, **config):
    batch = replace(random_batch(images), draw_seed=seed)
    tokens = grid[0] * grid[1] + has_cls
    return draw_masks(batch, "image", [tokens] * images, grid, has_cls, **{"masks": 4, "block": 3, **config})[0]


def as_grid(mask, clones):
    seen = torch.zeros(clones * mask.longest, dtype=torch.bool)
    seen[mask.visible] = True
    return seen.view(clones, mask.longest)


@pytest.mark.parametrize("block", [1, 3])
def test_every_clone_of_an_image_sees_the_same_number_of_patches_and_the_cls(block):
    mask = image_masks(block=block)
    seen_CL = as_grid(mask, 24)
    assert (mask.visible_lengths == 1 + 39).all()  # 196 · 0.2 = 39.2
    assert (seen_CL.sum(dim=1) == 40).all() and seen_CL[:, 0].all()
    assert len(mask.hidden) == 24 * (196 - 39)
    both = torch.cat([mask.visible, mask.hidden]).sort().values
    assert torch.equal(both, torch.arange(24 * 197))
    assert torch.equal(mask.visible, mask.visible.sort().values)
    assert len(seen_CL.unique(dim=0)) == 24  # no two masks are the same


def test_exact_shares_are_not_lost_to_rounding():
    assert (image_masks(grid=(10, 10)).visible_lengths == 21).all()


def test_without_a_cls_no_token_is_kept_for_sure():
    mask = image_masks(has_cls=False, block=1)
    assert (mask.visible_lengths == 39).all()
    assert not as_grid(mask, 24)[:, 0].all()


def test_a_block_is_a_square_around_its_centre_cut_at_the_border():
    keys = torch.arange(2000)
    centres = draw(keys[:, None], torch.zeros(1, dtype=torch.int64))[:, 0] % 30
    for side, before, after in ((3, 1, 1), (2, 1, 0), (4, 2, 1)):
        found = draw_blocks(keys, (5, 6), 1, side)
        for centre, one in zip(centres.tolist(), found, strict=True):
            row, column = divmod(centre, 6)
            expected = torch.zeros(5, 6, dtype=torch.bool)
            rows, columns = (slice(max(0, at - before), at + after + 1) for at in (row, column))
            expected[rows, columns] = True
            assert torch.equal(one, expected)


def test_visible_patches_are_those_of_blocks_before_others():
    mask = image_masks()
    seen = as_grid(mask, 24)[:, 1:]
    blocks = draw_blocks(mask.keys_C, GRID, int(196 * 0.27 / 9), 3).flatten(1)
    for own, block in zip(seen, blocks, strict=True):
        assert (own & ~block).any() == bool(block.sum() < 39)  # others only where all of the blocks are seen
        assert (block & ~own).any() == bool(block.sum() > 39)
    assert (seen & blocks).sum() / seen.sum() > 0.6


def test_texts_of_any_length_lose_their_share_and_never_their_cls():
    lengths = np.array([1, 2, 3, 4, 11, 26, 51])
    batch = replace(random_batch(7), text_lengths=torch.from_numpy(lengths).int(), draw_seed=1)
    mask, _ = draw_masks(batch, "text", lengths, masks=3, ratio=0.48)
    seen_CL = as_grid(mask, 21)
    # of 0, 1, 2, 3, 10, 25 and 50 tokens besides the CLS
    assert mask.visible_lengths.tolist() == np.repeat([1, 1, 2, 2, 6, 14, 27], 3).tolist()
    assert seen_CL.sum(dim=1).tolist() == mask.visible_lengths.tolist() and seen_CL[:, 0].all()
    inside = torch.arange(51)[None, :] < torch.from_numpy(np.repeat(lengths, 3))[:, None]
    assert not seen_CL[~inside].any()
    hidden = torch.zeros(21 * 51, dtype=torch.bool)
    hidden[mask.hidden] = True
    assert torch.equal(hidden.view(21, 51), inside & ~seen_CL)


def test_rows_that_enter_are_those_of_the_visible_tokens():
    lengths = [3, 5, 2]
    batch = replace(random_batch(3), text_lengths=torch.tensor(lengths, dtype=torch.int32))
    mask, layout = draw_masks(batch, "text", lengths, masks=2, ratio=0.5)
    rows = gather_visible(torch.arange(10.0)[:, None], layout, "text", mask)[:, 0]
    starts = [0, 0, 3, 3, 8, 8]
    assert rows.tolist() == [starts[v // 5] + v % 5 for v in mask.visible.tolist()]


def test_masks_follow_the_sample_and_not_its_place():
    batch = replace(random_batch(6, captions=2), draw_seed=9)
    whole, _ = draw_masks(batch, "image", [197] * 6, GRID, masks=2, block=3)
    part = replace(batch, images=batch.images[3:5], sample_ids=batch.sample_ids[3:5])
    own, _ = draw_masks(part, "image", [197] * 2, GRID, masks=2, block=3)
    assert torch.equal(as_grid(own, 4), as_grid(whole, 12)[6:10])
    other, _ = draw_masks(replace(part, draw_seed=10), "image", [197] * 2, GRID, masks=2, block=3)
    assert not torch.equal(as_grid(own, 4), as_grid(other, 4))
    # The two texts of a sample have masks of their own.
    texts, _ = draw_masks(batch, "text", [40] * 12, masks=1, ratio=0.5)
    assert len(as_grid(texts, 12).unique(dim=0)) == 12


def test_without_a_seed_torchs_generator_decides():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(draw_masks(random_batch(2), "image", [197] * 2, GRID, masks=2, block=3)[0].visible)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_tokens_are_hidden_equally_often():
    mask = image_masks(images=50, masks=40, block=1)
    share = as_grid(mask, 2000)[:, 1:].float().mean(dim=0)
    assert (share - 39 / 196).abs().max() < 0.04


MASKED = {"model__masking": {"image": {"masks": 3, "block": 2}}, "model__token_types": "input"}
TERM = {"kind": "data2vec", "teacher": "ema", "modality": "image"}
ONE = {"objectives": [TERM], "teachers": {"ema": {"name": "ema:image"}}}


def test_the_student_sees_clones_in_training_alone():
    student = build_student(small_config(**MASKED, **ONE), StubTokenizer())
    batch = random_batch(4)
    output = student.train()(batch)
    assert output.tokens.layout.lengths["image"].tolist() == [1 + 3] * 12  # 16 · 0.2
    assert output.visible["image"].shape == (48, 16) and output.pooled["image"].shape == (12, 16)
    assert output.pooled["text"].shape == (4, 16)  # no modality but the masked one is cloned
    output = student.eval()(batch)
    assert output.masks == {} and output.pooled["image"].shape == (4, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__masking": {"sound": {}}}, "model.masking: 'sound' is no modality"),
        ({"model__masking": {}}, "objectives.0.modality: 'image' has no hidden tokens to predict"),
        ({"objectives": [TERM, {"kind": "contrastive"}]}, "objectives.1: contrastive sees 'image', whose tokens"),
        ({"teachers": {"ema": {"name": "ema:sound"}}}, "teachers.ema.name: 'ema:sound' averages no modality"),
        ({"teachers": {"ema": {"name": "ema:text"}}}, "teachers.ema.modality: found image, but 'text' sees text"),
        ({"teachers": {"ema": {"name": "timm:x", "ema": {}}}}, "expected a name `ema:MODALITY`"),
        ({"teachers": {"ema": {"name": "ema:image", "outputs": "x"}}}, "outputs: given for 'ema:image'"),
        ({"teachers": {"ema": {"name": "ema:image", "ema": {"decay": 1.0}}}}, "no more than decay_end"),
    ],
)
def test_configs_that_do_not_fit(changes, message):
    with pytest.raises(ValidationError, match=message):
        small_config(**{**MASKED, **ONE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__masking": {"image": {"block": 5}}}, "model.masking.image.block: found 5, the grid has 4 × 4"),
        ({"model__masking": {"image": {}, "text": {"block": 2}}}, "model.masking.text.block: found 2, expected 1"),
        ({"model__encoders__image__token_drop": 0.5}, "model.masking.image: needs .*token_drop: 0, found 0.5"),
    ],
)
def test_students_that_cannot_be_masked(changes, message):
    with pytest.raises(UserError, match=message):
        build_student(small_config(**{**MASKED, **ONE, **changes}), StubTokenizer())
