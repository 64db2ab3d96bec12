"""`mmd2v eval retrieval` on caption files: counts, protocols, intervals, errors, and the dump that proves it."""

import hashlib
import io
import json
import tarfile
import time
from contextlib import redirect_stdout
from itertools import pairwise

import numpy as np
import pytest
import torch
from export_samples import photo
from safetensors.torch import load_file

from mmd2v.cli.main import main
from mmd2v.errors import UserError
from mmd2v.evaluation import models
from mmd2v.evaluation.bootstrap import Bootstrap, recall_intervals
from mmd2v.evaluation.protocols import ranked_set
from mmd2v.evaluation.public_sets import ids_digest
from mmd2v.evaluation.retrieval import metrics_over_ranks, retrieval_metrics
from mmd2v.evaluation.retrieval_run import HowMeasured, RetrievalData, evaluate_retrieval
from mmd2v.evaluation.self_check import check_chance

normalize = torch.nn.functional.normalize
RECALLS = [f"{direction}_R@{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]


class ByContent:
    """A model whose embeddings follow from mean colours and from characters: deterministic, and of no use."""

    name, width, device = "by content", 12, torch.device("cpu")
    text_width = 12

    def encode_image(self, images, batch_size=64):
        self.images = getattr(self, "images", 0) + len(images)
        means = [image.double().flatten(1).mean(1).tolist() for image in images]
        return torch.stack([self._point(str(mean)) for mean in means])

    def encode_text(self, texts, batch_size=256):
        rows = [self._point(text) for text in texts]
        return torch.stack([row[: self.text_width] for row in rows])

    def _point(self, text):
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        return normalize(torch.randn(self.width, generator=torch.Generator().manual_seed(seed)), dim=0)

    def preprocessing(self):
        return "images: whole; texts: whole"


class ByIds(ByContent):
    """Reads no image."""

    name, width = "by ids", 32
    text_width = 32

    def encode_ids(self, ids):
        return torch.stack([self._point(one) for one in ids])


HOW = HowMeasured(device="cpu", bootstrap=Bootstrap(50), batch_size=4)


def entries(count=7):
    return [
        {"image": f"photo{i}.png", "caption": [f"picture {i}, {j}" for j in range(2 + i % 3)]} for i in range(count)
    ]


def caption_file(folder, content=None, count=7):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photo(i).save(folder / f"photo{i}.png")
    path = folder / "captions.json"
    path.write_text(json.dumps(entries(count) if content is None else content))
    return path


def measure(path, model=None, how=HOW, **data):
    return evaluate_retrieval(model or ByContent(), RetrievalData([str(path)], **data), how)


def refused(message, path, model=None, how=HOW, **data):
    with pytest.raises(UserError, match=message):
        measure(path, model, how, **data)


# ----------------------------------------------------------------------------- what is read


def karpathy(count):
    rows = entries(count)
    images = [
        {"filename": row["image"], "split": "test" if i else "val", "sentences": [{"raw": c} for c in row["caption"]]}
        for i, row in enumerate(rows)
    ]
    return {"images": [*images, {"filename": "other.jpg", "split": "train", "sentences": [{"raw": "none"}]}]}


def coco(count):
    rows = entries(count)
    images = [{"id": 10 * i, "file_name": row["image"]} for i, row in enumerate(rows)]
    captions = [{"image_id": 10 * i, "caption": c} for i, row in enumerate(rows) for c in row["caption"]]
    return {"images": images, "annotations": captions}


def test_formats_and_places_of_images_give_one_result(tmp_path, capsys):
    path = caption_file(tmp_path / "a")
    expected = measure(path).record()
    assert (expected["images"], expected["captions"]) == (7, 20)
    assert expected["ids_sha256"] == ids_digest([f"photo{i}" for i in range(7)])
    assert expected["preprocessing"] == "images: whole; texts: whole"

    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "coco.json").write_text(json.dumps(coco(7)))
    (other / "karpathy.json").write_text(json.dumps(karpathy(7)))
    (other / "shards").mkdir()
    with tarfile.open(other / "images.tar", "w") as tar:
        for i in range(7):
            tar.add(tmp_path / "a" / f"photo{i}.png", f"folder/photo{i}.png")
    for number, rows in enumerate((range(3), range(3, 7))):
        with tarfile.open(other / "shards" / f"{number}.tar", "w") as tar:
            for i in rows:
                tar.add(tmp_path / "a" / f"photo{i}.png", f"photo{i}.png")
    for name, images, splits in (
        ("coco.json", "images.tar", ()),
        ("karpathy.json", "shards", ("val", "test")),
    ):
        found = measure(other / name, images=[str(other / images)], splits=splits).record()
        assert found["split"] == list(splits)
        same = [key for key in expected if key not in ("data", "split")]
        assert {key: found[key] for key in same} == {key: expected[key] for key in same}

    assert main(["data", "pack", str(path), "--out", str(tmp_path / "packed")]) == 0
    packed = evaluate_retrieval(ByContent(), RetrievalData([str(tmp_path / "packed")]), HOW).record()
    # Packing writes JPEG: other pixels, the same images and captions.
    assert (packed["images"], packed["captions"]) == (7, 20)
    assert packed["ids_sha256"] == expected["ids_sha256"]


