"""A teacher that runs a copy of the student's frozen encoder, once for both."""

from dataclasses import replace

import pytest
import torch
from small import StubTokenizer, random_batch, small_config

from mmd2v.distributed.environment import World
from mmd2v.errors import UserError
from mmd2v.export import write_export
from mmd2v.models.student import build_student
from mmd2v.train.parts import build_parts

CPU = World(0, 1, 0, torch.device("cpu"), "gloo")


def config_of(folder, encoder: dict, precision: str = "fp32", objectives=None, **changes):
    image = {"kind": "patch", "patch_size": 8, **encoder}
    return small_config(
        engine__precision="fp32",
        seed=5,  # a random start is not the teacher's
        data__tokenizer=None,
        model__encoders={"image": image},
        model__layers=[{"kind": "separate"}],
        model__projection={"kind": "none"},
        teachers={"t": {"name": f"mmd2v:{folder}", "precision": precision, "shared_encoder": "image"}},
        objectives=objectives or [{"kind": "layer_results", "teacher": "t", "modality": "image"}],
        **changes,
    )


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "export"
    config = small_config(
        data__tokenizer=None,
        model__encoders={"image": {"kind": "patch", "patch_size": 8}},
        model__layers=[{"kind": "separate", "count": 2}],
        model__projection={"kind": "none"},
        objectives=[{"kind": "attributes", "classes": 3}],
        data__labels="known",
    )
    write_export(folder, build_student(config, StubTokenizer()), config, None)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_encoder_runs_once_and_gives_what_it_would_give_alone(teacher_folder, precision):
    parts = build_parts(config_of(teacher_folder, {"frozen": True, "init": f"mmd2v:{teacher_folder}"}, precision), CPU)
    batch = random_batch()
    calls = []
    for encoder in (parts.student.encoders["image"], parts.teachers["t"].model.encoders["image"]):
        encoder.register_forward_hook(lambda module, inputs, output: calls.append(module))
    targets = {"t": parts.teachers["t"](batch)}
    shared = parts.module(batch, targets)["loss"]
    assert calls == [parts.teachers["t"].model.encoders["image"]]
    alone = parts.module(batch, {"t": replace(targets["t"], encoded=None)})
    rounding = {"rtol": 0, "atol": 0} if precision == "fp32" else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(shared, alone["loss"], **rounding)
    shared.backward()
    assert all(p.grad is None for p in parts.student.encoders.parameters())


@pytest.mark.gpu
def test_encoder_is_shared_on_a_gpu(teacher_folder):
    world = World(0, 1, 0, torch.device("cuda"), "nccl")
    parts = build_parts(config_of(teacher_folder, {"frozen": True, "init": f"mmd2v:{teacher_folder}"}, "bf16"), world)
    batch = random_batch().to(world.device)
    parts.module.to(world.device)
    assert parts.module(batch, {"t": parts.teachers["t"](batch)})["loss"].isfinite()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"init": "SOURCE"}, r"model\.encoders\.image is trained \(proj\.weight, .*set its frozen: true"),
        ({"frozen": True}, r"whose weights are not those of the encoder of 'mmd2v:.*' \(proj\.weight"),
        ({"frozen": True, "init": "SOURCE", "dropout": 0.1}, r"model\.encoders\.image\.dropout is 0\.1"),
        ({"frozen": True, "init": "SOURCE", "token_drop": 0.5}, r"model\.encoders\.image\.token_drop is 0\.5"),
    ],
)
def test_encoders_that_cannot_be_shared_are_refused(teacher_folder, encoder, message):
    encoder = {key: f"mmd2v:{teacher_folder}" if value == "SOURCE" else value for key, value in encoder.items()}
    with pytest.raises(UserError, match=message):
        build_parts(config_of(teacher_folder, encoder), CPU)


def test_teachers_without_an_encoder_of_ours_are_refused(tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    config = config_of("unused", {"frozen": True})
    teacher = config.teachers["t"].model_copy(update={"name": f"timm:test_resnet@{tmp_path / 'w.safetensors'}"})
    objectives = [{"kind": "cls_regression", "teacher": "t"}]
    config = config_of("unused", {"frozen": True}, objectives=objectives).model_copy(
        update={"teachers": {"t": teacher}}
    )
    with pytest.raises(UserError, match=r"teachers\.t\.shared_encoder: found 'image', but 'timm:.*' has no modality"):
        build_parts(config, CPU)
