"""Image–text matching: joint sequences against a plain computation, the draw of negatives, what is left out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from small import StubTokenizer, random_batch, small_config

from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.objectives import build_objectives
from mmd2v.objectives.matching import hard_negatives

KINDS = {
    "separate": {"kind": "separate"},
    "mome": {"kind": "mome"},
    "shared": {"kind": "shared"},
    "joint expert": {"kind": "mome", "joint_expert": True, "layer_scale": 0.7},
    "joint expert beside a shared MLP": {"kind": "shared", "joint_expert": True},
    "post-norm": {"kind": "mome", "norm": "post", "joint_expert": True},
    "sub-norm": {"kind": "separate", "sub_norm": True},
}


def build(layers=({"kind": "separate"}, {"kind": "mome", "joint_expert": True}), objectives=None, **changes):
    config = small_config(
        model__layers=list(layers),
        model__joint_from=changes.pop("joint_from", 1),
        model__init_deviation=0.2,
        objectives=objectives or [{"kind": "matching"}],
        **changes,
    )
    return build_student(config, StubTokenizer()), config


def terms(student, config):
    return build_objectives(config, student, {})


# ------------------------------------------------------------------------------------ joint sequences


def naive_layer(layer, image_ID, text_LD, joint):
    """One layer of one pair (or, not joint, of each alone) with plain torch."""
    parts, heads = {"image": image_ID, "text": text_LD}, layer.heads
    pre = layer.norm == "pre"

    def of(owners, name):
        return owners["shared"] if "shared" in owners else owners[name]

    def attend(names):
        qkv = torch.cat([(w := of(layer.attention, n)).qkv(w.norm(parts[n]) if pre else parts[n]) for n in names])
        q, k, v = qkv.view(len(qkv), 3, heads, -1).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1).split([len(parts[n]) for n in names])

    groups = [("image", "text")] if joint else [("image",), ("text",)]
    for names in groups:
        for name, out in zip(names, attend(names), strict=True):
            w = of(layer.attention, name)
            branch = w.proj(out if w.inner_norm is None else w.inner_norm(out))
            branch = branch if w.layer_scale is None else branch * w.layer_scale
            parts[name] = parts[name] + branch if pre else w.norm(parts[name] + branch)
    for name, x in parts.items():
        w = layer.mlp["joint"] if joint and "joint" in layer.mlp else of(layer.mlp, name)
        hidden = F.gelu(w.fc1(w.norm(x) if pre else x))
        branch = w.fc2(hidden if w.inner_norm is None else w.inner_norm(hidden))
        branch = branch if w.layer_scale is None else branch * w.layer_scale
        parts[name] = x + branch if pre else w.norm(x + branch)
    return parts["image"], parts["text"]


def naive_pair(student, batch, image, text):
    """The joint CLS of one image and one caption, nothing packed or padded."""
    start = int(batch.text_lengths[:text].sum())
    length = int(batch.text_lengths[text])
    one = replace(
        batch,
        images=batch.images[image : image + 1],
        text_ids=batch.text_ids[start : start + length],
        text_lengths=batch.text_lengths[text : text + 1],
        caption_image=torch.zeros(1, dtype=torch.int64),
    )
    _, entered = student._encode_inputs(one, ("image", "text"), {})
    image_ID, text_LD = entered["image"].rows, entered["text"].rows
    for i, layer in enumerate(student.layers):
        image_ID, text_LD = naive_layer(layer, image_ID, text_LD, joint=i >= student.config.joint_from)
    return student.norm(text_LD[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint_from", [0, 1])
def test_a_pair_is_what_its_tokens_in_one_sequence_give(kind, joint_from):
    student, _ = build([{"kind": "separate"}, KINDS[kind], KINDS[kind]], joint_from=joint_from)
    student = student.double().eval()
    batch = random_batch(captions=2)
    assert len(set(batch.text_lengths.tolist())) > 1  # shorter captions are padded in the joint pass
    images = torch.tensor([0, 3, 1, 1, 2, 0])
    texts = torch.tensor([7, 0, 2, 3, 5, 1])
    found_PD = student(batch).pair(images, texts)
    pairs = zip(images.tolist(), texts.tolist(), strict=True)
    expected_PD = torch.stack([naive_pair(student, batch, i, t) for i, t in pairs])
    torch.testing.assert_close(found_PD, expected_PD, rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_an_encoders_own_padding_is_not_seen(padding):
    tokens = {"kind": "tokens", "padding": padding}
    padded, _ = build(model__encoders={"image": {"kind": "patch", "patch_size": 8}, "text": tokens})
    plain, _ = build()
    batch, rows = random_batch(), torch.arange(4)
    found = padded.double().eval()(batch).pair(rows, rows.flip(0))
    torch.testing.assert_close(found, plain.double().eval()(batch).pair(rows, rows.flip(0)), rtol=0, atol=1e-10)


def test_the_gradient_of_a_pair_is_that_of_the_plain_computation():
    student, _ = build()
    student = student.double().eval()
    batch = random_batch()
    gradients = []
    for compute in (
        lambda: student(batch).pair(torch.tensor([1, 1]), torch.tensor([0, 2])),
        lambda: torch.stack([naive_pair(student, batch, 1, text) for text in (0, 2)]),
    ):
        student.zero_grad()
        compute().square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    joint = {name for name in gradients[1] if "joint" in name}
    assert joint and gradients[1].keys() <= gradients[0].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------- hard negatives


def unit(rows, width=6, seed=0):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_negative_is_never_the_own_sample():
    torch.manual_seed(0)
    owner = torch.arange(3).repeat_interleave(2)
    image, text = unit(3), unit(3)[owner]  # every own pair has the greatest similarity there is
    for _ in range(200):
        text_B, image_N, found_B, found_N = hard_negatives(image, text, owner, None, 0.05)
        assert (owner[text_B] != torch.arange(3)).all() and (image_N != owner).all()
        assert found_B.all() and found_N.all()


def test_negatives_are_drawn_from_the_softmax_of_similarity():
    torch.manual_seed(0)
    image, text, owner = unit(4), unit(4, seed=1), torch.arange(4)
    count = torch.zeros(4, 4)
    for _ in range(4000):
        text_B, image_N, _, _ = hard_negatives(image, text, owner, None, 0.5)
        count[0] += F.one_hot(text_B, 4)[0]
        count[1] += F.one_hot(image_N, 4)[1]
    logits = image @ text.t() / 0.5
    logits = logits.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(count[0] / 4000, logits[0].softmax(0), rtol=0, atol=0.03)
    torch.testing.assert_close(count[1] / 4000, logits[:, 1].softmax(0), rtol=0, atol=0.03)


def test_damaged_samples_are_not_drawn():
    torch.manual_seed(0)
    owner, weights = torch.arange(4).repeat_interleave(2), torch.tensor([1.0, 0.0, 1.0, 1.0])
    for _ in range(100):
        text_B, image_N, found_B, found_N = hard_negatives(unit(4), unit(8, seed=1), owner, weights, 0.07)
        assert (owner[text_B] != 1).all() and (image_N != 1).all() and found_B.all() and found_N.all()
        assert (owner[text_B] != torch.arange(4)).all() and (image_N != owner).all()
    *_, found_B, found_N = hard_negatives(unit(2), unit(2), torch.arange(2), torch.tensor([1.0, 0.0]), 0.07)
    assert found_B.tolist() == [0, 1] and found_N.tolist() == [0, 1]  # the whole one has nothing but the damaged one
    assert not any(x.any() for x in hard_negatives(unit(2), unit(2), torch.arange(2), torch.zeros(2), 0.07)[2:])


def test_the_draw_follows_torchs_seed_and_takes_what_is_no_number():
    owner = torch.arange(4)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(torch.stack([hard_negatives(unit(4), unit(4, seed=1), owner, None, 1.0)[0] for _ in range(9)]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    for value in (torch.nan, torch.inf, -torch.inf):
        image, text = unit(4), unit(4, seed=1)
        image[1], text[2] = value, value
        for _ in range(20):
            text_B, image_N, found_B, found_N = hard_negatives(image, text, owner, None, 0.07)
            assert (text_B != owner).all() and (image_N != owner).all() and found_B.all() and found_N.all()


def test_the_draw_asks_the_device_for_nothing():
    """Tensors without data refuse whatever the host would wait for."""
    similar = torch.empty(3, 6, device="meta"), torch.empty(8, 6, device="meta")
    owner, weights = torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(3, device="meta")
    found = hard_negatives(*similar, owner, weights, 0.07)
    assert [tuple(x.shape) for x in found] == [(3,), (8,), (3,), (8,)]


# ---------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize("captions", [1, 2])
def test_loss_and_accuracy_are_those_of_the_pairs(captions):
    student, config = build()
    objectives = terms(student, config)
    matching = objectives.terms[0]
    torch.nn.init.normal_(matching.head[1].weight)
    batch = random_batch(captions=captions)
    output = student(batch)
    seen = []

    def pair(image_P, text_P):
        seen.append((image_P, text_P))
        return output.pair(image_P, text_P)

    losses = objectives(replace(output, pair=pair), {}, batch)
    ((image_P, text_P),) = seen
    count = 4 * captions
    assert len(image_P) == 2 * count + 4
    owner = batch.caption_image
    match = image_P == owner[text_P]
    assert match[:count].all() and not match[count:].any()
    assert sorted(text_P[:count].tolist()) == list(range(count))  # every caption once
    assert image_P[count : count + 4].tolist() == [0, 1, 2, 3] and text_P[count + 4 :].tolist() == list(range(count))
    logits = matching.head(output.pair(image_P, text_P))
    torch.testing.assert_close(losses["matching_loss"], F.cross_entropy(logits, match.long()))
    torch.testing.assert_close(losses["loss"], losses["matching_loss"])
    accuracy = (logits.argmax(1) == match).float().mean()
    torch.testing.assert_close(objectives.metrics(), {"matching_accuracy": accuracy})
    assert objectives.metrics() == {}  # an interval starts anew


def test_the_gradient_reaches_the_joint_expert_and_no_draw():
    student, config = build()
    objectives = terms(student, config)
    batch = random_batch(captions=2)
    objectives(student(batch), {}, batch)["loss"].backward()
    joint = [p for name, p in student.named_parameters() if ".joint." in name]
    assert joint and all(p.grad is not None and p.grad.abs().sum() > 0 for p in joint)
    assert student.layers[0].attention["image"].qkv.weight.grad.abs().sum() > 0
    # The similarities only say what is drawn.
    assert all(p.grad is None for p in student.projection.parameters())
    # After the last layer the image's own MLP has no part in the joint pass.
    assert student.layers[1].mlp["image"].fc1.weight.grad is None


def test_what_is_damaged_changes_neither_loss_nor_gradient():
    student, config = build()
    objectives = terms(student, config)
    batch = replace(random_batch(captions=2), weights=torch.tensor([1.0, 1.0, 0.0, 1.0]))
    noise = torch.randint(0, 256, batch.images[2].shape, dtype=torch.uint8)
    other = replace(batch, images=torch.cat([batch.images[:2], noise[None], batch.images[3:]]))
    found = []
    for one in (batch, other):
        student.zero_grad()
        torch.manual_seed(0)
        loss = objectives(student(one), {}, one)["matching_loss"]
        loss.backward()
        found.append((loss.detach(), student.layers[0].attention["image"].qkv.weight.grad.clone()))
        assert found[-1][0] > 0
    torch.testing.assert_close(found[0], found[1])


def test_nothing_whole_gives_no_loss_and_no_nan():
    student, config = build()
    objectives = terms(student, config)
    batch = replace(random_batch(), weights=torch.zeros(4))
    loss = objectives(student(batch), {}, batch)["matching_loss"]
    loss.backward()
    assert loss == 0 and objectives.metrics()["matching_accuracy"] == 0


def test_the_head_learns_to_tell_pairs_apart():
    student, config = build(objectives=[{"kind": "contrastive"}, {"kind": "matching"}])
    objectives = terms(student, config)
    parameters = [*student.parameters(), *objectives.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    batch = random_batch(captions=2)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        losses = objectives(student(batch), {}, batch)
        losses["loss"].backward()
        optimizer.step()
    objectives.metrics()
    objectives(student(batch), {}, batch)
    assert objectives.metrics()["matching_accuracy"] > 0.95


def test_what_it_needs_is_said():
    with pytest.raises(ValidationError, match=r"objectives\.0: matching needs model\.joint_from"):
        build(joint_from=None)
    alone = [{"kind": "separate"}, {"kind": "separate", "modalities": ["text"]}]
    with pytest.raises(UserError, match="needs a layer that image and text both pass, found none from"):
        terms(*build(alone))
    with pytest.raises(UserError, match=r"matching needs one modality of image, found none"):
        terms(*build(model__encoders={"text": {"kind": "tokens"}}))
    student, config = build()
    batch = random_batch(images=1)
    with pytest.raises(UserError, match=r"found 1, expected at least 2; raise engine\.micro_batch_size"):
        terms(student, config)(student(batch), {}, batch)
