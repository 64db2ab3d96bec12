"""The average of the student as a teacher: its formula, its schedule, what it holds and sees."""

import pytest
import torch
from small import StubTokenizer, random_batch, small_config

from mmd2v.config.schema import EMAConfig, TeacherConfig
from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.models.teachers import build_teachers, load
from mmd2v.models.teachers.ema import EMATeacher
from mmd2v.train.averages import load_averages, save_averages
from mmd2v.train.checkpoints.writer import CheckpointWriter


def config_of(modality="image", **ema):
    teacher = {"name": f"ema:{modality}", "modality": modality, "precision": "fp32", "ema": ema}
    return small_config(teachers={"ema": teacher})


def build(modality="image", **ema):
    student = build_student(config_of(modality, **ema), StubTokenizer())
    return student, build_teachers(config_of(modality, **ema), torch.device("cpu"), StubTokenizer(), student=student)


@pytest.mark.parametrize(("key", "value"), [("kwargs", {"img_size": 32}), ("pooling", "mean"), ("image_size", 32)])
def test_what_another_model_would_need_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key}: given for 'ema:image', which is the student's own average"):
        TeacherConfig(name="ema:image", **{key: value})
    # What a run writes of itself has every default in it.
    written = TeacherConfig(name="ema:image").model_dump()
    assert TeacherConfig.model_validate(written).averaged == "image"


def move(student):
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("encoder", [True, False])
def test_three_steps_of_the_formula(encoder):
    student, teachers = build(encoder=encoder)
    teacher = teachers["ema"]
    expected = {name: value.clone() for name, value in teacher.average().items()}
    for decay in (0.5, 0.9, 0.99):
        move(student)
        teacher.update(student, decay)
        for name, value in expected.items():
            new = student.state_dict()[name]
            copied = name.startswith("encoders.") and not encoder
            expected[name] = new.clone() if copied else decay * value + (1 - decay) * new
    for name, value in teacher.average().items():
        torch.testing.assert_close(value, expected[name])
    assert not any(p.requires_grad for p in teacher.parameters())


def test_decay_rises_in_a_line_and_stays():
    ema = EMAConfig(decay=0.9, decay_end=0.99, anneal_steps=10)
    assert [ema.decay_at(step, 100) for step in (5, 10, 50)] == pytest.approx([0.945, 0.99, 0.99])
    assert EMAConfig(decay=0.9, decay_end=0.99).decay_at(50, 100) == pytest.approx(0.945)
    assert EMAConfig(decay=0.9, decay_end=0.99, anneal_steps=0).decay_at(1, 100) == 0.99


@pytest.mark.parametrize("modality", ["image", "text"])
def test_it_holds_one_modality_and_gives_what_the_student_would(modality):
    student, teachers = build(modality)
    teacher = teachers["ema"]
    other = {"image": "text", "text": "image"}[modality]
    names = list(teacher.average())
    assert not [n for n in names if other in n.split(".") and not n.startswith("projection.")]
    assert {n for n in student.state_dict() if modality in n.split(".")} <= set(names)
    batch = random_batch()
    expected = student.eval()(batch, (modality,)).pooled[modality]
    torch.testing.assert_close(teacher(batch).cls_BD, expected)
    teacher.train()
    assert not teacher.model.training


def test_weights_stay_whole_in_half_precision_arithmetic():
    student, _ = build()
    config = TeacherConfig(name="ema:image", precision="bf16")
    teacher = EMATeacher(student, "image", config).freeze(torch.device("cpu"))
    batch = random_batch()
    targets = teacher(batch)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    exact = student.eval()(batch, ("image",)).pooled["image"]
    assert 0 < (targets.cls_BD - exact).abs().max() < 0.1


def test_the_file_of_a_checkpoint(tmp_path):
    student, teachers = build()
    move(student)
    teachers["ema"].update(student, 0.5)
    save_averages(teachers, CheckpointWriter(tmp_path, None))
    _, fresh = build()
    load_averages(fresh, tmp_path)
    for name, value in fresh["ema"].average().items():
        assert torch.equal(value, teachers["ema"].average()[name])
    with pytest.raises(UserError, match="holds another model's average"):
        load_averages(build("text")[1], tmp_path)
    with pytest.raises(UserError, match=r"found averages of ema, none of teachers\.other"):
        load_averages({"other": fresh["ema"]}, tmp_path)
    with pytest.raises(UserError, match=r"found no averages\.safetensors"):
        load_averages(fresh, tmp_path / "..")
    save_averages({}, CheckpointWriter(tmp_path / "nowhere", None))  # nothing to write


def test_it_needs_a_student():
    with pytest.raises(UserError, match="cannot be loaded by itself"):
        load("ema:image")
    with pytest.raises(UserError, match="averages a student in training"):
        build_teachers(config_of(), torch.device("cpu"))