def test_the_first_images_and_the_counts_that_are_expected(tmp_path):
    path = caption_file(tmp_path)
    assert measure(path, limit=3).metrics["images"] == 3
    refused("found 7 images, expected 8", path, expected=(8, None))
    refused("found 20 captions, expected 21", path, expected=(7, 21))


@pytest.mark.parametrize(
    ("file", "images", "captions", "name"),
    [
        ("coco_karpathy_test.json", 5000, 25010, "COCO, Karpathy's test split"),
        ("flickr30k_test.json", 1000, 5000, "Flickr30K, Karpathy's test split"),
    ],
)
def test_a_model_that_knows_nothing_scores_at_chance_on_the_real_captions(
    shared, tmp_path, file, images, captions, name
):
    path = shared / "karpathy" / file
    started = time.process_time()  # which a busy machine does not stretch
    found = measure(path, ByIds(), HowMeasured(device="cpu", batch_size=1000))
    assert time.process_time() - started < 240
    m = found.metrics
    assert (m["images"], m["captions"], found.public_set) == (images, captions, name)
    for key in RECALLS:
        assert m[f"{key}_low"] <= m[key] <= m[f"{key}_high"]
        assert abs(m[key] - m[f"chance_{key}"]) < 6 * (m[f"chance_{key}"] * 5 / images) ** 0.5
        assert abs(m[f"shuffled_{key}"] - m[f"chance_{key}"]) < 6 * (m[f"chance_{key}"] * 5 / images) ** 0.5
    assert 0.4 * images < m["t2i_median_rank"] < 0.6 * images


def test_what_bears_the_name_of_a_public_set_must_be_it(shared, tmp_path):
    rows = json.loads((shared / "karpathy" / "flickr30k_test.json").read_text())
    short = tmp_path / "flickr30k_test.json"
    short.write_text(json.dumps(rows[:-1]))
    refused(
        "found 999 images and 4,995 captions, but Flickr30K, Karpathy's test split has 1,000 and 5,000", short, ByIds()
    )
    five = [{**row, "caption": row["caption"][:4]} for row in rows]
    (tmp_path / "anything.json").write_text(json.dumps(five))
    refused("found 1,000 images and 4,000 captions, but Flickr30K", tmp_path / "anything.json", ByIds())
    rows[3]["image"] = "flickr30k-images/1.jpg"
    short.write_text(json.dumps(rows))
    refused("its 1,000 image ids are not those of Flickr30K, .*: wrong ids", short, ByIds())
    # A part of it that says so is another set.
    assert measure(short, ByIds(), limit=10).public_set is None


# ----------------------------------------------------------------------------- protocols


def five_a_picture(seed=0, images=1000, width=24):
    """Embeddings of a model that finds part of the pairs."""
    generator = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(images, width, generator=generator), dim=1)
    owners = torch.arange(images).repeat_interleave(5)
    text = normalize(image[owners] + 0.3 * torch.randn(5 * images, width, generator=generator), dim=1)
    return image, text, owners


