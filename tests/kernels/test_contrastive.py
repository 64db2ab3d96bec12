"""The contrastive loss against the plain CLIP form and a sharded batch against a whole one."""

import pytest
import torch
import torch.nn.functional as F

from mmd2v_kernels import ContrastiveWeights, contrastive, ring_contrastive, ring_siglip, siglip


def embeddings(rows: int, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float32), dim=-1).requires_grad_()


def whole(image, text, owner, scale, smoothing=0.0):
    return contrastive(image, text, image, text, owner, owner, 0, scale, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_caption_an_image_is_clips_loss(smoothing):
    torch.manual_seed(0)
    image, text, scale = embeddings(7), embeddings(7), torch.tensor([12.0], requires_grad=True)
    labels = torch.arange(7)
    logits = scale * image @ text.T
    expected = (
        F.cross_entropy(logits, labels, label_smoothing=smoothing)
        + F.cross_entropy(logits.T, labels, label_smoothing=smoothing)
    ) / 2
    loss = whole(image, text, labels, scale, smoothing)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, [image, text, scale]),
        torch.autograd.grad(expected, [image, text, scale]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_several_captions_average_their_likelihood():
    torch.manual_seed(1)
    image, text, owner = embeddings(3), embeddings(6), torch.tensor([0, 0, 1, 2, 2, 2])
    log_image = F.log_softmax(5 * image @ text.T, dim=1)
    log_text = F.log_softmax(5 * text @ image.T, dim=1)
    image_term = -(log_image[0, :2].mean() + log_image[1, 2] + log_image[2, 3:].mean()) / 3
    text_term = -log_text[torch.arange(6), owner].mean()
    torch.testing.assert_close(whole(image, text, owner, torch.tensor(5.0)), (image_term + text_term) / 2)


def test_the_mean_of_two_shards_is_the_whole():
    torch.manual_seed(2)
    image, text, owner, scale = embeddings(4), embeddings(8), torch.arange(4).repeat_interleave(2), torch.tensor(9.0)
    shards = [
        contrastive(image[i : i + 2], text[2 * i : 2 * i + 4], image, text, owner[2 * i : 2 * i + 4], owner, i, scale)
        for i in (0, 2)
    ]
    expected = whole(image, text, owner, scale)
    torch.testing.assert_close((shards[0] + shards[1]) / 2, expected)
    ours = torch.autograd.grad((shards[0] + shards[1]) / 2, [image, text], retain_graph=True)
    theirs = torch.autograd.grad(expected, [image, text])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_keep_fp32_under_autocast():
    torch.manual_seed(3)
    image, text, owner, scale = embeddings(16), embeddings(16), torch.arange(16), torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = whole(image, text, owner, scale)
    torch.testing.assert_close(loss, whole(image, text, owner, scale), rtol=0, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_of_weight_0_are_as_if_they_were_not_there(smoothing):
    torch.manual_seed(3)
    image, text, owner, scale = embeddings(5), embeddings(10), torch.arange(5).repeat_interleave(2), torch.tensor(9.0)
    image_weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    text_weight = image_weight[owner]
    weights = ContrastiveWeights(image_weight, text_weight, image_weight, text_weight)
    loss = contrastive(image, text, image, text, owner, owner, 0, scale, smoothing, weights)
    kept, captions = image_weight.nonzero()[:, 0], text_weight.nonzero()[:, 0]
    expected = whole(image[kept], text[captions], torch.arange(3).repeat_interleave(2), scale, smoothing)
    torch.testing.assert_close(loss, expected * 3 / 5)  # the mean still divides by all rows
    for gradient, weight in zip(torch.autograd.grad(loss, [image, text]), (image_weight, text_weight), strict=True):
        assert gradient.isfinite().all()
        assert torch.equal(gradient.abs().sum(1) > 0, weight > 0)


def test_weights_of_1_change_nothing():
    torch.manual_seed(4)
    image, text, owner, scale = embeddings(4), embeddings(8), torch.arange(4).repeat_interleave(2), torch.tensor(9.0)
    ones = ContrastiveWeights(*(torch.ones(n) for n in (4, 8, 4, 8)))
    weighted = contrastive(image, text, image, text, owner, owner, 0, scale, 0.1, ones)
    torch.testing.assert_close(weighted, whole(image, text, owner, scale, 0.1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("images, captions", [(0, 3), (3, 0)])
def test_nothing_to_compare_is_refused(images, captions):
    image, text, owner, one = embeddings(images), embeddings(captions), torch.zeros(captions).long(), torch.ones(1)
    message = f"found {images} images and {captions} texts, expected at least one of each"
    calls = (
        lambda: whole(image, text, owner, one),
        lambda: siglip(image, text, owner, 0, one, one, 1.0),
        lambda: ring_contrastive(image, text, owner, one, None),
        lambda: ring_siglip(image, text, owner, one, one, 1.0, None),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
