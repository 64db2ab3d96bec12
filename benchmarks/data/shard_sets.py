"""The two shard sets of the benchmarks, made from Flickr8k: a .jpg and a .txt with one caption a sample.

`500px`: 60 photographs in their original size (500 pixels on the long side), each repeated under ids of its own.
`160px`: 6,000 photographs of 160 × 160 pixels.
"""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from webdataset import TarWriter

from mmd2v.data.manifest import ManifestEntry, write_manifest
from mmd2v.data.shards import ShardIndex
from mmd2v.errors import UserError
from mmd2v.files import write_text

SHARDS = 8
REPEATS = 32  # of each 500-px photograph
SETS = {"500px": "flickr8k_train_60_fullsize.tar", "160px": "flickr8k_train_images_160px.tar"}


def make_sets(shared: Path, folder: Path) -> dict[str, Path]:
    """Write both sets below ``folder``; return the folder of each."""
    source = shared / "data" / "flickr8k"
    if not source.is_dir():
        raise UserError(f"MMD2V_SHARED: {source} not found, expected the folder of real data")
    entries = json.loads((source / "flickr8k_train.json").read_text(encoding="utf-8"))
    captions = {Path(entry["image"]).stem: entry["caption"][0] for entry in entries}
    made = {}
    for name, tar in SETS.items():
        images = list(read_images(source / tar))
        samples = [(key, data, captions[key]) for key, data in images]
        if name == "500px":
            samples = [(f"{n:03d}-{key}", *rest) for n in range(REPEATS) for key, *rest in samples]
        made[name] = write_set(folder / name, samples)
    return made


def read_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name without ending, bytes) of every image of a tar."""
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                yield Path(member.name).stem, tar.extractfile(member).read()


def write_set(folder: Path, samples: Iterable[tuple[str, bytes, str]], shards: int = SHARDS) -> Path:
    """Write (key, JPEG, caption) samples into shards with their indexes and manifest."""
    samples = list(samples)
    each = -(-len(samples) // shards)
    rest = iter(samples)
    counts = {}
    folder.mkdir(parents=True)
    for number in range(shards):
        path = folder / f"shard-{number:06d}.tar"
        with TarWriter(str(path), encoder=False) as tar:
            for key, jpeg, caption in islice(rest, each):
                tar.write({"__key__": key, "jpg": jpeg, "txt": caption.encode()})
        index = ShardIndex.scan(str(path))
        index.write()
        counts[path.name] = ManifestEntry(len(index), index.size)
    write_manifest(folder, counts)
    return folder


def clip_tokenizer(merges: Path, target: Path) -> Path:
    """Turn the byte pairs of CLIP (`bpe_simple_vocab_16e6.txt.gz`) into a tokenizer.json of the tokenizers library."""
    lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    pairs = [tuple(line.split()) for line in lines]
    start, end = "<|startoftext|>", "<|endoftext|>"
    # CLIP numbers the bytes as they come in this order, first alone, then at the end of a word.
    letters = byte_letters()
    names = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in pairs), start, end]
    backend = Tokenizer(
        models.BPE(
            vocab={name: n for n, name in enumerate(names)}, merges=pairs, end_of_word_suffix="</w>", unk_token=end
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ids = [(name, names.index(name)) for name in (start, end)]
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    write_text(target, backend.to_str(pretty=True))
    return target


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes, in the order of CLIP's vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + n) for n in range(len(others))]