def test_an_image_copy_a_caption_divides_recall_and_the_published_protocol_recovers_it():
    image, text, owners = five_a_picture()
    right = metrics_over_ranks(ranked_set(image, text, owners))
    wrong = metrics_over_ranks(ranked_set(image, text, owners, "image_per_caption"))
    assert 0.3 < right["t2i_R@1"] < 0.95 and 0.3 < right["i2t_R@1"] < 0.99
    assert wrong["i2t_R@1"] == pytest.approx(right["i2t_R@1"] / 5, abs=1e-12)
    assert wrong["t2i_R@5"] == pytest.approx(right["t2i_R@1"], abs=1e-12)
    assert wrong["chance_i2t_R@1"] == wrong["chance_t2i_R@1"] == 1 / 5000
    # Copies tie: which of them comes first is all that the order of ties decides.
    assert wrong["t2i_R@1_worst"] == 0 and wrong["t2i_R@1_best"] == pytest.approx(right["t2i_R@1"], abs=1e-12)
    assert right == retrieval_metrics(image, text, owners)


def test_the_protocol_is_named_and_warned_of(tmp_path):
    path = caption_file(tmp_path)
    wrong = measure(path, how=HowMeasured(device="cpu", protocol="image_per_caption", bootstrap=Bootstrap(0)))
    assert (wrong.record()["protocol"], wrong.metrics["images"], wrong.metrics["image_candidates"]) == (
        "image_per_caption", 7, 20,
    )  # fmt: skip
    assert "(20 candidates): not the published measure" in wrong.text()
    assert "protocol: karpathy\n" in measure(path).text()


# ----------------------------------------------------------------------------- intervals and self-check


def test_intervals_are_those_of_resampling_images_by_hand():
    rng = np.random.default_rng(3)
    image_Q = np.repeat(np.arange(30), rng.integers(1, 5, 30))
    hits_QK = rng.random((len(image_Q), 2)) < 0.4
    found = recall_intervals({"t2i": (hits_QK, image_Q)}, 30, Bootstrap(400, seed=5))["t2i"]
    drawn = np.random.default_rng(5).integers(30, size=(400, 30))
    means = [np.concatenate([hits_QK[image_Q == image] for image in row]).mean(0) for row in drawn]
    assert np.allclose(found, np.quantile(means, [0.025, 0.975], axis=0))
    assert np.array_equal(found, recall_intervals({"t2i": (hits_QK, image_Q)}, 30, Bootstrap(400, seed=5))["t2i"])


def test_an_image_is_drawn_with_all_its_captions():
    """Captions of one picture that succeed and fail together are no more than one observation."""
    image_Q = np.repeat(np.arange(100), 10)
    together = np.repeat(np.arange(100) % 2 == 0, 10)[:, None]
    apart = (np.arange(1000) % 2 == 0)[:, None]
    found = recall_intervals({"a": (together, image_Q), "b": (apart, image_Q)}, 100, Bootstrap(300))
    low, high = found["a"][:, 0]
    assert high - low > 0.15 and np.allclose(found["b"], 0.5)


def test_the_self_check_refuses_what_chance_cannot_explain():
    check_chance("i2t_R@1", 0.0011, 0.001, 1000, 5)
    with pytest.raises(UserError, match=r"shuffled pairs give i2t_R@1 10.000 %, expected chance, 0.100 %"):
        check_chance("i2t_R@1", 0.1, 0.001, 1000, 5)


# ----------------------------------------------------------------------------- errors


def changed(**changes):
    rows = entries()
    rows[2].update(changes)
    return rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(image="photo2.jpg"), r"1 of its 7 images are not in .*photo2.jpg. Did you mean 'photo2.png'\?$"),
        (changed(image="photo3.png"), "found 1 duplicate ids, expected each once: 'photo3'"),
        (changed(caption=[]), "image photo2.png: no caption, expected at least one$"),
        (changed(caption=["a", " "]), "image photo2.png: caption 1 is empty$"),
        ({"images": [{"id": 1, "file_name": "photo0.png"}], "annotations": [{"image_id": 2, "caption": "a"}]},
         "annotations entry 0: image id 2 is not among 'images'"),
        ({"images": [{"id": 1, "file_name": "photo0.png"}], "annotations": []}, "photo0.png: no caption"),
        ([], "none of|found no image"),
        ([{"caption": ["a"]}], "none of|has no 'image'"),
    ],
)  # fmt: skip
def test_bad_caption_files_give_no_number(tmp_path, content, message):
    refused(message, caption_file(tmp_path, content))


