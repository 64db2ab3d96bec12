"""Text-pair retrieval against a dense reference, its file formats, its command, and published numbers."""

import json
import zlib

import numpy as np
import pytest
import torch
from export_samples import CAPTIONS, small_export
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

import mmd2v
from mmd2v.cli.main import main
from mmd2v.data.pair_files import read_pairs
from mmd2v.errors import UserError
from mmd2v.evaluation.features import pool_rows, text_features
from mmd2v.evaluation.text_models import HFTextModel
from mmd2v.evaluation.text_pairs import PAIR_LIMIT, named_files, pair_metrics, pairs_of_file, pairs_of_files
from mmd2v.models.packed import Layout, Packed
from mmd2v.report.published import published
from mmd2v.report.results import read_results

NUMBERS = [f"{side}_R@{k}" for side in ("second_to_first", "first_to_second") for k in (1, 5)]


def reference(queries: np.ndarray, bank: np.ndarray, k: int) -> float:
    """Share of queries whose own row is among the first k by score, then index."""
    hits = 0
    for i, query in enumerate(queries):
        scores = bank @ query
        hits += i in sorted(range(len(bank)), key=lambda j: (-scores[j], j))[:k]
    return hits / len(queries)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_recall_equals_a_dense_reference(seed, n):
    draw = np.random.default_rng(seed)
    # Unit rows with exact products: most scores occur more than once.
    first, second = (draw.choice([-0.5, 0.5], (n, 4)) for _ in range(2))
    metrics = pair_metrics(torch.tensor(first), torch.tensor(second))
    for name, queries, bank in (("second_to_first", second, first), ("first_to_second", first, second)):
        for k in (1, 5):
            key = f"{name}_R@{k}"
            assert metrics[key] == pytest.approx(reference(queries, bank, k))
            assert metrics.get(f"{key}_worst", 0) <= metrics[key] <= metrics.get(f"{key}_best", 1)
    assert metrics["mean"] == pytest.approx(np.mean([metrics[key] for key in NUMBERS]))
    assert metrics["chance_R@5"] == pytest.approx(min(1, 5 / n))


def test_an_equal_sentence_of_another_pair_is_a_miss():
    first = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    metrics = pair_metrics(first, 3 * first)
    assert metrics["second_to_first_R@1"] == metrics["first_to_second_R@1"] == pytest.approx(2 / 3)
    bounds = metrics["second_to_first_R@1_worst"], metrics["second_to_first_R@1_best"]
    assert bounds == (pytest.approx(1 / 3), 1.0)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, 2), "expected one row a sentence"),
        (torch.eye(2), torch.eye(3), r"found \[2, 2\] and \[3, 3\]"),
        (torch.eye(2), torch.full((2, 2), torch.nan), "NaN or infinity"),
    ],
)
def test_bad_embeddings_are_refused(first, second, message):
    with pytest.raises(UserError, match=message):
        pair_metrics(first, second)


# --------------------------------------------------------------------------------------------- formats

MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t1\t2\t"Half a quotation\tAnother sentence.\r\n'
    "0\t3\t4\tNot\tused\r\n"
    "1\t5\t6\tSecond\tpair\r\n"
)
QQP = (
    "\tid\tsentence1\tsentence2\tis_duplicate\n"
    '7\ta\t"What is ""it""?"\t"Tab\tand\nline"\t1.0\n'
    "8\tb\tno\tno\t0.0\n"
    "9\tc\tbroken\n"
    "9\tc\tbroken\trow\t\n"
    "5\td\t \tempty\t1.0\n"
    "4\te\tone\ttwo\t1.0\n"
)
GLUE = 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\t"Why\tHow\t1\n1\t1\t2\tx\ty"\t1\n'


@pytest.fixture
def folder(tmp_path):
    for name, text in (("mrpc.txt", MRPC), ("qqp.tsv", QQP), ("glue.tsv", GLUE)):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return tmp_path


