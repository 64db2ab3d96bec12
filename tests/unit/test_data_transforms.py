import io
import struct
import zlib

import numpy as np
import pytest
import torch
from data_samples import encoded, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import decode_image as _decode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from mmd2v.config.schema import ImageTransformConfig
from mmd2v.data.transforms import decode_image, eval_transform, random_crop, resize, shrink, train_transform
from mmd2v.errors import UserError


def image(number: int = 0, width: int = 300, height: int = 200) -> torch.Tensor:
    return torch.from_numpy(picture(number, width, height)).permute(2, 0, 1)


def test_decode_jpeg_is_close_to_pil():
    data = encoded(3, width=120, height=90)
    ours = decode_image(data).permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert ours.shape == theirs.shape == (90, 120, 3)
    assert np.abs(ours - theirs).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_decode_other_formats(format):
    assert decode_image(encoded(1, format)).shape == (3, 40, 48)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_decode_gives_rgb_for_every_mode(mode):
    data = io.BytesIO()
    Image.fromarray(picture(2)).convert(mode).save(data, "JPEG" if mode in ("L", "CMYK") else "PNG")
    decoded = decode_image(data.getvalue())
    assert decoded.shape == (3, 40, 48) and decoded.dtype == torch.uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_keeps_the_upper_eight_of_sixteen_bits(channels):
    values = (picture(2).astype(np.uint16) << 8) + 77
    decoded = decode_image(png16(values[..., :channels]))
    assert decoded.dtype == torch.uint8
    expected = picture(2)[..., :channels].repeat(3 // channels, axis=2)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), expected)
    assert train_transform(decoded, ImageTransformConfig(size=16), seed=0, epoch=0, sample_id="a").dtype == torch.uint8


def png16(pixels: np.ndarray) -> bytes:
    """PNG of 16 bits a channel, which PIL cannot write in colour: uint16 [H, W, 1 or 3]."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_of_an_animation_one_frame_is_decoded(monkeypatch):
    frames = [Image.fromarray(picture(number)) for number in range(3)]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    shapes = []

    def watched(*arguments, **options):
        shapes.append(tuple((found := _decode(*arguments, **options)).shape))
        return found

    monkeypatch.setattr("mmd2v.data.transforms._decode", watched)
    still = io.BytesIO()
    frames[0].save(still, "GIF")
    assert torch.equal(decode_image(data.getvalue()), decode_image(still.getvalue()))
    assert shapes == [(3, 40, 48)] * 2


def test_decode_turns_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    data = io.BytesIO()
    Image.fromarray(picture(2)).save(data, "JPEG", exif=exif)
    assert decode_image(data.getvalue()).shape == (3, 48, 40)


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(0)[:200], encoded(0, "PNG")[:100]])
def test_undecodable_bytes_name_the_sample(data):
    with pytest.raises(UserError, match=r"^a\.tar: sample k: the image (is empty|does not decode)"):
        decode_image(data, "a.tar: sample k")


sizes = st.integers(1, 700)
configs = st.builds(
    lambda low, high, ratio: ImageTransformConfig(
        crop_scale=(min(low, high), max(low, high)), crop_ratio=(1 / ratio, ratio)
    ),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.floats(1, 2),
)


@given(sizes, sizes, configs, st.integers(0, 9), st.integers(0, 9))
def test_crop_lies_inside_and_is_a_pure_function(height, width, config, seed, epoch):
    box = random_crop(height, width, config, seed=seed, epoch=epoch, sample_id="a")
    assert box.top >= 0 and box.top + box.height <= height and box.height > 0
    assert box.left >= 0 and box.left + box.width <= width and box.width > 0
    assert box == random_crop(height, width, config, seed=seed, epoch=epoch, sample_id="a")


def test_crops_have_the_distribution_of_random_resized_crop():
    config = ImageTransformConfig(crop_scale=(0.2, 1.0))
    ours = [random_crop(300, 400, config, seed=0, epoch=e, sample_id="x") for e in range(2000)]
    theirs = [_torchvision_box(config) for _ in range(2000)]
    ours_area = np.array([box.height * box.width for box in ours]) / 120_000
    theirs_area = np.array([h * w for _, _, h, w in theirs]) / 120_000
    quantiles = [0.05, 0.25, 0.5, 0.75, 0.95]
    np.testing.assert_allclose(np.quantile(ours_area, quantiles), np.quantile(theirs_area, quantiles), atol=0.05)
    ours_ratio = np.log([box.width / box.height for box in ours])
    theirs_ratio = np.log([w / h for _, _, h, w in theirs])
    np.testing.assert_allclose(np.quantile(ours_ratio, quantiles), np.quantile(theirs_ratio, quantiles), atol=0.05)
    assert 0.45 < np.mean([box.flip for box in ours]) < 0.55
    lefts = [box.left / (400 - box.width) for box in ours if box.width < 350]
    assert 0.45 < np.mean(lefts) < 0.55


def _torchvision_box(config):
    transform = v2.RandomResizedCrop(8, scale=config.crop_scale, ratio=config.crop_ratio)
    params = transform.make_params([torch.empty(3, 300, 400)])
    return params["top"], params["left"], params["height"], params["width"]


def test_crop_depends_on_seed_epoch_and_sample():
    config = ImageTransformConfig()
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    assert len({random_crop(300, 400, config, seed=s, epoch=e, sample_id=i) for s, e, i in keys}) == 4


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_image_is_torchvisions_on_the_same_box(interpolation):
    config = ImageTransformConfig(size=96, interpolation=interpolation)
    for number in range(5):
        source = image(number)
        box = random_crop(200, 300, config, seed=0, epoch=0, sample_id=str(number))
        ours = train_transform(source, config, seed=0, epoch=0, sample_id=str(number))
        theirs = functional.resized_crop(
            source, *box[:4], [96, 96], v2.InterpolationMode(interpolation), antialias=True
        )
        theirs = theirs.flip(-1) if box.flip else theirs
        assert (ours.int() - theirs.int()).abs().max() <= 2
        assert torch.equal(ours, train_transform(source, config, seed=0, epoch=0, sample_id=str(number)))


def test_whole_image_without_crop_and_flip_is_untouched():
    config = ImageTransformConfig(size=40, crop_scale=(1, 1), flip=0)
    source = image(0, 40, 40)
    assert torch.equal(train_transform(source, config, seed=5, epoch=2, sample_id="a"), source)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 130), st.integers(20, 130), st.integers(8, 64))
def test_eval_centre_crop_is_torchvisions(width, height, size):
    config = ImageTransformConfig(size=size)
    source = image(1, width, height)
    reference = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])
    assert torch.equal(eval_transform(source, config), reference(source))


@pytest.mark.parametrize(("width", "height"), [(3 * 200, 3), (3, 3 * 201), (1, 400), (50 * 33, 50)])
def test_eval_centre_crop_of_a_thin_image_is_torchvisions(width, height):
    source = image(1, width, height)
    reference = v2.Compose([v2.Resize(24, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(24)])
    assert torch.equal(eval_transform(source, ImageTransformConfig(size=24)), reference(source))


@pytest.mark.parametrize("lies", [False, True])
def test_eval_centre_crop_of_a_line_takes_little_memory(lies, monkeypatch):
    made = []

    def watched(image, height, width, interpolation):
        made.append(height * width)
        return resize(image, height, width, interpolation) if made[-1] < 10**7 else torch.zeros(3, height, width)

    monkeypatch.setattr("mmd2v.data.transforms.resize", watched)
    line = torch.zeros(3, 1, 65_535, dtype=torch.uint8)
    line[..., 32_767] = 255  # the middle
    config = ImageTransformConfig(size=16)
    square = eval_transform(line if lies else line.mT, config)
    assert square.shape == (3, 16, 16) and square.min() > 128  # else it is not the middle that was kept
    assert made[0] <= 34 * 16**2


def test_squash_keeps_everything():
    config = ImageTransformConfig(size=32, eval_resize="squash")
    source = image(1, 90, 60)
    assert torch.equal(
        eval_transform(source, config), functional.resize(source, [32, 32], v2.InterpolationMode.BICUBIC)
    )


def test_resize_is_antialiased():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = resize(stripes, 16, 16, "bicubic")[:, :, 2:-2]
    assert (small.int() - 128).abs().max() <= 4


@pytest.mark.parametrize("box", [(0, 0, 200, 300), (9, 0, 180, 300), (9, 7, 180, 260)])
def test_resize_takes_the_fast_path_for_every_crop(box):
    top, left, height, width = box
    decoded = decode_image(encoded(1, width=300, height=200))
    small = resize(decoded[:, top : top + height, left : left + width], 64, 48, "bicubic")
    assert small.stride() == (1, 3 * 48, 3)  # torch's slower kernel gives another layout


def test_shrink_keeps_the_aspect_and_never_enlarges():
    assert shrink(image(0, 300, 200), 100).shape == (3, 100, 150)
    small = image(0, 30, 20)
    assert shrink(small, 100) is small
