"""Which objectives need more of a teacher than stored outputs hold, and that a run then says why the teacher runs."""

import typing

import pytest
import torch
from small import StubTokenizer, small_config

from mmd2v.config.batch_plan import plan_batches
from mmd2v.config.schema import AnyObjective
from mmd2v.models.student import build_student
from mmd2v.objectives import build_objectives
from mmd2v.train.replay import choose_sources


class StubTeacher:
    modality, width, token_width = "image", 16, 16


OF_A_TEACHER = {
    "cls_regression": {},
    "contrastive_target": {"bank_size": 0},
    "token_regression": {"modality": "image"},
    "layer_results": {"modality": "image"},
    "data2vec": {"modality": "image"},
}


def config_of(kind):
    masked = {"model__masking": {"image": {}}} if kind == "data2vec" else {}
    return small_config(
        objectives=[{"kind": kind, "teacher": "t", **OF_A_TEACHER[kind]}],
        teachers={"t": {"name": "timm:test_vit", "outputs": "stored"}},
        **masked,
    )


def test_every_objective_of_a_teacher_is_here():
    of_a_teacher = {
        typing.get_args(one.model_fields["kind"].annotation)[0]
        for one in typing.get_args(typing.get_args(AnyObjective)[0])
        if "teacher" in one.model_fields
    }
    assert set(OF_A_TEACHER) == of_a_teacher


@pytest.mark.parametrize("kind", OF_A_TEACHER)
def test_config_and_objective_agree_on_what_is_needed(kind):
    config = config_of(kind)
    needs = build_objectives(config, build_student(config, StubTokenizer()), {"t": StubTeacher()}).needs
    more = any(one.layer_results or one.cls_attention for one in needs.values())
    assert config.objectives[0].needs_layer_results == more == (kind in ("layer_results", "data2vec"))


@pytest.mark.parametrize("kind", OF_A_TEACHER)
def test_a_teacher_of_layer_results_runs_and_a_line_says_so(kind):
    config = config_of(kind)
    said = choose_sources(config, plan_batches(config, 1), 2, torch.device("cpu"))["t"].said
    because = f"teacher t: live, because stored: the {kind} objective needs what is not stored"
    assert (said == because) == config.objectives[0].needs_layer_results