def test_formats(folder):
    mrpc = read_pairs(folder / "mrpc.txt")
    assert (mrpc.format, mrpc.broken) == ("mrpc", 0)
    assert mrpc.first == ['"Half a quotation', "Second"] and mrpc.second == ["Another sentence.", "pair"]
    qqp = read_pairs(folder / "qqp.tsv")
    assert (qqp.format, qqp.broken) == ("qqp", 3)
    assert qqp.first == ['What is "it"?', "one"] and qqp.second == ["Tab\tand\nline", "two"]
    assert read_pairs(folder / "qqp.tsv", limit=1).first == ['What is "it"?']
    glue = read_pairs(folder / "glue.tsv", "qqp_glue")
    assert glue.first == ['"Why', "x"] and glue.second == ["How", 'y"']


def test_what_is_wrong_with_a_file_is_named(folder):
    (folder / "other.csv").write_text("a,b,c\n1,2,3\n")
    (folder / "latin.txt").write_bytes(MRPC.encode("utf-16"))
    (folder / "negative.txt").write_text(MRPC.replace("1\t", "0\t", 1).split("1\t5")[0])
    for name, options, message in [
        ("mrcp.txt", {}, "not found.*Did you mean 'mrpc.txt'"),
        ("other.csv", {}, "begins with the columns a,b,c, expected those of mrpc"),
        ("glue.tsv", {}, "say --format qqp or --format qqp_glue"),
        ("latin.txt", {}, "is not UTF-8"),
        ("negative.txt", {}, "holds no positive pair"),
        ("mrpc.txt", {"format": "qqp"}, "no column question1 or sentence1, which format qqp needs"),
        ("mrpc.txt", {"format": "mrcp"}, "--format: unknown name 'mrcp'. Did you mean 'mrpc'"),
        ("mrpc.txt", {"limit": 0}, "--limit: found 0"),
    ]:
        with pytest.raises(UserError, match=message):
            read_pairs(folder / name, **options)


def test_a_sentence_is_encoded_once(folder):
    (folder / "same.txt").write_text(MRPC.replace("pair", "Second").replace("Another sentence.", "Second"))
    asked: list[str] = []

    def encode(texts):
        asked.extend(texts)
        return torch.eye(4)[: len(texts)]

    result = pairs_of_file(encode, folder / "same.txt")
    assert asked == ['"Half a quotation', "Second"] and result.pairs == 2
    assert result.metrics["first_to_second_R@5"] == 1.0
    assert "2 positive pairs, mrpc" in result.text() and result.record()["broken_rows"] == 0


# ----------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    changes = {"model__projection": {"kind": "linear", "dim": 8}, "model__pooling": {"image": "cls", "text": "mean"}}
    return small_export(tmp_path_factory.mktemp("pairs"), **changes)


def test_poolings(export):
    encoder = mmd2v.load(export)
    texts = ["two blue squares", *CAPTIONS]
    rows = {name: text_features(encoder, texts, name, batch_size=3) for name in ("embedding", "cls", "mean")}
    assert [tuple(found.shape) for found in rows.values()] == [(4, 8), (4, 16), (4, 16)]
    # This student pools the mean, so that its projection of it is the embedding; in batches of any size.
    projected = torch.nn.functional.normalize(encoder.student.projection(rows["mean"], "text"), dim=-1)
    assert torch.allclose(projected, rows["embedding"], atol=1e-5)
    assert torch.allclose(text_features(encoder, texts, "cls", batch_size=1), rows["cls"], atol=1e-6)
    assert not torch.allclose(rows["cls"], rows["mean"], atol=1e-2)
    with pytest.raises(UserError, match=r"pooling: unknown name 'meen'\. Did you mean 'mean'"):
        text_features(encoder, texts, "meen")


def test_rows_of_padding_count_only_where_they_are_asked_for():
    layout = Layout.build({"image": [1], "text": [3, 3]}, torch.device("cpu"))
    rows = Packed(torch.tensor([[9.0], [1], [3], [8], [4], [2], [0]]), layout)
    real = np.array([2, 1])
    pooled = {name: pool_rows(rows, "text", real, name).flatten().tolist() for name in ("cls", "mean", "mean_padded")}
    assert pooled == {"cls": [1, 4], "mean": [2, 4], "mean_padded": [4, 2]}
    packed = Packed(rows.x_TD[:4], Layout.build({"text": [3, 1]}, torch.device("cpu")))
    with pytest.raises(UserError, match="'mean_padded' needs rows of padding"):
        pool_rows(packed, "text", np.array([3, 1]), "mean_padded")


