"""Token lengths: what a batch will have, one file a shard and tokenizer, resumable, found again, never stale."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from data_samples import write_tar
from text_runs import sentences, write_texts

from mmd2v.cli import data as cli
from mmd2v.config.schema import SourceConfig, TokenizerConfig
from mmd2v.data import token_lengths
from mmd2v.data.shards import ShardSet
from mmd2v.data.token_lengths import LengthFiles, count_shard, make_lengths, missing_lengths, read_counts, write_lengths
from mmd2v.data.tokenizers import load_tokenizer, train_tokenizer
from mmd2v.errors import UserError

TEXTS = sentences(50)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MMD2V_CACHE", str(tmp_path / "cache"))
    write_texts(tmp_path / "set", TEXTS, shard_size=6, captions=2)
    train_tokenizer(TEXTS, "wordlevel", 500).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def settings(folder: Path, **change) -> TokenizerConfig:
    return TokenizerConfig(**{"path": str(folder / "tokenizer.json"), "max_length": 16, **change})


def opened(folder: Path, out: str | None = None, **change) -> tuple[ShardSet, LengthFiles]:
    shards = ShardSet(str(folder / "set"))
    return shards, LengthFiles.of(shards.paths, load_tokenizer(settings(folder, **change)), out, SourceConfig())


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_are_those_of_every_text_before_truncation(folder, workers):
    report = write_lengths(str(folder / "set"), settings(folder), workers=workers)
    shards, files = opened(folder)
    ids = load_tokenizer(settings(folder)).encode_text(TEXTS)
    found = [read_counts(files.find(shard)) for shard in range(len(shards.paths))]
    assert np.concatenate([counts.lengths_N for counts in found]).tolist() == [len(row) for row in ids]
    assert [np.diff(counts.starts_R).tolist() for counts in found] == [[2] * n for n in shards.counts.tolist()]
    assert max(len(row) for row in ids) > 16  # something is cut
    assert (report.shards, report.counted, report.texts) == (5, 5, 50)
    assert (report.tokens, report.longest) == (sum(map(len, ids)), max(map(len, ids)))
    assert report.cut == sum(len(row) + 2 > 16 for row in ids) > 0


def test_a_file_is_named_after_its_tokenizer_and_serves_every_max_length(folder):
    write_lengths(str(folder / "set"), settings(folder), workers=1)
    shards, files = opened(folder, max_length=5, append_end=False)
    fingerprint = load_tokenizer(settings(folder)).fingerprint
    assert files.find(0) == Path(f"{shards.paths[0]}.{fingerprint[:8]}.lengths")
    assert missing_lengths(shards, files) == []
    train_tokenizer(TEXTS, "wordlevel", 30).save(str(folder / "tokenizer.json"))
    assert len(missing_lengths(*opened(folder))) == 5  # another tokenizer has other files


def test_what_is_there_is_not_counted_again(folder):
    shards, files = opened(folder)
    first = make_lengths(shards, files, settings(folder), workers=1)
    done = [next(first), next(first)]
    first.close()
    assert done == [0, 1] and missing_lengths(shards, files) == [2, 3, 4]
    assert sorted(make_lengths(shards, files, settings(folder), workers=2)) == [2, 3, 4]
    assert "(0 counted now)" in str(write_lengths(str(folder / "set"), settings(folder)))


def test_a_replaced_shard_is_counted_again(folder):
    write_lengths(str(folder / "set"), settings(folder), workers=1)
    for old in (folder / "set").glob("shard-000001.tar*"):
        if not old.name.endswith(".lengths"):
            old.unlink()
    (folder / "set" / "shards.json").unlink()
    write_tar(folder / "set" / "shard-000001.tar", [("a.txt", b"word1 word2 word3\n"), ("b.txt", b"word1\n")])
    shards, files = opened(folder)
    assert os.path.getsize(shards.paths[1]) == os.path.getsize(shards.paths[0])  # its size tells nothing
    assert missing_lengths(shards, files) == [1]
    write_lengths(str(folder / "set"), settings(folder), workers=1)
    assert read_counts(files.find(1)).lengths_N.tolist() == [3, 1]


def test_a_damaged_file_is_named_or_made_anew(folder):
    write_lengths(str(folder / "set"), settings(folder), workers=1)
    shards, files = opened(folder)
    path = files.find(2)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"{path}: not a file of token lengths of this version; delete it"):
        read_counts(path)
    assert missing_lengths(shards, files) == [2]
    write_lengths(str(folder / "set"), settings(folder), workers=1)
    assert len(read_counts(path).lengths_N) == 12


def test_a_row_that_cannot_be_read_counts_as_one_empty_text(tmp_path, folder):
    members = [("a.txt", b"word1 word2\nword3\n"), ("b.json", b"no json"), ("c.json", b'{"captions": []}')]
    write_tar(tmp_path / "bad.tar", [*members, ("d.txt", b"word4 word5 word6\n")])
    counts = count_shard(ShardSet(str(tmp_path / "bad.tar")), 0, load_tokenizer(settings(folder)))
    assert counts.lengths_N.tolist() == [2, 1, 0, 0, 3]
    assert counts.starts_R.tolist() == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_ends_early_is_an_error_that_names_it(folder, workers):
    path = folder / "set" / "shard-000003.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"shard-000003\.tar"):
        write_lengths(str(folder / "set"), settings(folder), workers=workers)
    assert not list((folder / "set").glob("shard-000003.tar.*.lengths"))


def test_a_folder_that_cannot_be_written_leaves_them_in_the_cache(folder, monkeypatch):
    # Root may write anywhere, so the answer of the system is given here.
    writable = os.access
    monkeypatch.setattr(
        token_lengths.os,
        "access",
        lambda path, mode: Path(path) != folder / "set" and writable(path, mode),
    )
    write_lengths(str(folder / "set"), settings(folder), workers=1)
    shards, files = opened(folder)
    assert [path.parent for path in map(files.find, range(5))] == [folder / "cache" / "lengths"] * 5
    assert missing_lengths(shards, files) == []
    assert not list((folder / "set").glob("*.lengths"))


def test_a_stale_file_beside_its_shard_does_not_hide_the_good_one(folder, monkeypatch):
    write_lengths(str(folder / "set"), settings(folder), workers=1)
    _, files = opened(folder)
    fresh = files.read(0)
    beside, cached = files.candidates(0)
    other = files.find(1).read_bytes()
    beside.write_bytes(other)
    os.utime(beside, (0, 0))  # older than the tar: a shard was put in its place, and nobody may write beside it
    with pytest.raises(UserError, match=rf"shard-000000\.tar: its file .* of another tar; expected {beside}"):
        files.read(0)
    monkeypatch.setattr(token_lengths.os, "access", lambda path, mode: Path(path) != folder / "set")
    write_lengths(str(folder / "set"), settings(folder), workers=1)
    assert cached.exists() and beside.read_bytes() == other
    assert files.read(0).lengths_N.tolist() == fresh.lengths_N.tolist() != files.read(1).lengths_N.tolist()


def addressed(folder: Path, *paths: str) -> LengthFiles:
    return LengthFiles.of(paths, load_tokenizer(settings(folder)), None, SourceConfig())


def test_a_link_that_is_signed_anew_keeps_its_file(folder):
    plain, *signed = (
        addressed(folder, address)
        for address in (
            "https://h/set/0.tar",
            "https://me:hunter2@h/set/0.tar?sign=hunter2",
            "https://h/set/0.tar?sign=2",
        )
    )
    assert all(files.candidates(0) == plain.candidates(0) for files in signed)
    assert plain.candidates(0) != addressed(folder, "https://h/other/0.tar").candidates(0)
    for path in (signed[0], addressed(folder, "pipe:curl -s https://h/0.tar?sign=hunter2")):
        assert "hunter2" not in str(path.target(0))


def test_links_that_differ_by_their_query_alone_have_files_of_their_own(folder):
    files = addressed(folder, "https://h/get.tar?n=0", "https://h/get.tar?n=1")
    assert files.target(0) != files.target(1)


def test_messages_keep_the_secrets_of_an_address(folder):
    address = "https://me:hunter2@h/set/0.tar?sign=hunter2"
    with pytest.raises(UserError, match=r"^https://h/set/0\.tar\?…: its file of token lengths is gone") as error:
        addressed(folder, address).read(0)
    assert "hunter2" not in str(error.value)
    shown = token_lengths.command([address, "local.tar"], settings(folder), None)
    assert shown.startswith("mmd2v data lengths https://h/set/0.tar?… local.tar --tokenizer ")


def test_a_named_folder_alone_is_used(folder):
    write_lengths(str(folder / "set"), settings(folder), out=str(folder / "lengths"), workers=1)
    assert len(list((folder / "lengths").iterdir())) == 5 and not list((folder / "set").glob("*.lengths"))
    assert missing_lengths(*opened(folder, str(folder / "lengths"))) == []
    assert len(missing_lengths(*opened(folder))) == 5


def test_the_command_counts_and_says_what_it_found(folder, capsys):
    arguments = [str(folder / "set"), "--tokenizer", str(folder / "tokenizer.json"), "--max-length", "16"]
    assert cli.main(["lengths", *arguments, "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("5 shards (5 counted now), 50 texts, ") and "max_length 16 cuts" in out
    assert "counting tokens: 25/25 samples" in err
    with pytest.raises(UserError, match=r"--max-length: found 0, expected at least 1"):
        cli.main(["lengths", *arguments[:-1], "0"])
    with pytest.raises(UserError, match=r"--workers: found 0, expected at least 1"):
        cli.main(["lengths", *arguments, "--workers", "0"])


def test_counting_reads_text_alone(tmp_path, folder):
    """A shard of large images takes no longer than its texts."""
    image = bytes(50_000_000)  # not even an image
    write_tar(tmp_path / "large.tar", [("a.jpg", image), ("a.txt", b"word1 word2\n")])
    shards = ShardSet(str(tmp_path / "large.tar"))
    tokenizer = load_tokenizer(settings(folder))
    shards.index(0)
    before = _read_bytes()
    assert count_shard(shards, 0, tokenizer).lengths_N.tolist() == [2]
    assert _read_bytes() - before < 1_000_000


def _read_bytes() -> int:
    """Bytes this process has read by system calls."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError


def test_fingerprint_is_of_the_content(folder):
    first = load_tokenizer(settings(folder))
    copy = folder / "copy"
    copy.mkdir()
    (copy / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    os.utime(copy / "tokenizer.json", (0, time.time()))
    assert load_tokenizer(settings(folder, path=str(copy), max_length=9)).fingerprint == first.fingerprint
    with open(copy / "tokenizer.json", "a") as handle:
        handle.write("\n")
    assert load_tokenizer(settings(folder, path=str(copy))).fingerprint != first.fingerprint


@pytest.mark.parametrize(("kind", "name"), [("sentencepiece", "kosmos2_spm64k"), ("fairseq_gpt2", "gpt2_fairseq")])
def test_other_kinds_have_fingerprints_of_their_files(shared, kind, name):
    tokenizer = load_tokenizer(TokenizerConfig(kind=kind, path=str(shared / "tokenizers" / name)))
    assert len(tokenizer.files) == (1 if kind == "sentencepiece" else 3)
    assert all(file.is_file() for file in tokenizer.files) and len(tokenizer.fingerprint) == 64
