"""What a data set holds: counts, image sizes, lengths of its captions. Every number is exact; no image is decoded.

Everything is counted by value (so many captions of 9 words), so that memory does not grow with the number of samples.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmd2v.config.schema import SourceConfig, TokenizerConfig
from mmd2v.data.addresses import expand_shards, is_remote
from mmd2v.data.damage import Damage
from mmd2v.data.image_header import image_size
from mmd2v.data.places import Places
from mmd2v.data.shard_index import ShardIndex
from mmd2v.data.shards import ShardSet
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.progress import Progress

PERCENTILES = (50, 90, 95, 99)
_AT_ONCE = 256  # samples read together
_HEAD = 1 << 16  # bytes in which the size of nearly every image stands


class Distribution(Counter[int]):
    """Whole numbers, by how often each occurs."""

    def percentile(self, percent: float) -> int:
        """The least number that at least ``percent`` % of all are not greater than."""
        left = percent / 100 * self.total()
        for value in sorted(self):
            left -= self[value]
            if left <= 1e-9:
                return value
        return max(self)

    @property
    def mean(self) -> float:
        """Their mean."""
        return sum(value * count for value, count in self.items()) / self.total()

    def above(self, limit: int) -> float:
        """Which part of them is greater than ``limit``, from 0 to 1."""
        return sum(count for value, count in self.items() if value > limit) / self.total()

    def summary(self, percentiles: Sequence[int] = PERCENTILES) -> dict[str, float]:
        """``min``, ``mean``, some ``p50`` and so on, ``max``; empty without numbers."""
        if not self:
            return {}
        middle = {f"p{percent}": self.percentile(percent) for percent in percentiles}
        return {"min": min(self), "mean": round(self.mean, 4), **middle, "max": max(self)}


@dataclass
class Stats:
    """What a data set holds."""

    shards: int = 0
    images: int = 0
    texts: int = 0
    """Samples without image."""
    captions: int = 0
    bytes: int = 0
    """Of the shards that could be read."""
    captions_each: Distribution = field(default_factory=Distribution)
    """Captions of a sample."""
    widths: Distribution = field(default_factory=Distribution)
    """Pixels, as stored: before an EXIF orientation turns an image."""
    heights: Distribution = field(default_factory=Distribution)
    unknown_sizes: int = 0
    """Images whose header tells no size."""
    words: Distribution = field(default_factory=Distribution)
    """Words of a caption, between white space."""
    tokens: Distribution = field(default_factory=Distribution)
    """Tokens of a caption, special ones included, before it is cut; empty without tokenizer."""
    max_length: int | None = None
    """Tokens a caption is cut to; None without tokenizer."""
    damaged: Counter[str] = field(default_factory=Counter)
    """Kind of damage → samples that could not be read (an unreadable shard counts once)."""

    @property
    def longer(self) -> float | None:
        """Which part of the captions is cut to `max_length`; None without tokenizer."""
        return None if self.max_length is None or not self.tokens else self.tokens.above(self.max_length)

    def to_json(self) -> dict[str, Any]:
        """All numbers; fractions are in [0, 1], sizes in pixels."""
        record: dict[str, Any] = {
            "shards": self.shards,
            "images": self.images,
            "texts": self.texts,
            "captions": self.captions,
            "bytes": self.bytes,
            "captions_each": self.captions_each.summary(),
            "image_width": self.widths.summary(),
            "image_height": self.heights.summary(),
            "unknown_image_sizes": self.unknown_sizes,
            "caption_words": self.words.summary(),
            "damaged": dict(self.damaged),
        }
        if self.max_length is not None:
            record["caption_tokens"] = self.tokens.summary()
            record["max_length"] = self.max_length
            record["longer_than_max_length"] = self.longer
        return record

    def __str__(self) -> str:
        samples = f"{self.images:,} images" if self.images else f"{self.texts:,} texts without image"
        if self.images and self.texts:
            samples += f", {self.texts:,} texts without image"
        lines = [f"{self.shards:,} shards, {samples}, {self.captions:,} captions, {self.bytes / 1e6:,.1f} MB"]
        rows = {"captions a sample": self.captions_each, "words a caption": self.words, "tokens a caption": self.tokens}
        rows |= {"width, pixels": self.widths, "height, pixels": self.heights}
        columns = ["min", "mean", *(f"p{percent}" for percent in PERCENTILES), "max"]
        lines += ["", f"{'':18}" + "".join(f"{column:>9}" for column in columns)]
        for name, numbers in rows.items():
            if numbers:
                values = numbers.summary()
                lines.append(
                    f"{name:18}"
                    + "".join(f"{values[c]:>9,.1f}" if c == "mean" else f"{values[c]:>9,}" for c in columns)
                )
        if self.longer is not None:
            lines += ["", f"{100 * self.longer:.2f} % of the captions are longer than {self.max_length} tokens"]
        if self.unknown_sizes:
            lines.append(f"{self.unknown_sizes:,} images have no header that tells their size")
        if self.damaged:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.damaged.most_common())
            lines.append(f"{self.damaged.total():,} damaged ({kinds}); `mmd2v data check` names them")
        return "\n".join(lines)


def data_stats(
    spec: str | Sequence[str], tokenizer: TokenizerConfig | None = None, *, source: SourceConfig | None = None
) -> Stats:
    """Count what some shards hold.

    Args:
        spec: see `mmd2v.data.shards.expand_shards`.
        tokenizer: also count tokens; its ``append_end`` is taken as true where it has an end token.
        source: how shards that are no local files are fetched; none: the defaults.

    Raises:
        UserError: no such shards, or no such tokenizer. Damage inside is counted.
    """
    # Whether it has an end token is known only once it is open.
    opened = None if tokenizer is None else load_tokenizer(tokenizer.model_copy(update={"append_end": False}))
    stats = Stats(max_length=None if opened is None else opened.max_length)
    shards = _open(spec, source, stats)
    try:
        with Progress("counting", len(shards), unit="samples") as progress:
            for shard, count in enumerate(shards.counts.tolist()):
                if shards.is_remote:
                    shards.prefetch(range(shard, min(shard + 1 + shards.source.prefetch, len(shards.paths))))
                try:
                    index = shards.index(shard)
                except Damage as damage:
                    stats.damaged[damage.kind.value] += 1
                else:
                    stats.bytes += index.size
                    _count_shard(stats, shards, shard, index, count, opened, progress)
    finally:
        shards.close()
    return stats


def _open(spec: str | Sequence[str], source: SourceConfig | None, stats: Stats) -> ShardSet:
    """Open the shards whose samples can be counted; the others are counted as damaged."""
    try:
        shards = ShardSet(spec, source=source)
    except Damage:
        # Without a manifest the set opens its shards to count them, and one that is damaged is the end of all.
        good: list[str] = []
        paths = expand_shards(spec, Places(source if source is not None else SourceConfig()))
        for path in paths:
            try:
                ShardSet([path], source=source).close()
            except Damage as damage:
                stats.damaged[damage.kind.value] += 1
            else:
                good.append(path)
        if not good:
            raise
        stats.shards = len(paths)
        return ShardSet(good, source=source)
    stats.shards = len(shards.paths)
    return shards


def _count_shard(
    stats: Stats,
    shards: ShardSet,
    shard: int,
    index: ShardIndex,
    count: int,
    tokenizer: Tokenizer | None,
    progress: Progress,
) -> None:
    path = shards.paths[shard]
    remote = is_remote(path)
    handle = -1 if remote else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    specials = 0 if tokenizer is None else 1 + (tokenizer.end_id is not None)
    try:
        for start in range(0, count, _AT_ONCE):
            rows = range(start, min(start + _AT_ONCE, count))
            has_image = (index.spans[start : rows.stop, 0, 0] >= 0).tolist()
            # A remote sample comes whole in any case.
            whole = remote and all(has_image)
            samples = shards.read_many([(shard, row) for row in rows], images=whole)
            texts: list[str] = []
            for row, image, sample in zip(rows, has_image, samples, strict=True):
                if isinstance(sample, Damage):
                    stats.damaged[sample.kind.value] += 1
                    continue
                texts += sample.captions
                stats.captions_each[len(sample.captions)] += 1
                stats.images += image
                stats.texts += not image
                if image:
                    data = sample.image if remote else None
                    offset, length = index.spans[row, 0].tolist()
                    _count_size(stats, image_size(data) if data is not None else _stored_size(handle, offset, length))
            stats.captions += len(texts)
            stats.words.update(len(text.split()) for text in texts)
            if tokenizer is not None:
                stats.tokens.update(len(ids) + specials for ids in tokenizer.encode_text(texts))
            progress.advance(len(rows))
    finally:
        if handle >= 0:
            os.close(handle)


def _count_size(stats: Stats, size: tuple[int, int] | None) -> None:
    if size is None:
        stats.unknown_sizes += 1
        return
    stats.heights[size[0]] += 1
    stats.widths[size[1]] += 1


def _stored_size(handle: int, offset: int, length: int) -> tuple[int, int] | None:
    """(height, width) of an image in an open shard; its beginning is enough but for a huge EXIF block or profile."""
    if handle < 0:
        return None
    length = min(length, os.fstat(handle).st_size - offset)  # a damaged index may name any number
    if length <= 0:
        return None
    head = os.pread(handle, min(length, _HEAD), offset)
    size = image_size(head)
    return image_size(os.pread(handle, length, offset)) if size is None and length > _HEAD else size
