"""Zero-shot classification: an image belongs to the class whose prompts lie nearest; no training.

A class is the mean of the embeddings of its prompts, normalised. The order of classes is that of `cosine_topk`: by
exact score, then the first one.

Shapes: N images, C classes, P prompts a class, E width of an embedding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmd2v.data.labelled_images import open_labelled
from mmd2v.errors import UserError, nearest
from mmd2v.evaluation.knn import EncodeImages, encode_class_folders
from mmd2v.evaluation.retrieval import Metrics
from mmd2v.progress import Progress
from mmd2v_kernels import cosine_topk

TOP = (1, 5)
DEFAULT_TEMPLATES = (
    "a picture of a {}.",
    "a {} seen from close by.",
    "a {} at some distance.",
    "a small and blurred picture of a {}.",
    "a {} in its usual surroundings.",
    "a part of a {}, the rest of it out of the frame.",
    "several of the kind {}.",
    "a drawing of a {}.",
)
_PLACES = ("{}", "{c}")
_CLASSES_AT_ONCE = 64

EncodeTexts = Callable[[Sequence[str]], torch.Tensor]
"""N texts → [N, E]"""


@dataclass(frozen=True)
class ZeroShotResult:
    """Accuracy and what it was measured with."""

    metrics: Metrics
    """``zero_shot_top1``, ``zero_shot_top5``, ``chance_top1``, ``chance_top5`` as fractions."""
    classes: Mapping[str, str]
    """Label → the name in the prompts, of all classes that were candidates."""
    templates: tuple[str, ...]
    images: int

    def record(self) -> dict[str, Any]:
        """Return what goes into a JSON file."""
        counts = {"images_classified": self.images, "classes": len(self.classes)}
        return {**self.metrics, **counts, "templates": list(self.templates)}

    def text(self) -> str:
        """Return what a person reads."""
        lines = [f"{self.images:,} images, {len(self.classes):,} classes, {len(self.templates)} prompts a class"]
        lines += [
            f"zero-shot top-{k}: {100 * self.metrics[f'zero_shot_top{k}']:.2f} % "
            f"(chance {100 * self.metrics[f'chance_top{k}']:.2f} %)"
            for k in TOP
        ]
        return "\n".join(lines)


def zero_shot_of(
    encode_images: EncodeImages,
    encode_texts: EncodeTexts,
    data: str | Path,
    classes: str | Path | None = None,
    templates: str | Path | None = None,
    batch_size: int = 256,
) -> ZeroShotResult:
    """Classify the images of ``data``, as `open_labelled` reads them, by the names of its classes.

    ``classes`` and ``templates`` are files, see `class_names` and `read_templates`. Raises UserError for what cannot
    be read, classes without a name, or embeddings that are not finite.
    """
    images = open_labelled(data, "--data")
    names = class_names(images.classes, classes)
    prompts = DEFAULT_TEMPLATES if templates is None else read_templates(templates)
    class_CE = class_embeddings(encode_texts, list(names.values()), prompts)
    image_NE, labels_N = encode_class_folders(encode_images, images, list(names), batch_size)
    return ZeroShotResult(zero_shot_metrics(image_NE, class_CE, labels_N), names, prompts, len(images))


def zero_shot_metrics(image_NE: torch.Tensor, class_CE: torch.Tensor, labels_N: torch.Tensor) -> Metrics:
    """Return accuracy of images against class embeddings, with the chance level beside it.

    ``labels_N`` is int64 [N], rows of ``class_CE``. With fewer than five classes top-5 is of all of them. Raises
    UserError for embeddings that are not finite or of two widths.
    """
    classes = len(class_CE)
    try:
        _, index_NK = cosine_topk(
            F.normalize(image_NE.float(), dim=-1), F.normalize(class_CE.float(), dim=-1), min(max(TOP), classes)
        )
    except ValueError as error:
        raise UserError(f"zero-shot: {error}") from error
    is_own_NK = index_NK.cpu() == labels_N.cpu()[:, None]
    metrics = {f"zero_shot_top{k}": is_own_NK[:, :k].any(dim=1).double().mean().item() for k in TOP}
    return metrics | {f"chance_top{k}": min(k, classes) / classes for k in TOP}


def class_embeddings(encode: EncodeTexts, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Return [C, E] on the CPU: of each name the mean of its prompts' normalised embeddings, normalised."""
    rows = []
    with Progress("encoding prompts", len(names), unit="classes") as progress:
        for start in range(0, len(names), _CLASSES_AT_ONCE):
            chunk = names[start : start + _CLASSES_AT_ONCE]
            prompts = [fill(template, name) for name in chunk for template in templates]
            found_PE = F.normalize(encode(prompts).float().cpu(), dim=-1)
            rows.append(found_PE.view(len(chunk), len(templates), -1).mean(dim=1))
            progress.advance(len(chunk))
    return F.normalize(torch.cat(rows), dim=-1)


