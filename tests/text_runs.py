"""Texts without images and the config of a run on them that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from training_runs import write_values

from mmd2v.data.packing import Sample, write_shards
from mmd2v.data.tokenizers import train_tokenizer

WORDS = [f"word{n}" for n in range(40)]


def sentences(count: int, seed: int = 0, longest: int = 20) -> list[str]:
    """Texts of 1 to ``longest`` words, most of them short; each one is another."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(1.7, 0.6, count), 1, longest).astype(int)
    return [f"{n} " + " ".join(random.choice(WORDS, length - 1)) for n, length in enumerate(lengths)]


def write_texts(
    folder: Path, texts: list[str], *, shard_size: int = 40, captions: int = 1, labels: int | None = None
) -> Path:
    """Write shards of text alone, ``captions`` of the texts a sample."""
    samples = []
    for number in range(0, len(texts), captions):
        vector = {} if labels is None else {"vector": [float((number + a) % 3 == 0) for a in range(labels)]}
        samples.append(Sample(f"text-{number:05d}", None, {"captions": texts[number : number + captions], **vector}))
    write_shards(samples, folder, total=len(samples), shard_size=shard_size, what="writing")
    return folder


def make_text_data(folder: Path, count: int = 300) -> Path:
    """Write ``train``, ``tokenizer.json`` and a (random) BERT teacher ``bert`` into ``folder``."""
    import torch
    from transformers import BertConfig, BertModel

    texts = sentences(count)
    write_texts(folder / "train", texts, labels=3)
    tokenizer = train_tokenizer(texts, "wordlevel", 500)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=500, max_position_embeddings=24, **sizes)).save_pretrained(folder / "bert")
    return folder


def write_text_config(file: Path, data: Path, **changes: Any) -> Path:
    """Write the YAML of a run on text alone, in steps of tokens; ``changes`` as in `write_config`."""
    values: dict[str, Any] = {
        "name": file.stem,
        "run_dir": str(file.parent / "runs" / file.stem),
        "seed": 3,
        "steps": 3,
        "data": {
            "train": {"shards": str(data / "train")},
            "tokenizer": {"path": str(data / "tokenizer.json"), "max_length": 16},
            "batch_tokens": 256,
            "shuffle_shards": 2,
            "workers": 0,
        },
        "model": {
            "width": 16,
            "heads": 2,
            "encoders": {"text": {"kind": "tokens"}},
            "layers": [{"kind": "separate"}, {"kind": "shared"}],
        },
        "teachers": {"bert": {"name": f"hf:{data / 'bert'}", "modality": "text", "precision": "fp32"}},
        "objectives": [{"kind": "cls_regression", "teacher": "bert", "modalities": ["text"]}],
        "optimizer": {"name": "adamw", "lr": 0.005, "clip_norm": 1.0},
        "engine": {"device": "cpu", "precision": "fp32"},
        "logging": {"every": 1, "tensorboard": False},
    }
    return write_values(file, values, changes)
