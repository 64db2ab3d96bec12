"""The dry run's estimate of memory."""

from dataclasses import fields

import pytest
from small import StubTokenizer, random_batch, small_config

from mmd2v.models.student import build_student
from mmd2v.objectives import build_objectives
from mmd2v.train.dry_run import estimate_memory
from mmd2v.train.module import TrainModule
from mmd2v.train.parts import Parts


class StubTeacher:
    modality, width = "image", 768


def estimate(*objectives):
    config = small_config(objectives=list(objectives), teachers={"t": {"name": "timm:resnet10t"}})
    student = build_student(config, StubTokenizer())
    module = TrainModule(student, build_objectives(config, student, {"t": StubTeacher()}), autocast=False)
    return estimate_memory(config, Parts(StubTokenizer(), {}, module), random_batch(), ranks=1)


def test_the_banks_of_all_terms_count():
    assert estimate({"kind": "contrastive"}).bank == 0
    bank = {"kind": "contrastive_target", "teacher": "t", "bank_size": 65_536}
    found = estimate(bank, {**bank, "bank_size": 128})
    # fp16 rows, beside each an id and whether it counts
    assert found.bank == pytest.approx((65_536 + 128) * (768 * 2 + 8 + 1), abs=16)
    assert found.total == pytest.approx(sum(getattr(found, field.name) for field in fields(found)))
