"""Ranks × micro-batch × accumulation, steps of a run, and what DeepSpeed is told of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import small_config

from mmd2v.config.batch_plan import plan_batches, total_steps
from mmd2v.config.deepspeed import deepspeed_config, uses_optimizer_offload
from mmd2v.errors import UserError


@given(ranks=st.integers(1, 8), micro=st.integers(1, 16), accumulation=st.integers(1, 4))
def test_any_product_can_be_planned(ranks, micro, accumulation):
    total = ranks * micro * accumulation
    plan = plan_batches(small_config(engine={"batch_size": total, "micro_batch_size": micro}), ranks)
    assert (plan.micro_batch, plan.accumulation, plan.global_batch) == (micro, accumulation, total)
    assert plan.micro_batch * plan.accumulation * ranks == total


def test_batch_that_ranks_do_not_divide_shows_the_arithmetic():
    with pytest.raises(UserError, match=r"100 images cannot be divided by 3 ranks: 100 = 3 × 33 \+ 1.*99 or 102"):
        plan_batches(small_config(engine={"batch_size": 100}), 3)
    with pytest.raises(UserError, match=r"2 images cannot be divided by 3 ranks: 2 = 3 × 0 \+ 2.*can: 3$"):
        plan_batches(small_config(engine={"batch_size": 2}), 3)


def test_micro_batch_that_does_not_divide_shows_the_arithmetic():
    with pytest.raises(UserError, match=r"256 / 2 ranks = 128 images = 48 × 2 \+ 32; nearest size that does: 32"):
        plan_batches(small_config(engine={"batch_size": 256, "micro_batch_size": 48}), 2)


def test_messages_of_a_run_on_text_speak_of_samples():
    text = {
        "model__encoders": {"text": {"kind": "tokens"}},
        "objectives": [{"kind": "attributes", "modality": "text", "classes": 3}],
        "data__labels": "vector",
    }
    with pytest.raises(UserError, match=r"engine\.batch_size: 100 samples cannot be divided by 3 ranks"):
        plan_batches(small_config(engine={"batch_size": 100}, **text), 3)
    with pytest.raises(UserError, match=r"256 / 2 ranks = 128 samples = 48 × 2 \+ 32"):
        plan_batches(small_config(engine={"batch_size": 256, "micro_batch_size": 48}, **text), 2)


def test_steps_of_epochs_are_rounded_up():
    config = small_config(steps=None, epochs=2, engine={"batch_size": 4})
    assert total_steps(config, plan_batches(config, 1), 9) == 5
    with pytest.raises(UserError, match=r"epochs: .* size of data.train"):
        total_steps(config, plan_batches(config, 1), None)


def test_deepspeed_is_told_what_the_config_says():
    config = small_config(
        optimizer={"clip_norm": 2.0},
        engine={
            "batch_size": 32, "micro_batch_size": 4, "precision": "bf16", "zero_stage": 3,
            "zero3_persistence_threshold": 7,
            "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "wall_clock_breakdown": True},
        },
    )  # fmt: skip
    options = deepspeed_config(config, 2)
    assert options["train_batch_size"] == 32
    assert options["train_micro_batch_size_per_gpu"] == 4
    assert options["gradient_accumulation_steps"] == 4
    assert options["gradient_clipping"] == 2.0
    assert (options["bf16"]["enabled"], options["fp16"]["enabled"]) == (True, False)
    zero = options["zero_optimization"]
    assert (zero["stage"], zero["stage3_param_persistence_threshold"]) == (3, 7)
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert options["wall_clock_breakdown"] is True
    assert uses_optimizer_offload(config) and not uses_optimizer_offload(small_config())


@pytest.mark.parametrize("offload", [None, {}, {"device": None}, {"device": "none"}])
def test_no_offload_can_be_written_in_several_ways(offload):
    options = {"zero_optimization": {"offload_optimizer": offload}}
    config = small_config(engine__deepspeed=options)
    assert not uses_optimizer_offload(config)
    assert deepspeed_config(config, 1)["zero_optimization"]["stage"] == 1


def test_sections_of_deepspeed_must_be_mappings():
    with pytest.raises(UserError, match="offload_optimizer: found 'cpu'; expected null or a mapping"):
        uses_optimizer_offload(small_config(engine__deepspeed={"zero_optimization": {"offload_optimizer": "cpu"}}))
    with pytest.raises(UserError, match=r"engine\.deepspeed\.zero_optimization: found None; expected a mapping"):
        deepspeed_config(small_config(engine__deepspeed={"zero_optimization": None}), 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
def test_no_precision_mode_of_deepspeed_for_full_weights(precision):
    options = deepspeed_config(small_config(engine__precision=precision), 1)
    assert not options["bf16"]["enabled"] and not options["fp16"]["enabled"]
    assert options["gradient_clipping"] == 0.0


def test_a_precision_without_a_name_never_reaches_deepspeed():
    with pytest.raises(ValueError, match=r"engine\.precision is 'auto' still"):
        deepspeed_config(small_config(engine__precision="auto"), 1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"train_batch_size": 4}, "engine.batch_size"),
        ({"zero_optimization": {"stage": 2}}, "engine.zero_stage"),
        ({"fp16": {"enabled": True}}, "engine.precision"),
        ({"optimizer": {"type": "Adam"}}, "set optimizer instead"),
    ],
)
def test_options_that_are_fields_of_their_own_are_refused(options, field):
    with pytest.raises(UserError, match=field):
        deepspeed_config(small_config(engine__deepspeed=options), 1)
