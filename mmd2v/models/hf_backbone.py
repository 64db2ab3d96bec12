"""Reading Hugging Face encoders: configuration, modules, blocks in our layout.

transformers is imported where a model is asked for: it is slow to import, and most runs and exports name none of its
models.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from mmd2v.errors import UserError


def load_model(name: str, *, pretrained: bool, where: str) -> nn.Module:
    """Return the encoder ``name`` (folder or hub name) in fp32; its configuration alone when not ``pretrained``.

    Raises UserError, beginning with ``where``, when there is none or its weights are not safetensors: a pickle
    could run code.
    """
    import transformers
    from transformers import AutoConfig, AutoModel

    # Its bars would drown the run's own lines, once a rank and source.
    transformers.utils.logging.disable_progress_bar()
    try:
        if not pretrained:
            return AutoModel.from_config(
                AutoConfig.from_pretrained(name, trust_remote_code=False), attn_implementation="sdpa"
            )
        return AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa", trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError) as error:
        hint = "" if Path(name).is_dir() else " (it is no folder here, and the hub cannot be asked or does not know it)"
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: no Hugging Face encoder '{name}'{hint}: {first_line}") from error


def published_mean_std(name: str, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the channel means and deviations of a vision encoder's own image processor.

    Raises UserError, beginning with ``where``, when it publishes none.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
        return tuple(processor["image_mean"]), tuple(processor["image_std"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{where}: '{name}' publishes no image mean and deviation (preprocessor_config.json); set mean and std"
        ) from error


def first_position(model: nn.Module) -> int:
    """Return the id of a text's first position: RoBERTa and its kin count from the padding index + 1."""
    counts_from_padding = {"roberta", "xlm-roberta", "camembert", "data2vec-text"}
    return model.config.pad_token_id + 1 if model.config.model_type in counts_from_padding else 0


def text_positions(model: nn.Module) -> int:
    """Return the longest text the model has positions for, in tokens."""
    return model.config.max_position_embeddings - first_position(model)


def bert_results(model: nn.Module) -> list[nn.Module]:
    """Return the last map of every block's MLP, whose outputs are the layer results; none if it is not BERT-like."""
    blocks = getattr(getattr(model, "encoder", None), "layer", None)
    return [] if blocks is None or not hasattr(blocks[0], "intermediate") else [block.output.dense for block in blocks]


def bert_block(model: nn.Module, index: int, where: str) -> dict[str, torch.Tensor]:
    """Return block ``index`` of a BERT-like encoder (BERT, RoBERTa, MiniLM …, all post-norm) in our names.

    Keys: ``attention.norm.weight`` … ``mlp.fc2.bias``. Raises UserError when the model is not BERT-like or has
    fewer blocks.
    """
    blocks = getattr(getattr(model, "encoder", None), "layer", None)
    if blocks is None or not _is_bert_block(blocks[0]):
        raise UserError(f"{where}: {type(model).__name__} is not BERT-like; its blocks cannot be taken over")
    if index >= len(blocks):
        raise UserError(f"{where}: block {index} was asked for, the source has {len(blocks)}")
    block = blocks[index]
    attention, output = block.attention.self, block.attention.output
    parts = {
        "attention.norm": output.LayerNorm,
        "attention.proj": output.dense,
        "mlp.norm": block.output.LayerNorm,
        "mlp.fc1": block.intermediate.dense,
        "mlp.fc2": block.output.dense,
    }
    state = {f"{name}.{kind}": getattr(module, kind) for name, module in parts.items() for kind in ("weight", "bias")}
    projections = (attention.query, attention.key, attention.value)
    for kind in ("weight", "bias"):
        state[f"attention.qkv.{kind}"] = torch.cat([getattr(projection, kind) for projection in projections])
    return {name: value.detach().clone() for name, value in state.items()}


def _is_bert_block(block: nn.Module) -> bool:
    """Whether it has BERT's attention and, as a ViT's and a pre-norm block have not, a norm after each half."""
    attention = getattr(block, "attention", None)
    halves = getattr(attention, "output", None), getattr(block, "output", None)
    return hasattr(getattr(attention, "self", None), "query") and all(hasattr(half, "LayerNorm") for half in halves)
