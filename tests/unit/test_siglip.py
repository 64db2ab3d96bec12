"""The sigmoid loss: by hand, against plain loops, its gradient, damaged rows, several captions."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from small import StubTokenizer, random_batch, small_config

from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.objectives import build_objectives
from mmd2v_kernels import siglip


def build(**term):
    config = small_config(objectives=[{"kind": "siglip", **term}])
    student = build_student(config, StubTokenizer()).eval()
    return student, build_objectives(config, student, {})


def test_by_hand():
    """Two images and their captions, cosines 1 and 0, scale ln 3 and no bias: sigmoids are 3/4 and 1/2."""
    rows = torch.eye(2, dtype=torch.float64)
    scale, bias = torch.tensor([math.log(3)], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    loss = siglip(rows, rows, torch.arange(2), 0, scale, bias, 2)
    assert loss.item() == pytest.approx((2 * math.log(4 / 3) + 2 * math.log(2)) / 2, abs=1e-12)


def plain(image, text, owner, scale, bias):
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            sign = 1 if owner[j] == i else -1
            total = total - torch.sigmoid(sign * (scale * image[i] @ text[j] + bias)).log().sum()
    return total / len(text)


def double(rows, width=6):
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=-1).requires_grad_()


def test_every_caption_of_an_image_is_a_positive():
    torch.manual_seed(0)
    image, text, owner = double(3), double(7), torch.tensor([0, 0, 1, 2, 2, 2, 0])
    scale, bias = torch.tensor([4.0]).double(), torch.tensor([-1.0]).double()
    torch.testing.assert_close(siglip(image, text, owner, 0, scale, bias, 7), plain(image, text, owner, scale, bias))


def test_gradient_is_that_of_differences():
    torch.manual_seed(1)
    image, text, owner = double(3), double(5), torch.tensor([0, 0, 1, 2, 2])
    scale, bias = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (3.0, -2.0))
    weights = torch.tensor([1.0, 0.0, 1.0]).double()
    for given in (None, (weights, weights[owner])):
        assert torch.autograd.gradcheck(
            lambda i, t, s, b, given=given: siglip(i, t, owner, 0, s, b, 5, given), (image, text, scale, bias)
        )


def test_the_mean_of_two_shards_is_the_whole():
    torch.manual_seed(2)
    image, text, owner = double(4), double(8), torch.arange(4).repeat_interleave(2)
    scale, bias = torch.tensor([5.0]).double(), torch.tensor([-1.0]).double()
    shards = [siglip(image[i : i + 2], text, owner, i, scale, bias, 4) for i in (0, 2)]
    torch.testing.assert_close(sum(shards) / 2, siglip(image, text, owner, 0, scale, bias, 8))


def test_rows_of_weight_0_are_in_no_pair():
    student, objectives = build(bias=-2.0)
    batch = random_batch(captions=2)
    batch = replace(batch, weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    output = student(batch)
    kept, captions = [0, 2, 3], [0, 1, 4, 5, 6, 7]
    image, text = output.embedding["image"][kept], output.embedding["text"][captions]
    owner = torch.arange(3).repeat_interleave(2)
    expected = siglip(image, text, owner, 0, torch.tensor([10.0]), torch.tensor([-2.0]), 8)
    torch.testing.assert_close(objectives(output, {}, batch)["siglip_loss"], expected)


def test_starts_at_the_papers_scale_and_bias_and_reports_them():
    student, objectives = build()
    term, metrics = objectives.terms[0], objectives.metrics()
    assert term.log_scale.item() == pytest.approx(math.log(10)) and term.bias.item() == -10
    assert {name: round(value.item(), 4) for name, value in metrics.items()} == {"siglip_scale": 10, "siglip_bias": -10}
    objectives(student(random_batch()), {}, random_batch())["loss"].backward()
    assert term.log_scale.grad.abs() > 0 and term.bias.grad.abs() > 0
    assert not any(parameter.requires_grad for parameter in build(learned=False)[1].parameters())


def test_logits_keep_fp32_under_autocast():
    torch.manual_seed(3)
    image, text = (F.normalize(torch.randn(16, 8), dim=-1) for _ in range(2))
    arguments = image, text, torch.arange(16), 0, torch.tensor([100.0]), torch.tensor([-10.0]), 16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = siglip(*arguments)
    torch.testing.assert_close(loss, siglip(*arguments), rtol=0, atol=0)


def test_batches_of_tokens_are_refused():
    student, objectives = build()
    batch = replace(random_batch(), mean_over=3.5)
    with pytest.raises(UserError, match=r"siglip: the ranks must have equally many samples"):
        objectives(student(batch), {}, batch)
    with pytest.raises(ValidationError, match="the siglip objective needs batches of a fixed number of samples"):
        small_config(
            model__encoders={"text": {"kind": "tokens"}, "b": {"kind": "tokens"}},
            objectives=[{"kind": "siglip", "between": ["text", "b"]}],
            data__batch_tokens=100,
            engine={},
        )
