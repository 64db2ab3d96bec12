"""Tiny CLIP, SigLIP and FLAVA folders with random weights, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SIZE = 32
WORDS = ["a", "the", "two", "dogs", "dog", "man", "in", "on", "snow", "red", "ball", "bicycle", "."]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": SIZE, "patch_size": 8}


def clip(folder: Path) -> Path:
    """Write a CLIP; its images are cropped, its texts end with the end token that it pools."""
    specials = ["<pad>", "<unk>", "<bos>", "<eos>"]
    vocabulary = _tokenizer(folder, specials, "<bos> $A <eos>", 12)
    text = {**TOWER, "vocab_size": vocabulary, "max_position_embeddings": 12}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers.CLIPConfig(text_config={**text, **ids}, vision_config=VISION, projection_dim=16)
    crop = {"height": SIZE, "width": SIZE}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop)
    return _saved(transformers.CLIPModel, config, processor, folder)


def siglip(folder: Path) -> Path:
    """Write a SigLIP; its texts fill the context."""
    vocabulary = _tokenizer(folder, ["<pad>", "<unk>", "<eos>"], "$A <eos>", 10, ["input_ids"])
    text = {**TOWER, "vocab_size": vocabulary, "max_position_embeddings": 10, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    processor = transformers.SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    return _saved(transformers.SiglipModel, config, processor, folder)


def flava(folder: Path, pretraining: bool = False) -> Path:
    """Write a FLAVA; ``pretraining`` with the heads and the codebook of the published files."""
    vocabulary = _tokenizer(folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]", 20)
    text = {**TOWER, "vocab_size": vocabulary, "max_position_embeddings": 20}
    config = transformers.FlavaConfig(
        text_config=text, image_config=VISION, multimodal_config=TOWER, hidden_size=32, projection_dim=16
    )
    if pretraining:
        config.image_codebook_config.hidden_size = 8
        config.image_codebook_config.vocab_size = config.image_config.vocab_size = 16
    crop = {"height": SIZE, "width": SIZE}
    processor = transformers.FlavaImageProcessor(size=crop, crop_size=crop)
    kind = transformers.FlavaForPreTraining if pretraining else transformers.FlavaModel
    return _saved(kind, config, processor, folder)


def _saved(kind, config, processor, folder: Path) -> Path:
    torch.manual_seed(7)
    model = kind(config).eval()
    with torch.no_grad():  # as drawn, all embeddings are nearly the same
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path, specials: list[str], template: str, length: int, inputs: list[str] | None = None) -> int:
    """Write a tokenizer of whole words; return the size of its vocabulary."""
    vocabulary = {word: row for row, word in enumerate([*specials, *WORDS])}
    unknown = specials[1]
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    used = [(name, vocabulary[name]) for name in specials if name in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    names = {"pad_token": specials[0], "unk_token": unknown, "eos_token": specials[-1]}
    if inputs:
        names["model_input_names"] = inputs
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **names).save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())
    return len(vocabulary)