@pytest.mark.parametrize("pooling", ["embedding", "cls", "mean"])
def test_command(export, tmp_path, capsys, pooling):
    rows = [f"1\t{i}\t{i}\t{text}\t{text}" for i, text in enumerate(CAPTIONS)]
    (tmp_path / "pairs.txt").write_text("\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows]))
    out = tmp_path / "pairs.json"
    arguments = ["--pairs", str(tmp_path / "pairs.txt"), "--pooling", pooling, "--json", str(out), "--device", "cpu"]
    assert main(["eval", "pairs", str(export), *arguments]) == 0
    found = json.loads(out.read_text())
    assert found["mean"] == 1.0 and found["pooling"] == pooling and found["pairs"] == 3
    assert "mean of the 4 numbers: 100.00" in capsys.readouterr().out
    assert main(["eval", "pairs", str(export), *arguments, "--limit", "2", "--format", "mrpc"]) == 0
    assert json.loads(out.read_text())["pairs"] == 2
    assert main(["eval", "pairs", str(export), *arguments, "--format", "qqp"]) == 2
    assert "no column question1 or sentence1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- real data


def test_counts_of_the_real_files(shared):
    found = {
        name: read_pairs(shared / name, limit=PAIR_LIMIT)
        for name in ("mrpc/msr_paraphrase_train.txt", "mrpc/msr_paraphrase_test.txt", "qqp/quora-dev.csv")
    }
    assert [(len(pairs), pairs.broken) for pairs in found.values()] == [(2753, 0), (1147, 0), (7585, 2)]


@pytest.fixture(scope="module")
def minilm(shared):
    return HFTextModel(str(shared / "teachers/minilm_l6_v2"))


@pytest.mark.slow
def test_minilm_on_mrpc(shared, minilm):
    found = pairs_of_file(minilm.encode_text, shared / "mrpc/msr_paraphrase_test.txt").metrics
    recalls = [100 * found[f"{side}_R@1"] for side in ("first_to_second", "second_to_first")]
    assert recalls == pytest.approx([95.8, 96.2], abs=0.06)
    # Counting only what is strictly above, as some code does, forgives every tie.
    assert 100 * found["first_to_second_R@1_best"] == pytest.approx(96.9, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "mean"), [(0, 75.40), (3, 76.19), (6, 85.17)])
def test_minilm_on_the_first_qqp_pairs(shared, blocks, mean):
    """In our order of ties; strictly-above counting, which forgives all of them, finds half a point more."""
    model = HFTextModel(str(shared / "teachers/minilm_l6_v2"), blocks=blocks)
    found = pairs_of_file(model.encode_text, shared / "qqp/quora-dev.csv", limit=3000).metrics
    assert 100 * found["mean"] == pytest.approx(mean, abs=0.01)
    assert 25 * sum(found.get(f"{key}_best", found[key]) for key in NUMBERS) > 100 * found["mean"] + 0.3


