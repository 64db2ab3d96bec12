"""Damaged samples: what can be wrong with one, and how many of them a run puts up with.

A damaged sample keeps its slot in its batch with weight 0, so that every rank takes the same steps. What was wrong is
counted by kind and shard; past the limit of the config the run stops.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from mmd2v.config.schema import DamageConfig
from mmd2v.errors import UserError


class DamageKind(StrEnum):
    """What is wrong with a sample."""

    SHARD_UNREADABLE = "shard_unreadable"
    """The shard cannot be fetched or opened, is no tar, or is not the one its index describes."""
    SHARD_TRUNCATED = "shard_truncated"
    """The shard ends inside or before the sample."""
    DUPLICATE_KEY = "duplicate_key"
    """Another sample of the shard has the same key."""
    NO_IMAGE = "no_image"
    NO_CAPTION = "no_caption"
    """No member with captions, an empty list, or an empty caption."""
    BAD_META = "bad_meta"
    """The .json is no JSON object, or its captions are no strings."""
    BAD_ENCODING = "bad_encoding"
    """The text is not UTF-8."""
    CAPTION_TOO_LONG = "caption_too_long"
    IMAGE_UNDECODABLE = "image_undecodable"
    IMAGE_TOO_LARGE = "image_too_large"
    """More pixels than the limit: a decompression bomb, most often."""
    NO_ARRAY = "no_array"
    """No member with an array that the config names."""
    BAD_ARRAY = "bad_array"
    """An array that does not parse, has another type or shape, or holds what is not finite."""
    BAD_LABELS = "bad_labels"
    """The labels that the config names are missing or of another form."""
    NOT_ANNOTATED = "not_annotated"
    """It was damaged when the outputs of a teacher were stored that are replayed now."""


class Damage(UserError):
    """A sample that cannot be used; the message names shard and sample."""

    def __init__(self, kind: DamageKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class DamagedSample:
    """One slot of a batch that is left out, and why."""

    kind: DamageKind
    shard: str
    row: int
    message: str


def damage_allowed(config: DamageConfig, samples: int) -> int:
    """How many of so many samples may be damaged."""
    return int(config.limit * samples)


class DamageTally:
    """Damaged samples of a run, each counted once however many epochs it is met in, by (kind, shard).

    Attributes:
        allowed: how many there may be.
        counts: (kind, shard) → samples.
        example: the first message.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.counts: Counter[tuple[str, str]] = Counter()
        self.example = ""
        self._known: set[tuple[str, int]] = set()

    @property
    def total(self) -> int:
        """Damaged samples so far."""
        return self.counts.total()

    def add(self, sample: DamagedSample) -> bool:
        """Count a sample; return whether it is a new one."""
        if (sample.shard, sample.row) in self._known:
            return False
        self._known.add((sample.shard, sample.row))
        self.example = self.example or sample.message
        self.counts[sample.kind.value, sample.shard] += 1
        return True

    def by_kind(self) -> dict[str, int]:
        """Kind → samples, most frequent first."""
        kinds: Counter[str] = Counter()
        for (kind, _), count in self.counts.items():
            kinds[kind] += count
        return dict(kinds.most_common())

    def check(self) -> None:
        """Raise a UserError with counts and an example when there are more than allowed."""
        if self.total <= self.allowed:
            return
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.by_kind().items())
        shards: Counter[str] = Counter()
        for (_, shard), count in self.counts.items():
            shards[shard] += count
        worst = ", ".join(f"{shard} ({count:,})" for shard, count in shards.most_common(3))
        raise UserError(
            f"data.damage.limit: found {self.total:,} damaged samples ({kinds}), expected at most {self.allowed:,}; "
            f"most of them in {worst}. The first: {self.example}. `mmd2v data check` lists them all"
        )
