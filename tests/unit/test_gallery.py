"""A folder of images: what is found, what is remembered, what cannot be read."""

import logging

import pytest
import torch
from export_samples import photo, photo_folder, small_export

import mmd2v
from mmd2v.errors import UserError
from mmd2v.gallery import list_images, open_gallery


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_export(tmp_path_factory.mktemp("model"))


class Counting:
    """An encoder that counts the images it has to encode."""

    def __init__(self, model, precision="fp32"):
        self.inner = mmd2v.load(model, precision=precision)
        self.encoded = 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode_image(self, images):
        self.encoded += len(images)
        return self.inner.encode_image(images)


def test_images_are_found_in_subfolders_in_order(tmp_path):
    folder = photo_folder(tmp_path / "photos")
    (folder / "UPPER.JPG").write_bytes((folder / "below" / "photo0.jpg").read_bytes())
    names = [path.relative_to(folder).as_posix() for path in list_images(folder)]
    assert names == [
        "UPPER.JPG",
        "below/photo0.jpg",
        *(f"photo{i}.{('jpg', 'png', 'webp')[i % 3]}" for i in range(1, 6)),
    ]
    with pytest.raises(UserError, match=r"is no folder\. Did you mean 'photos'"):
        list_images(tmp_path / "photo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no image in .*empty or below; looked for \.jpg"):
        list_images(tmp_path / "empty")


def test_second_search_encodes_only_what_is_new(model, tmp_path):
    folder, cache = photo_folder(tmp_path / "photos"), tmp_path / "cache"
    encoder = Counting(model)
    first = open_gallery(encoder, model, folder, cache)
    assert encoder.encoded == 6 and not first.unreadable
    assert torch.allclose(first.embeddings_ME, encoder.inner.encode_image(first.paths), atol=1e-6)

    second = open_gallery(encoder, model, folder, cache)
    assert encoder.encoded == 6 and torch.equal(second.embeddings_ME, first.embeddings_ME)

    (folder / "photo1.png").rename(folder / "renamed.png")
    photo(77).save(folder / "photo2.webp")
    (folder / "photo3.jpg").unlink()
    third = open_gallery(encoder, model, folder, cache)
    assert encoder.encoded == 7 and len(third.paths) == 5
    assert torch.allclose(third.embeddings_ME, encoder.inner.encode_image(third.paths), atol=1e-6)

    (folder / "copy.png").write_bytes((folder / "renamed.png").read_bytes())
    assert len(open_gallery(encoder, model, folder, cache).paths) == 6 and encoder.encoded == 7


def test_another_model_or_arithmetic_has_its_own_memory(model, tmp_path):
    folder, cache = photo_folder(tmp_path / "photos"), tmp_path / "cache"
    open_gallery(Counting(model), model, folder, cache)
    other = small_export(tmp_path, seed=5)
    for encoder, of in ((Counting(model, "bf16"), model), (Counting(other), other)):
        open_gallery(encoder, of, folder, cache)
        assert encoder.encoded == 6
    assert len(list(cache.iterdir())) == 3


def test_unreadable_images_are_named_and_left_out(model, tmp_path):
    folder = photo_folder(tmp_path / "photos")
    (folder / "empty.jpg").touch()
    (folder / "broken.png").write_bytes(b"no image")
    gallery = open_gallery(Counting(model), model, folder, tmp_path / "cache")
    assert len(gallery.paths) == len(gallery.embeddings_ME) == 6
    assert [message.split(":")[0].rpartition("/")[2] for message in gallery.unreadable] == ["broken.png", "empty.jpg"]


def test_a_broken_or_read_only_cache_is_done_without(model, tmp_path, caplog):
    folder, cache = photo_folder(tmp_path / "photos"), tmp_path / "cache"
    encoder = Counting(model)
    expected = open_gallery(encoder, model, folder, cache).embeddings_ME
    (file,) = cache.iterdir()
    file.write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(open_gallery(encoder, model, folder, cache).embeddings_ME, expected)
        assert "not usable as a cache" in caplog.text
        (tmp_path / "file").touch()
        assert torch.equal(open_gallery(encoder, model, folder, tmp_path / "file").embeddings_ME, expected)
        assert "cannot be kept" in caplog.text
