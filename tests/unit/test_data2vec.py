"""data2vec's own loss: the decoder, what is compared where, gradients, the detector of collapse."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from small import StubTokenizer, random_batch, small_config

from mmd2v.config.schema import DecoderConfig
from mmd2v.errors import UserError
from mmd2v.models.draws import RANGE, draw
from mmd2v.models.student import build_student
from mmd2v.models.teachers import build_teachers
from mmd2v.objectives import build_objectives
from mmd2v.objectives.conv_decoder import ConvDecoder
from mmd2v.objectives.data2vec import _NOISE, _TABLE
from mmd2v_kernels import distill_target

SMALL = {"layers": 2, "groups": 4, "input_dropout": 0.0}


def build(modality="image", masks=3, **changes):
    """Student, teacher and objectives of pre-training on one modality."""
    term = {"kind": "data2vec", "teacher": "ema", "modality": modality, "decoder": SMALL}
    config = small_config(
        **{
            "model__masking": {modality: {"masks": masks, "ratio": 0.6, "block": 2 if modality == "image" else 1}},
            "model__layers": [{"kind": "separate", "count": 3, "norm": "post"}],
            "model__init_deviation": 0.1,
            "teachers": {"ema": {"name": f"ema:{modality}", "modality": modality, "precision": "fp32"}},
            "objectives": [{**term, **changes.pop("term", {})}],
            **changes,
        }
    )
    student = build_student(config, StubTokenizer()).train()
    teachers = build_teachers(config, torch.device("cpu"), StubTokenizer(), student=student)
    objectives = build_objectives(config, student, teachers)
    for name, needs in objectives.needs.items():
        teachers[name].prepare(needs, name)
    return student, teachers, objectives


def batch_of(seed=0):
    return replace(random_batch(4, captions=1), draw_seed=seed)


def losses_of(student, teachers, objectives, batch):
    return objectives(student(batch), {name: teacher(batch) for name, teacher in teachers.items()}, batch)


@pytest.mark.parametrize(("kind", "grid"), [("image", (5, 4)), ("text", None)])
def test_published_decoders(kind, grid):
    config = DecoderConfig().filled(kind, 32)
    decoder = ConvDecoder(config, 32, grid, "decoder").eval()
    tokens = 20
    assert decoder(torch.randn(3, tokens, 32), torch.tensor([0, 59, 7])).shape == (3, 32)
    weights = [tuple(c.weight.shape) for c in decoder.convolutions]
    if kind == "image":
        assert weights == [(32, 2, 3, 3)] * 6 and decoder.residual and len(decoder.projection) == 1
    else:
        assert weights == [(32, 32, 9)] * 5 and not decoder.residual
        assert [tuple(m.weight.shape) for m in decoder.projection if hasattr(m, "weight")] == [(64, 32), (32, 64)]


def test_decoder_of_another_width():
    config = DecoderConfig(dim=48, layers=3, kernel=3, groups=16).filled("image", 32)
    decoder = ConvDecoder(config, 32, (2, 3), "decoder")
    places = torch.arange(6)
    assert decoder(torch.randn(1, 6, 32), places).shape == (6, 32)
    for changes, message in (({"kernel": 4}, "odd number"), ({"groups": 5}, "not divisible by 5 groups")):
        with pytest.raises(UserError, match=message):
            ConvDecoder(config.model_copy(update=changes), 32, (2, 3), "decoder")


def test_what_fills_a_short_text_changes_nothing():
    decoder = ConvDecoder(DecoderConfig().filled("text", 8), 8, None, "decoder").eval()
    for convolution in decoder.convolutions:
        torch.nn.init.normal_(convolution.bias)
    x = torch.randn(1, 6, 8)
    alone = decoder(x, torch.arange(6))
    padded = torch.cat([x, torch.randn(1, 5, 8)], dim=1)
    real = (torch.arange(11) < 6)[None]
    torch.testing.assert_close(decoder(padded, torch.arange(6), real), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_loss_is_the_distance_at_hidden_tokens(modality):
    student, teachers, objectives = build(modality)
    batch, (term,) = batch_of(), objectives.terms
    output, targets = student(batch), {"ema": teachers["ema"](batch)}
    seen = {}
    hook = term.decoder.register_forward_hook(lambda _, inputs, found: seen.update(x=inputs[0], y=found))
    losses = objectives(output, targets, batch)
    hook.remove()
    mask = output.masks[modality]
    image = modality == "image"
    first = int(image)
    mask_ST = targets["ema"].is_token_BT
    results = [r[:, first:] for r in targets["ema"].layer_results]
    assert len(results) == 3
    target_SLD = distill_target(results, mask_BT=mask_ST, final_layer_norm=image)
    losses_S, row, at = [], 0, 0
    rows = output.visible[modality].detach()
    for clone, length in enumerate(mask.lengths.tolist()):
        places = {v % mask.longest for v in mask.visible.tolist() if v // mask.longest == clone}
        hidden = [t for t in range(length) if t not in places]
        # Visible rows are at their places, noise at the others.
        own = seen["x"][clone].detach()
        for place in sorted(places):
            if place >= first:
                torch.testing.assert_close(own[place - first], rows[at])
            at += 1
        if hidden:
            noise = own[[t - first for t in hidden]]
            assert 0 < noise.abs().max() < 0.06
        prediction = seen["y"][row : row + len(hidden)]
        row += len(hidden)
        target = target_SLD[clone // mask.clones, [t - first for t in hidden]]
        losses_S.append(F.mse_loss(prediction, target) if hidden else torch.zeros(()))
    torch.testing.assert_close(losses[f"data2vec_loss/{modality}"], torch.stack(losses_S).mean())
    if image:
        cls = output.visible[modality][output.tokens.layout.first_rows(modality)]
        expected = F.mse_loss(cls, target_SLD.mean(dim=1).repeat_interleave(3, 0))
        torch.testing.assert_close(losses["data2vec_cls_loss/image"], 0.01 * expected)
    else:
        assert "data2vec_cls_loss/text" not in losses


def test_a_weight_of_zero_takes_a_sample_out():
    student, teachers, objectives = build()
    whole = batch_of()
    losses = losses_of(student, teachers, objectives, replace(whole, weights=torch.tensor([1.0, 0, 0, 0])))
    one = replace(whole, images=whole.images[:1], sample_ids=whole.sample_ids[:1])
    one = replace(one, text_lengths=whole.text_lengths[:1], caption_image=whole.caption_image[:1])
    one = replace(one, text_ids=whole.text_ids[: int(whole.text_lengths[0])])
    alone = losses_of(student, teachers, objectives, one)
    torch.testing.assert_close(losses["data2vec_loss/image"] * 4, alone["data2vec_loss/image"])


@pytest.mark.parametrize("modality", ["image", "text"])
def test_gradient_reaches_the_student_and_the_decoder_alone(modality):
    student, teachers, objectives = build(modality)
    losses_of(student, teachers, objectives, batch_of())["loss"].backward()
    for name, parameter in student.named_parameters():
        own = modality in name.split(".")
        outside = name.startswith("projection")
        if own and not outside:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad is not None for p in objectives.parameters())
    assert all(not p.requires_grad and p.grad is None for p in teachers["ema"].parameters())


def test_masks_and_noise_are_the_seeds_and_the_samples():
    student, teachers, objectives = build()
    losses = [losses_of(student, teachers, objectives, batch_of(seed))["loss"] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_noise_has_a_stream_of_its_own(modality):
    student, _, objectives = build(modality)
    mask, (term,) = student(batch_of()).masks[modality], objectives.terms
    place_C1, keys_C1 = torch.arange(16), mask.keys_C[:, None]
    noise_CP = draw(keys_C1, place_C1 + _NOISE)
    for start in (0, RANGE // 2):  # of a mask: blocks, lots
        assert not (noise_CP == draw(keys_C1, place_C1 + start)).any()
    # The rows are of that stream.
    hidden = torch.arange(len(mask.keys_C)) * 16
    rows_CD = term.noise * torch.stack([term.noise_table[i : i + 16] for i in (noise_CP[:, 0] % _TABLE).tolist()])
    torch.testing.assert_close(term._noise(mask, hidden, 16), rows_CD)


def test_more_layers_than_the_teacher_has():
    with pytest.raises(ValidationError, match=r"objectives.0.top_layers: found 4, but 'image' passes 3 layers"):
        build(term={"top_layers": 4})
    student, teachers, objectives = build(term={"top_layers": 3})
    batch = batch_of()
    targets = teachers["ema"](batch)
    # Of a teacher that is no average of the student, they are known when it has run.
    targets = replace(targets, layer_results=targets.layer_results[:2])
    with pytest.raises(UserError, match=r"objectives.0.top_layers: found 3, but 'ema' has 2 layers"):
        objectives(student(batch), {"ema": targets}, batch)
    with pytest.raises(ValidationError, match=r"objectives.0.teacher: 'ema' has no layer: 'image' passes none"):
        build(model__layers=[])


def test_top_layers_and_smooth_l1():
    student, teachers, objectives = build(term={"top_layers": 1, "loss": "smooth_l1", "beta": 0.5, "cls_weight": 0})
    batch, (term,) = batch_of(), objectives.terms
    output, targets = student(batch), {"ema": teachers["ema"](batch)}
    seen = {}
    term.decoder.register_forward_hook(lambda _, inputs, found: seen.update(y=found))
    losses = objectives(output, targets, batch)
    hidden = output.masks["image"].hidden
    target_SLD = distill_target([targets["ema"].layer_results[-1][:, 1:]], final_layer_norm=True)
    target = target_SLD[hidden // 17 // 3, hidden % 17 - 1]
    torch.testing.assert_close(losses["loss"], F.smooth_l1_loss(seen["y"], target, beta=0.5))


def test_deviation_of_targets_is_followed_and_a_collapse_stops_the_run():
    student, teachers, objectives = build()
    assert objectives.metrics() == {}
    batch, (term,) = batch_of(), objectives.terms
    seen = []
    observe = term._observe
    term._observe = lambda target, prediction: (seen.append((target, prediction)), observe(target, prediction))
    for seed in (1, 2):
        losses_of(student, teachers, objectives, batch_of(seed))
    metrics = objectives.metrics()
    for i, name in enumerate(("target", "prediction")):
        rows = torch.cat([pair[i] for pair in seen])
        expected = (rows.var(dim=0, correction=0) + 1e-6).sqrt().mean()
        torch.testing.assert_close(metrics[f"data2vec/{name}_var/image"].float(), expected, rtol=1e-4, atol=1e-5)
    assert objectives.metrics() == {}  # of the interval since the last time
    targets = {"ema": teachers["ema"](batch)}
    same = [torch.ones_like(result) for result in targets["ema"].layer_results]
    objectives(student(batch), {"ema": replace(targets["ema"], layer_results=same)}, batch)
    with pytest.raises(UserError, match=r"objectives.0: the targets have collapsed: they vary by 0.0010 .* 0.1"):
        objectives.metrics()


def test_without_masks_there_is_nothing_to_predict():
    student, teachers, objectives = build()
    with pytest.raises(ValueError, match="not in training mode"):
        losses_of(student.eval(), teachers, objectives, batch_of())
