"""CIFAR's binary files and labelled shards, told apart from class folders, give the images and classes they hold."""

import io
import tarfile

import numpy as np
import pytest
import torch
from export_samples import photo

from mmd2v.data.class_folders import ClassFolders
from mmd2v.data.labelled_images import CifarFiles, LabelledShards, open_labelled
from mmd2v.data.labelled_packing import pack_images
from mmd2v.data.transforms import decode_image
from mmd2v.errors import UserError
from mmd2v.evaluation.knn import encode_class_folders, knn_of_folder


def cifar(path, labels, coarse=False, seed=0):
    """Records as https://www.cs.toronto.edu/~kriz/cifar.html describes them: labels, then red, green, blue, by rows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    heads = [[7, label] if coarse else [label] for label in labels]
    path.write_bytes(b"".join(bytes(head) + image.tobytes() for head, image in zip(heads, pixels, strict=True)))
    return pixels


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(seed):
    buffer = io.BytesIO()
    photo(seed).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, labels, first=0):
    members = []
    for number, label in enumerate(labels, first):
        # Members of one sample in any order, a caption and a deeper folder beside.
        members += [(f"in/{number:04}.cls", f"{label}\n".encode()), (f"in/{number:04}.png", png(number))]
        members += [(f"in/{number:04}.txt", b"a caption")]
    return write_tar(path, members)


def test_cifar_files(tmp_path):
    first = cifar(tmp_path / "data_batch_1.bin", [2, 0])
    second = cifar(tmp_path / "data_batch_2.bin", [1], seed=1)
    cifar(tmp_path / "test_batch.bin", [0], seed=2)
    found = open_labelled(tmp_path / "data_batch_*.bin")
    assert isinstance(found, CifarFiles) and found.classes == ["0", "1", "2"] and len(found) == 3
    names, classes, images = zip(*found.images(), strict=True)
    assert classes == ("2", "0", "1") and len(set(names)) == 3
    assert np.array_equal(torch.stack(images).numpy(), np.concatenate([first, second]))
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    assert [name for _, name, _ in open_labelled(tmp_path / "data_batch_1.bin").images()] == ["bird", "airplane"]
    # Of CIFAR-100 the second, fine label.
    pixels = cifar(tmp_path / "train.bin", [99, 3], coarse=True)
    fine = open_labelled(tmp_path / "train.bin")
    assert [label for _, label, _ in fine.images()] == ["99", "3"]
    assert np.array_equal(next(fine.images())[2].numpy(), pixels[0])
    rows, labels = encode_class_folders(lambda images: torch.stack(images).float().mean((2, 3)), fine, fine.classes)
    assert labels.tolist() == [99, 3] and torch.allclose(rows[0], torch.tensor(pixels[0]).float().mean((1, 2)))


def test_labelled_shards(tmp_path):
    shard(tmp_path / "a-000.tar", ["10", "2"])
    shard(tmp_path / "a-001.tar", ["2"], first=2)
    found = [open_labelled(spec) for spec in (tmp_path, tmp_path / "a-{000..001}.tar", tmp_path / "a-*.tar")]
    for shards in found:
        assert isinstance(shards, LabelledShards) and len(shards) == 3
        assert shards.classes == ["2", "10"]  # by number
        assert [label for _, label, _ in shards.images()] == ["10", "2", "2"]
    name, _, data = next(found[0].images())
    assert torch.equal(decode_image(data, name), decode_image(png(0)))
    assert isinstance(open_labelled(tmp_path / "a-001.tar"), LabelledShards)
    result = knn_of_folder(
        lambda images: torch.stack([i.float().mean((1, 2)) - 128 for i in images]), tmp_path, tmp_path, k=1
    )
    assert result.top1 == 1.0 and result.classes == ["2", "10"]


def test_shards_that_were_packed_for_fine_tuning(tmp_path):
    """Their classes are numbers, which a .cls member beside them goes before."""
    for name, shade in (("a_dog", 0), ("cat", 1)):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "folder" / name / f"{number}.png").write_bytes(png(10 * number + shade))
    pack_images(tmp_path / "folder", tmp_path / "packed", shard_size=4)
    found = open_labelled(tmp_path / "packed")
    assert found.classes == ["0", "1"] and len(found) == 6
    assert [of_class for _, of_class, _ in found.images()] == ["0"] * 3 + ["1"] * 3
    (shard, *_) = sorted((tmp_path / "packed").glob("*.tar"))
    assert [of_class for _, of_class, _ in open_labelled(shard).images()] == ["0"] * 3 + ["1"]
    write_tar(tmp_path / "both.tar", [("1.json", b'{"label": 3}'), ("1.cls", b"0"), ("1.png", png(0))])
    assert open_labelled(tmp_path / "both.tar").classes == ["0"]


def test_archives_and_folders_of_classes_are_still_read(tmp_path):
    members = [("set/cat/0.png", png(0)), ("set/dog/0.png", png(1))]
    assert isinstance(open_labelled(write_tar(tmp_path / "classes.tar", members)), ClassFolders)
    assert open_labelled(tmp_path / "classes.tar" / "set").classes == ["cat", "dog"]


def test_what_is_wrong_is_named(tmp_path):
    (tmp_path / "short.bin").write_bytes(bytes(100))
    (tmp_path / "binary").mkdir()
    cifar(tmp_path / "binary/test_batch.bin", [0])
    write_tar(tmp_path / "half.tar", [("1.cls", b"0"), ("1.png", png(0)), ("2.png", png(1))])
    write_tar(tmp_path / "none.tar", [("1.cls", b"0"), ("2.cls", b"0"), ("2.png", png(1))])
    for path, message in [
        (tmp_path / "data_*.bin", "--train: .* matches no file"),
        (tmp_path / "short.bin", "of 100 bytes, expected a multiple of 3,073 or 3,074"),
        (tmp_path / "binary", "holds test_batch.bin; name those of one split"),
        (tmp_path / "half.tar", "half.tar: sample 2 has no class: no .cls member"),
        (tmp_path / "none.tar", "none.tar: sample 1 has no image"),
        (tmp_path / "absent", "has no 'absent'"),
    ]:
        with pytest.raises(UserError, match=message):
            open_labelled(path, "--train")