def test_one_image_under_two_ids_is_refused_unless_allowed(tmp_path):
    path = caption_file(tmp_path)
    (tmp_path / "photo5.png").write_bytes((tmp_path / "photo1.png").read_bytes())
    refused(r"1 of 7 images are the same file as another with another id \('photo5' is 'photo1'\)", path)
    assert measure(path, allow_copies=True).metrics["images"] == 7


def test_one_id_of_two_images_is_refused(tmp_path):
    for number, seed in enumerate((1, 2)):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            image = io.BytesIO()
            photo(seed).save(image, "PNG")
            for name, data in (("a.png", image.getvalue()), ("a.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match="id 'a' names two different images"):
        evaluate_retrieval(ByContent(), RetrievalData([str(tmp_path)]), HOW)


def test_an_image_that_does_not_decode_is_named(tmp_path):
    path = caption_file(tmp_path)
    (tmp_path / "photo6.png").write_bytes(b"no image")
    refused("captions.json: image photo6.png: the image does not decode", path)


class Bad(ByContent):
    def __init__(self, fault):
        self.fault = fault
        self.text_width = 8 if fault == "widths" else 12

    def encode_image(self, images, batch_size=64):
        rows = super().encode_image(images)
        if self.fault == "nan":
            rows[0, 0] = float("nan")
        return {"rows": rows[:-1], "long": 3 * rows}.get(self.fault, rows)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "2 of 7 image embeddings hold NaN or infinity"),
        ("widths", "image embeddings are 12 wide, text embeddings 8"),
        ("rows", r"found embeddings \[3, 12\] for 4 images, expected one row each"),
        ("long", "7 of 7 image embeddings are not of length 1"),
    ],
)
def test_bad_embeddings_give_no_number(tmp_path, fault, message):
    refused(message, caption_file(tmp_path), Bad(fault))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"images": ["x"]}, "--images: .* is read as shards, which have no separate images"),
        ({"splits": ["test"]}, "--split: .* is read as shards, which have no splits"),
    ],
)
def test_flags_of_caption_files_mean_nothing_to_shards(tmp_path, data, message):
    (tmp_path / "0.tar").touch()
    refused(message, tmp_path, **data)


# ----------------------------------------------------------------------------- the dump


def recall_of_clip_benchmark(scores_NM, positives_NM, k):
    """Recall as CLIP_benchmark's `zeroshot_retrieval` defines it: the share of rows with a positive in the top k."""
    top = torch.topk(scores_NM, k, dim=1)[1]
    return (positives_NM.gather(1, top).sum(1) > 0).float().mean().item()


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    """(what was printed of recall, the JSON result, the folder of the dump)."""
    folder = tmp_path_factory.mktemp("dumped")
    path = caption_file(folder / "data", count=25)
    out, dump = folder / "result.json", folder / "dump"
    arguments = ["eval", "retrieval", "content:own", str(path), "--device", "cpu", "--resamples", "20"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setitem(models.MODELS, "content", lambda rest, device, precision: ByContent())
        assert main([*arguments, "--json", str(out), "--dump", str(dump)]) == 0
        assert main([*arguments, "--dump", str(dump)]) == 2  # it is there already
    (row,) = [line.split()[2:] for line in printed.getvalue().splitlines() if line.startswith("by content")]
    return row, json.loads(out.read_text()), dump


def test_every_recall_can_be_computed_again_from_the_dump(dumped):
    printed, found, dump = dumped
    assert sorted(file.name for file in dump.iterdir()) == [
        "embeddings.safetensors", "ids.json", "positives.json", "result.json",
    ]  # fmt: skip
    assert json.loads((dump / "result.json").read_text()) == found
    ids = json.loads((dump / "ids.json").read_text())
    assert ids == [f"photo{i}" for i in range(25)] and ids_digest(ids) == found["ids_sha256"]
    positives = json.loads((dump / "positives.json").read_text())
    assert positives["captions"] == [caption for row in entries(25) for caption in row["caption"]]
    tensors = load_file(dump / "embeddings.safetensors")
    again = recalls(tensors["image"], tensors["text"], positives["caption_image"])
    for key in RECALLS:
        assert found[key] == pytest.approx(again[key], abs=1e-6)
    assert printed == [f"{100 * again[key]:.2f}" for key in RECALLS]


def recalls(image, text, owners):
    scores = text @ image.t()
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(scores)), owners] = True
    found = {f"t2i_R@{k}": recall_of_clip_benchmark(scores, right, k) for k in (1, 5, 10)}
    return found | {f"i2t_R@{k}": recall_of_clip_benchmark(scores.t(), right.t(), k) for k in (1, 5, 10)}


