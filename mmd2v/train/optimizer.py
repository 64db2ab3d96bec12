"""Parameter groups and the optimiser that is asked for by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from mmd2v.config.deepspeed import uses_optimizer_offload
from mmd2v.config.schema import Config, OptimizerConfig
from mmd2v.errors import UserError
from mmd2v.models.parameters import no_decay, no_match

NamedParameters = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    label: str
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    lr_multiplier: float
    weight_decay: float


def public_name(name: str) -> str:
    """Return the name a config's wildcards see: the student's own, without the train module around it."""
    return name.removeprefix("student.")


def parameter_groups(config: OptimizerConfig, named_parameters: NamedParameters) -> list[ParameterGroup]:
    """Sort the trainable parameters into groups; the first wildcard of ``optimizer.groups`` that matches wins.

    Unless ``decay_all``, 1-D parameters, CLS tokens, positions and embeddings are decayed in no group. Under
    ``layer_decay`` a group is divided by depth, see `depth_multiplier`. Raises UserError for a wildcard that no
    trainable parameter matches, and when nothing is trainable.
    """
    named = [(public_name(name), p) for name, p in named_parameters]
    trainable = [(name, p) for name, p in named if p.requires_grad]
    if not trainable:
        raise UserError("model.freeze: every parameter is frozen; nothing is left to train")
    for i, group in enumerate(config.groups):
        if not any(fnmatchcase(name, group.match) for name, _ in trainable):
            raise no_match(f"optimizer.groups.{i}.match (trainable parameters)", group.match, [n for n, _ in trainable])

    layers = 1 + max((_layer(name) for name, _ in named), default=-1)  # frozen ones too: they are as deep
    members: dict[tuple[int | None, bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trainable:
        first = next((i for i, group in enumerate(config.groups) if fnmatchcase(name, group.match)), None)
        decayed = config.decay_all or not no_decay(name, parameter)
        depth = depth_multiplier(name, layers, config.layer_decay)
        members.setdefault((first, decayed, depth), []).append((name, parameter))

    result = []
    for (index, decayed, depth), pairs in members.items():
        own = None if index is None else config.groups[index]
        decay = config.weight_decay if own is None or own.weight_decay is None else own.weight_decay
        label = ("*" if own is None else own.match) + ("" if depth == 1 else f" × {depth:.3g}")
        result.append(
            ParameterGroup(
                label=label + ("" if decayed else " (no decay)"),
                names=tuple(name for name, _ in pairs),
                parameters=tuple(parameter for _, parameter in pairs),
                lr_multiplier=depth * (1.0 if own is None else own.lr_multiplier),
                weight_decay=decay if decayed else 0.0,
            )
        )
    return result


def depth_multiplier(name: str, layers: int, decay: float) -> float:
    """Return the factor of layer-wise decay (Clark et al. 2020) on a parameter's learning rate.

    Of ``layers`` layers, layer i has decay^(layers - i). What comes before them, which is encoders with whatever
    backbone is inside and token types, has decay^(layers + 1). What comes after them (final norm, projection,
    objectives with their heads and temperatures) has the full rate.
    """
    part = name.split(".")[0]
    if part == "layers":
        return decay ** (layers - _layer(name))
    return decay ** (layers + 1) if part in ("encoders", "token_types") else 1.0


def _layer(name: str) -> int:
    """Return the index of the layer that a parameter is in, -1 for none."""
    words = name.split(".")
    return int(words[1]) if words[0] == "layers" else -1


def build_optimizer(
    config: Config, groups: list[ParameterGroup], device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    """Return the optimiser and one line that says which it is and why.

    Raises UserError when the one that is named cannot run here.
    """
    settings = config.optimizer
    torch_groups: list[dict[str, Any]] = [
        {"params": list(g.parameters), "lr": settings.lr * g.lr_multiplier, "weight_decay": g.weight_decay}
        for g in groups
    ]
    shared: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    name, reason = settings.name, "named in the config"
    if name == "auto":
        name, reason = _best(device, uses_optimizer_offload(config))
    if name == "adamw":
        # One kernel over all parameters of a device, on CUDA and on the CPU.
        return torch.optim.AdamW(torch_groups, fused=True, **shared), f"torch.optim.AdamW (fused), {reason}"
    if name == "apex_adam":
        fused_adam, absence = _apex_adam(device)
        if fused_adam is None:
            raise UserError(f"optimizer.name: 'apex_adam' cannot be used here: {absence}")
        return fused_adam(torch_groups, adam_w_mode=True, **shared), f"apex.optimizers.FusedAdam, {reason}"
    return _deepspeed_adam(torch_groups, shared, device, config, reason)


def _best(device: torch.device, offload: bool) -> tuple[Literal["adamw", "apex_adam", "deepspeed_adam"], str]:
    if offload:
        return "deepspeed_adam", "chosen because the optimiser is offloaded to the CPU"
    if device.type == "cuda":
        fused_adam, absence = _apex_adam(device)
        if fused_adam is not None:
            return "apex_adam", "chosen because NVIDIA's apex is installed"
        return "adamw", f"chosen because {absence}"
    return "adamw", "chosen because it is fused on the CPU and needs no compiler"


def _apex_adam(device: torch.device) -> tuple[Any, str]:
    """Return (apex's FusedAdam, "") or (None, why not)."""
    if device.type != "cuda":
        return None, "apex's FusedAdam runs on CUDA only"
    try:
        from apex.optimizers import FusedAdam
    except ModuleNotFoundError as error:
        if error.name == "apex":
            return None, "NVIDIA's apex is not installed (it is built from source)"
        return None, "the installed package `apex` is not NVIDIA's (PyPI has another of that name)"
    except ImportError as error:
        return None, f"the installed package `apex` does not offer optimizers.FusedAdam: {error}"
    try:
        FusedAdam([nn.Parameter(torch.zeros(1, device=device))])
    except RuntimeError as error:
        return None, f"NVIDIA's apex was built without its CUDA extensions: {error}"
    return FusedAdam, ""


def _deepspeed_adam(
    torch_groups: list[dict[str, Any]], shared: dict[str, Any], device: torch.device, config: Config, reason: str
) -> tuple[torch.optim.Optimizer, str]:
    # Imported here: DeepSpeed fixes its accelerator when first imported, which is the business of the environment.
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    on_cpu = device.type == "cpu" or uses_optimizer_offload(config)
    label = "DeepSpeedCPUAdam" if on_cpu else "deepspeed.ops.adam.FusedAdam"
    try:
        if on_cpu:
            optimizer = DeepSpeedCPUAdam(torch_groups, adamw_mode=True, **shared)
        else:
            optimizer = FusedAdam(torch_groups, adam_w_mode=True, **shared)
    except Exception as error:  # the build of the extension fails in many ways: no compiler, no nvcc, no ninja
        cause = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(
            f"optimizer.name: 'deepspeed_adam' cannot be used here: building {label} failed ({cause}); "
            f"`ds_report` lists what is missing, and 'adamw' needs no compiler"
        ) from error
    return optimizer, f"{label}, {reason}"
