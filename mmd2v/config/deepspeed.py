"""The dictionary DeepSpeed is configured with, made from a run's config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmd2v.config.batch_plan import plan_batches
from mmd2v.config.schema import Config
from mmd2v.config.training import AUTO
from mmd2v.errors import UserError

# Elements of one communication bucket. DeepSpeed's default of 5e8 reserves 2 GB of fp32 a bucket, more than
# whole models of this trainer; 5e7 (200 MB) is still far above what saturates a network.
BUCKET_ELEMENTS = 50_000_000

_OWN_KEYS = {
    "train_batch_size": "engine.batch_size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "gradient_accumulation_steps": "engine.batch_size and engine.micro_batch_size",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.stage3_param_persistence_threshold": "engine.zero3_persistence_threshold",
}
"""Options that are fields of our own config: setting them twice would let the two disagree."""


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's dictionary for ``config`` on ``world_size`` ranks.

    ``engine.deepspeed`` is merged over it. Raises UserError when that names an option which is a field of its own,
    or when the batch does not divide, and ValueError while ``engine.precision`` has no name yet: it would be taken
    for fp32.
    """
    if config.engine.precision == AUTO:
        raise ValueError(f"engine.precision is '{AUTO}' still; mmd2v.train.precision gives it a name")
    plan = plan_batches(config, world_size)
    micro_batch = 1 if plan.unit == "tokens" else plan.micro_batch
    engine = config.engine
    _refuse_own_keys(engine.deepspeed)
    generated: dict[str, Any] = {
        # DeepSpeed only wants the product to hold; it counts no samples for us. Batches of tokens have no fixed number.
        "train_batch_size": plan.ranks * micro_batch * plan.accumulation,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": engine.zero3_persistence_threshold,
        },
        "bf16": {
            "enabled": engine.precision == "bf16",
            # Its answer to a gradient that is not finite is to leave the step out.
            **({"check_grad_overflow": True} if config.stability.non_finite == "skip" else {}),
        },
        "fp16": {"enabled": engine.precision == "fp16"},
        # The optimiser is made by us (mmd2v.train.optimizer) and handed over; these two let DeepSpeed take it.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return _merged(generated, engine.deepspeed)


def uses_optimizer_offload(config: Config) -> bool:
    """Whether ``engine.deepspeed`` asks for the optimiser on the CPU while the model is elsewhere."""
    zero = config.engine.deepspeed.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    if offload is None:  # `offload_optimizer: null` says no
        return False
    if not isinstance(offload, Mapping):
        raise UserError(
            f"engine.deepspeed.zero_optimization.offload_optimizer: found {offload!r}; expected null or a mapping such "
            f"as {{device: cpu}}"
        )
    return offload.get("device", "none") not in (None, "none")


def _refuse_own_keys(options: Mapping[str, Any]) -> None:
    for path, field in _OWN_KEYS.items():
        value: Any = options
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            raise UserError(f"engine.deepspeed.{path}: set {field} instead; it is written into DeepSpeed's options")


def _merged(base: dict[str, Any], over: Mapping[str, Any], at: str = "engine.deepspeed") -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict):
            if not isinstance(value, Mapping):  # would take our own options of the section away
                raise UserError(f"{at}.{key}: found {value!r}; expected a mapping of DeepSpeed's options")
            result[key] = _merged(old, value, f"{at}.{key}")
        else:
            result[key] = copy.deepcopy(value)
    return result