def test_the_independent_recall_is_the_original_one(shared):
    tensors = load_file(shared / "golden" / "retrieval.safetensors")
    golden = json.loads((shared / "golden" / "retrieval.json").read_text())["results"]["clip_benchmark"]
    found = recalls(tensors["image_emb"], tensors["text_emb"], tensors["text_image_index"])
    assert found == pytest.approx(golden, abs=1e-6)


def test_clip_benchmark_finds_the_same_in_the_dump(dumped):
    zeroshot_retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    _, found, dump = dumped
    tensors = load_file(dump / "embeddings.safetensors")
    owners = json.loads((dump / "positives.json").read_text())["caption_image"]
    rows = [[str(row) for row, owner in enumerate(owners) if owner == image] for image in range(25)]

    class Dumped:
        encode_image = staticmethod(lambda images: tensors["image"][images])
        encode_text = staticmethod(lambda texts: tensors["text"][texts])

    loader = [(torch.arange(start, end), rows[start:end]) for start, end in pairwise((0, 10, 20, 25))]
    result = zeroshot_retrieval.evaluate(
        Dumped(), loader, lambda texts: torch.tensor([int(text) for text in texts]), "cpu", amp=False,
        recall_k_list=[1, 5, 10],
    )  # fmt: skip
    for k in (1, 5, 10):
        assert found[f"t2i_R@{k}"] == pytest.approx(result[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert found[f"i2t_R@{k}"] == pytest.approx(result[f"text_retrieval_recall@{k}"], abs=1e-6)


# ----------------------------------------------------------------------------- the cache


class Counting(ByContent):
    encoded = 0

    def encode_image(self, images, batch_size=64):
        Counting.encoded += len(images)
        return super().encode_image(images)


def test_embeddings_are_remembered_until_something_changes(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "counting", lambda rest, device, precision: Counting())
    path, weights, cache = caption_file(tmp_path / "data"), tmp_path / "weights", tmp_path / "cache"
    weights.write_text("first")
    how = HowMeasured(device="cpu", bootstrap=Bootstrap(10), batch_size=3, cache=cache)

    def found():
        """(images encoded, the result)"""
        Counting.encoded = 0
        result = measure(path, f"counting:{weights}", how)
        return Counting.encoded, result.record()

    first = found()
    assert first[0] == 7 and found() == (0, first[1]) and len(list(cache.iterdir())) == 1

    photo(99).save(tmp_path / "data" / "photo3.png")  # an image
    changed = found()
    assert changed[0] == 7 and changed[1]["ids_sha256"] == first[1]["ids_sha256"] and found()[0] == 0
    weights.write_text("second")  # the model
    assert found() == (7, changed[1])
    monkeypatch.setattr(Counting, "preprocessing", lambda self: "images: squashed")
    assert found()[0] == 7
    path.write_text(json.dumps(entries()[::-1]))  # the order of the ids
    assert found()[0] == 7
    assert len(list(cache.iterdir())) == 5

    for file in cache.iterdir():  # a copy that was cut off
        file.write_bytes(file.read_bytes()[:-1])
    assert found()[0] == 7 and found()[0] == 0


def test_the_cache_needs_a_model_by_name_and_a_folder(tmp_path):
    path = caption_file(tmp_path / "data")
    how = HowMeasured(device="cpu", cache=tmp_path / "cache")
    refused("cache: needs a model by its name", path, ByContent(), how)
    refused("--cache: .* is a file, expected a folder", path, how=HowMeasured(device="cpu", cache=path))