def test_a_hugging_face_encoder_by_its_first_blocks(shared, minilm):
    """Fast: a few sentences against transformers itself, one by one, which leaves nothing to pad."""
    texts = ["How do I learn to swim?", "A cat.", "What is the best way of learning to swim in a lake, and how long?"]
    raw = AutoModel.from_pretrained(shared / "teachers/minilm_l6_v2", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(shared / "teachers/minilm_l6_v2")
    with torch.no_grad():
        alone = [raw(**tokenizer([text], return_tensors="pt")).last_hidden_state[0] for text in texts]
    expected = {"cls": [rows[0] for rows in alone], "mean": [rows.mean(0) for rows in alone]}
    for pooling, rows in expected.items():
        wanted = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
        assert torch.allclose(minilm.features(texts, pooling, batch_size=2), wanted, atol=1e-5)
    # Padding counted: another vector, the same in any company.
    padded = minilm.features(texts, "mean_padded")
    assert ((padded - minilm.features(texts, "mean")).norm(dim=1) > 0.05).all()
    assert torch.allclose(minilm.features(texts[1:2], "mean_padded"), padded[1:2], atol=1e-5)
    assert torch.equal(text_features(minilm, texts, "embedding"), minilm.encode_text(texts))
    assert HFTextModel(str(shared / "teachers/minilm_l6_v2"), blocks=0).name == "minilm_l6_v2, 0 blocks"
    with pytest.raises(UserError, match="7 blocks were asked for, the encoder has 6 blocks"):
        HFTextModel(str(shared / "teachers/minilm_l6_v2"), blocks=7)
    with pytest.raises(UserError, match="encodes texts alone"):
        minilm.encode_image([])


def test_the_published_sets_must_have_their_counts(shared, tmp_path, capsys):
    assert dict(published().pair_counts) == {
        "qqp_train": PAIR_LIMIT, "qqp_dev": 14885, "mrpc_train": 2753, "mrpc_test": 1147
    }  # fmt: skip
    files = {name: shared / f"mrpc/msr_paraphrase_{name[5:]}.txt" for name in ("mrpc_train", "mrpc_test")}

    def encode(texts):
        """A vector drawn by the sentence, in no time."""
        draw = [np.random.default_rng(zlib.crc32(text.encode())).standard_normal(4) for text in texts]
        return torch.tensor(np.stack(draw), dtype=torch.float32)

    report = pairs_of_files(encode, files, "qqp_glue")
    assert [result.pairs for result in report.results.values()] == [2753, 1147]
    assert report.record()["mean"] == pytest.approx(
        np.mean([result.metrics["mean"] for result in report.results.values()])
    )
    assert "mean of the 8 numbers of all sets" in report.text() and "1,147 positive pairs" in report.text()
    with pytest.raises(UserError, match=r"holds 1,147 positive pairs \(format mrpc\), expected 2,753 of mrpc_train"):
        pairs_of_files(encode, {"mrpc_train": files["mrpc_test"]})
    with pytest.raises(UserError, match=r"holds 7,585 positive pairs \(format qqp\), expected 14,885 of qqp_dev"):
        pairs_of_files(encode, {"qqp_dev": shared / "qqp/quora-dev.csv"})
    assert pairs_of_files(encode, {"qqp_dev": shared / "qqp/quora-dev.csv"}, limit=100).results["qqp_dev"].pairs == 100


def test_names_of_sets(tmp_path):
    (tmp_path / "a=b.txt").write_text("")
    files = named_files(["mrpc_test=x/test.txt", "own=y.csv", "z/plain.tsv", str(tmp_path / "a=b.txt")])
    assert {name: str(path) for name, path in files.items()} == {
        "mrpc_test": "x/test.txt", "own": "y.csv", "plain.tsv": "z/plain.tsv", "a=b.txt": str(tmp_path / "a=b.txt")
    }  # fmt: skip
    for items, message in [
        (["mrpc_tset=x"], "unknown set 'mrpc_tset'. Did you mean 'mrpc_test'"),
        (["a=x", "a=y"], "found 'a=y', expected FILE or NAME=FILE, each name once"),
        (["a="], "found 'a='"),
    ]:
        with pytest.raises(UserError, match=message):
            named_files(items)


def test_command_with_several_sets_and_poolings(shared, folder, tmp_path, capsys):
    out = tmp_path / "pairs.json"
    model = f"hf-text:{shared / 'teachers/minilm_l6_v2'}"
    files = [f"one={folder / 'mrpc.txt'}", f"two={folder / 'qqp.tsv'}"]
    assert main(["eval", "pairs", model, "--pairs", *files, "--pooling", "cls", "mean", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["model"] == "minilm_l6_v2" and list(found["poolings"]) == ["cls", "mean"]
    assert {name: part["pairs"] for name, part in found["poolings"]["mean"]["sets"].items()} == {"one": 2, "two": 2}
    printed = capsys.readouterr().out
    assert "pooling mean\none: 2 positive pairs, mrpc" in printed and "mean of the 8 numbers of all sets" in printed
    results = read_results([out], published())
    assert [(result.pooling, result.set) for result in results] == [
        (pooling, name) for pooling in ("cls", "mean") for name in ("one", "two")
    ]