def fill(template: str, name: str) -> str:
    """Put a class's name into a template, at ``{}`` or ``{c}``; the rest of it stays as it is."""
    for place in _PLACES:
        template = template.replace(place, name)
    return template


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Read prompt templates: a line each, or a JSON list of texts; ``{}`` or ``{c}`` stands for the class.

    Raises UserError for a file that cannot be read, is empty, or a template without a place for the class.
    """
    text = _read("--templates", path)
    entries = _json("--templates", path, text) if Path(path).suffix == ".json" else text.splitlines()
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"--templates: {path} is no list of texts")
    templates = tuple(entry.strip() for entry in entries if entry.strip())
    if not templates:
        raise UserError(f"--templates: {path} holds no template, expected a line each such as 'a picture of a {{}}.'")
    for template in templates:
        if not any(place in template for place in _PLACES):
            raise UserError(f"--templates: {path}: '{template}' has no {' or '.join(_PLACES)} for the class")
    return templates


def class_names(labels: Sequence[str], path: str | Path | None = None) -> dict[str, str]:
    """Return label → name of all classes to choose from, in the order of the file, else of ``labels``.

    Args:
        labels: the classes of the data.
        path: a text file with a name a line, or a JSON list of names, in the order of the labels (a label that is a
            number is the place in the list, from 0); or a JSON object of label → name. None: WordNet ids get the first
            of their names in timm's `ImageNetInfo`, others are names themselves, ``_`` read as a space.

    Raises:
        UserError: the file cannot be read, or does not fit the labels.
    """
    if path is None:
        if all(map(_is_wordnet, labels)):
            return _wordnet_names(labels)
        return {label: label.replace("_", " ") for label in labels}
    text = _read("--classes", path)
    found = _json("--classes", path, text) if Path(path).suffix == ".json" else text.splitlines()
    if isinstance(found, list):
        entries = [str(name).strip() for name in found]
        while entries and not entries[-1]:
            entries.pop()
        names = dict(_numbered(path, labels, entries))
    elif isinstance(found, dict):
        # Of several names of a class, as in ImageNet's class index, the last one is the word.
        names = {str(key): str(name[-1] if isinstance(name, list) and name else name) for key, name in found.items()}
    else:
        raise UserError(f"--classes: {path} holds a {type(found).__name__}, expected a list or an object of names")
    empty = [label for label, name in names.items() if not name.strip()]
    if empty:
        raise UserError(f"--classes: {path} has no name for class '{empty[0]}'")
    absent = [label for label in labels if label not in names]
    if absent:
        raise UserError(
            f"--classes: {path} has no name for {len(absent)} of {len(labels)} classes of the data, the first is "
            f"'{absent[0]}'.{nearest(absent[0], names)}"
        )
    return names


def _numbered(path: str | Path, labels: Sequence[str], entries: Sequence[str]) -> Iterator[tuple[str, str]]:
    if all(label.isdecimal() for label in labels) and all(int(label) < len(entries) for label in labels):
        # The labels as they are written: 007 is the place 7.
        written = {int(label): label for label in labels}
        yield from ((written.get(place, str(place)), name) for place, name in enumerate(entries))
    elif len(entries) == len(labels):
        yield from zip(labels, entries, strict=True)
    else:
        raise UserError(
            f"--classes: {path} holds {len(entries)} names, expected {len(labels)}, one a class of the data"
        )


def _is_wordnet(label: str) -> bool:
    return len(label) == 9 and label[0] == "n" and label[1:].isdecimal()


def _wordnet_names(labels: Sequence[str]) -> dict[str, str]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = set(info.label_names())
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise UserError(
            f"--classes: '{unknown[0]}' is none of ImageNet's 1,000 classes, whose names timm has; name a file"
        )
    words = {label: info.label_name_to_description(label) for label in labels}
    first = {label: name.split(",")[0] for label, name in words.items()}
    often = Counter(first.values())
    # Two classes are called crane, and two maillot: those keep what tells them apart.
    return {
        label: name if often[name] == 1 else info.label_name_to_description(label, detailed=True)
        for label, name in first.items()
    }


def _read(flag: str, path: str | Path) -> str:
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{flag}: {path} not found.{nearest(path.name, siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: {path} cannot be read: {error}") from None


def _json(flag: str, path: str | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {path} is no JSON: {error}") from None
