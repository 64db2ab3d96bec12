"""Layers that a step of training skips."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import StubTokenizer, random_batch, small_config

from mmd2v.models.layer_drop import dropped_layers
from mmd2v.models.student import build_student
from mmd2v.models.student_output import Wanted
from mmd2v.train.seeds import position_seed

STEPS = 4000


def student_with(*probabilities, **changes):
    layers = [{"kind": "mome", "layer_drop": p} for p in probabilities]
    return build_student(small_config(model__layers=layers, **changes), StubTokenizer())


def seed_where(probabilities, expected):
    """A seed whose draw is ``expected``."""
    return next(seed for seed in range(10_000) if dropped_layers(seed, probabilities) == expected)


def test_each_layer_is_dropped_as_often_as_it_says_and_by_itself():
    probabilities = (0.0, 0.1, 0.5, 0.5)
    drawn = np.zeros((STEPS, len(probabilities)))
    for step in range(STEPS):
        drawn[step, list(dropped_layers(position_seed(3, step), probabilities))] = 1
    deviation = np.sqrt(np.multiply(probabilities, np.subtract(1, probabilities)) / STEPS)
    assert (np.abs(drawn.mean(axis=0) - probabilities) <= 4 * deviation).all()
    assert abs((drawn[:, 2] * drawn[:, 3]).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / STEPS)
    assert abs((drawn[1:, 3] * drawn[:-1, 3]).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / STEPS)


def test_the_draw_is_a_function_of_the_seed_alone():
    seeds = [position_seed(3, step) for step in range(20)]
    expected = [dropped_layers(seed, (0.5,) * 4) for seed in seeds]
    torch.manual_seed(99)
    np.random.seed(99)
    assert [dropped_layers(seed, (0.5,) * 4) for seed in reversed(seeds)] == expected[::-1]
    # Ranks differ in their batches and in torch's generator, not in the seed.
    student = student_with(*(0.5,) * 4).train()
    for seed, dropped in zip(seeds, expected, strict=True):
        for images in (1, 3):
            batch = replace(random_batch(images), draw_seed=seed)
            assert student._draw_dropped(batch, Wanted()) == dropped


def test_a_set_of_layers_that_is_needed_keeps_its_last_one():
    everything = (0.999,) * 3
    seed = seed_where(everything, frozenset({0, 1, 2}))
    assert dropped_layers(seed, everything, [(0, 2)]) == {0, 1}
    assert dropped_layers(seed, everything, [(0, 1), ()]) == {0, 2}
    seed = seed_where((0.5,) * 3, frozenset({0, 1}))
    assert dropped_layers(seed, (0.5,) * 3, [(0, 2)]) == {0, 1}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dropped_layer_changes_nothing_and_has_a_gradient_of_zeros(checkpointing):
    probabilities = (0.5, 0.5)
    student = student_with(*probabilities, model__activation_checkpointing=checkpointing).train()
    batch = replace(random_batch(), draw_seed=seed_where(probabilities, frozenset({1})))
    output = student(batch)
    sum(embedding.square()[:, 0].sum() for embedding in output.embedding.values()).backward()
    for name, parameter in student.layers[1].named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert all(parameter.grad.any() for parameter in student.layers[0].parameters())
    del student.layers[1]
    shorter = student(replace(batch, draw_seed=None)).embedding
    for name, value in output.embedding.items():
        assert torch.equal(value, shorter[name])


def test_evaluation_and_a_batch_without_a_seed_drop_nothing():
    student = student_with(0.999, 0.999)
    batch = replace(random_batch(), draw_seed=1)
    student.train()
    dropped, unseeded = student(batch).embedding["text"], student(replace(batch, draw_seed=None)).embedding["text"]
    student.eval()
    evaluated = student(batch).embedding["text"]
    assert torch.equal(evaluated, unseeded)
    assert not torch.allclose(evaluated, dropped)


def test_layers_of_a_pair_are_those_of_the_single_passes():
    """Joint sequences pass the layers a second time, without those that the step has dropped."""
    student = student_with(0.5, 0.5, model__joint_from=0).train()
    batch = replace(random_batch(2), draw_seed=seed_where((0.5, 0.5), frozenset({0})))
    rows = torch.arange(2)
    cls = student(batch).pair(rows, rows)
    del student.layers[0]
    torch.testing.assert_close(cls, student(replace(batch, draw_seed=None)).pair(rows, rows))


def test_layer_results_are_of_the_layers_that_ran():
    probabilities = (0.5, 0.5, 0.5)
    student = student_with(*probabilities).train()
    wanted = Wanted(results=frozenset({"text"}))
    for dropped, expected in ((frozenset({1}), 2), (frozenset({0, 1, 2}), 1)):
        batch = replace(random_batch(), draw_seed=seed_where(probabilities, dropped))
        assert len(student(batch, wanted=wanted).results["text"]) == expected
