"""A micro-batch that lacks a modality: every module is called, every loss is a number, every weight has a gradient."""

from dataclasses import replace

import pytest
import torch
from small import StubTokenizer, random_batch, small_config
from torch import nn

from mmd2v.data.batch import Batch
from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.models.teachers import build_teachers
from mmd2v.objectives import build_objectives
from mmd2v.objectives.base import weighted_mean
from mmd2v.train.module import TrainModule

PATCHES = {"kind": "patch", "patch_size": 8}
TOKENS = {"kind": "tokens"}
EMA = {"image": {"name": "ema:image"}, "text": {"name": "ema:text", "modality": "text"}}
EACH = ("image", "text")
DATA2VEC = [{"kind": "data2vec", "modality": name, "teacher": name, "min_target_var": 0} for name in EACH]
CASES = {
    "cls of the own modality": {
        "objectives": [{"kind": "cls_regression", "teacher": name, "modalities": [name]} for name in EACH],
        "teachers": EMA,
    },
    "cls of the other modality": {
        "objectives": [{"kind": "cls_regression", "teacher": name, "head": "mlp"} for name in EACH],
        "teachers": EMA,
    },
    "layer results": {
        "objectives": [{"kind": "layer_results", "teacher": name, "modality": name} for name in EACH],
        "teachers": EMA,
    },
    "tokens": {
        "objectives": [{"kind": "token_regression", "teacher": name, "modality": name} for name in EACH],
        "teachers": EMA,
    },
    "kept tokens": {
        "objectives": [
            {"kind": "layer_results", "teacher": "image", "modality": "image", "keep": 0.5},
            {"kind": "cls_regression", "teacher": "text", "modalities": ["text"]},
        ],
        "teachers": EMA,
    },
    "data2vec": {
        "objectives": DATA2VEC,
        "teachers": EMA,
        "model__masking": {"image": {"masks": 2, "block": 2}, "text": {"masks": 2, "block": 1}},
    },
    "means": {
        "objectives": [{"kind": "cls_regression", "teacher": name} for name in EACH],
        "teachers": EMA,
        "model__pooling": {"image": "mean", "text": "mean"},
    },
    "rows of padding": {
        "objectives": [{"kind": "cls_regression", "teacher": name} for name in EACH],
        "teachers": EMA,
        "model__encoders": {"image": PATCHES, "text": {**TOKENS, "padding": "longest"}},
        "model__pooling": {"text": "mean"},
    },
    "attributes": {
        "objectives": [{"kind": "attributes", "modality": name, "classes": 3} for name in EACH],
        "data__labels": "vector",
    },
    "a backbone that is trained": {
        "objectives": [{"kind": "cls_regression", "teacher": "text"}],
        "teachers": {"text": EMA["text"]},
        "model__encoders": {"image": {"kind": "timm", "name": "test_vit", "kwargs": {"img_size": 32}}, "text": TOKENS},
    },
    "layers of all kinds": {
        "objectives": [{"kind": "cls_regression", "teacher": "text"}],
        "teachers": {"text": EMA["text"]},
        "model__encoders": {"image": {**PATCHES, "token_drop": 0.5, "norm": True, "dropout": 0.1}, "text": TOKENS},
        "model__token_types": "input",
        "model__layers": [
            {"kind": "separate", "norm": "post", "modalities": ["image"], "drop_path": 0.2},
            {"kind": "separate", "sub_norm": True, "layer_scale": 0.5},
            {"kind": "mome", "drop_path": 0.2, "dropout": 0.1},
            {"kind": "shared", "norm": "post"},
        ],
    },
}


def without(batch: Batch, modality: str) -> Batch:
    if modality == "image":
        return replace(batch, images=batch.images[:, :, :0, :0])
    nothing = {name: getattr(batch, name)[:0] for name in ("text_ids", "text_lengths", "caption_image")}
    return replace(batch, **nothing)


def build(**changes) -> tuple[TrainModule, dict]:
    config = small_config(**changes)
    student = build_student(config, StubTokenizer())
    teachers = build_teachers(config, torch.device("cpu"), student=student)
    objectives = build_objectives(config, student, teachers)
    for name, needs in objectives.needs.items():
        teachers[name].prepare(needs, name)
    return TrainModule(student, objectives, autocast=False).train(), teachers


def run(module: TrainModule, teachers: dict, batch: Batch) -> tuple[dict[str, float], list[nn.Module]]:
    """The losses of a micro-batch, whose gradients stay, and the modules in the order they were called."""
    called: list[nn.Module] = []
    hooks = [child.register_forward_pre_hook(lambda one, _: called.append(one)) for child in module.modules()]
    module.zero_grad()
    losses = module(batch, {name: teacher(batch) for name, teacher in teachers.items()})
    losses["loss"].backward()
    for hook in hooks:
        hook.remove()
    return {name: float(value.detach()) for name, value in losses.items()}, called


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("absent", EACH)
@pytest.mark.parametrize("case", CASES)
def test_modules_losses_and_gradients_are_those_of_other_batches(case, absent, recomputed):
    module, teachers = build(**CASES[case], model__activation_checkpointing=recomputed)
    whole = replace(random_batch(4, captions=2), labels=torch.ones(4, 3), draw_seed=1)
    expected, order = run(module, teachers, whole)
    have_gradient = {name for name, p in module.named_parameters() if p.grad is not None}

    batch = without(whole, absent)
    found, called = run(module, teachers, batch)
    assert called == order
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = EACH[1 - EACH.index(absent)]
        assert value == value and value >= 0
        assert value == 0 or not name.endswith(f"/{absent}")
        if f"/{other}" in name and case in ("layer results", "tokens", "cls of the own modality"):
            assert value == pytest.approx(expected[name], abs=1e-6)  # the other modality learns as ever
    assert {name for name, p in module.named_parameters() if p.grad is not None} == have_gradient
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            assert not (f"encoders.{absent}." in name and parameter.grad.any()), name


@pytest.mark.parametrize("absent", EACH)
@pytest.mark.parametrize("kind", ["contrastive", "siglip"])
def test_losses_over_all_ranks_refuse_it(kind, absent):
    module, teachers = build(objectives=[{"kind": kind}])
    with pytest.raises(UserError, match=f"{kind}: .* micro-batch of rank 0 has no {absent}"):
        run(module, teachers, without(random_batch(), absent))


@pytest.mark.parametrize("absent", EACH)
def test_a_bank_of_targets_refuses_it(absent):
    objective = {"kind": "contrastive_target", "teacher": absent, "modalities": [EACH[1 - EACH.index(absent)]]}
    module, teachers = build(objectives=[objective], teachers=EMA)
    with pytest.raises(UserError, match=f"contrastive_target: .* has no {absent}"):
        run(module, teachers, without(random_batch(), absent))


def test_batch_norms_that_are_trained_refuse_it():
    image = {"kind": "timm", "name": "test_resnet"}
    objectives = [{"kind": "cls_regression", "teacher": "text", "modalities": ["text"]}]
    module, teachers = build(
        objectives=objectives, teachers={"text": EMA["text"]}, model__encoders={"image": image, "text": TOKENS}
    )
    batch = without(random_batch(), "image")
    with pytest.raises(UserError, match=r"model.encoders.image: .* holds no image, .* batch norms"):
        run(module, teachers, batch)
    module.eval()
    assert run(module, teachers, batch)[0]["loss"] > 0


def test_teachers_of_a_library_give_the_form_of_their_targets(tmp_path):
    import timm
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=50, max_position_embeddings=24, **sizes)).save_pretrained(tmp_path / "bert")
    teachers = {
        "image": {"name": f"timm:test_resnet@{tmp_path / 'resnet.safetensors'}", "image_size": 32},
        "text": {"name": f"hf:{tmp_path / 'bert'}", "modality": "text"},
    }
    config = small_config(teachers=teachers, objectives=[{"kind": "cls_regression", "teacher": "image"}])
    for name, teacher in build_teachers(config, torch.device("cpu"), StubTokenizer()).items():
        whole, nothing = teacher(random_batch()), teacher(without(random_batch(), name))
        assert nothing.cls_BD.shape == (0, *whole.cls_BD.shape[1:])
        assert nothing.cls_BD.dtype == whole.cls_BD.dtype
        assert len(nothing.tokens_BTD) == 0 and nothing.tokens_BTD.shape[2] == whole.tokens_BTD.shape[2]


@pytest.mark.parametrize("mean_over", [None, 2.5])
def test_a_mean_over_no_rows_is_0_with_a_gradient(mean_over):
    x = torch.ones(3, 2, requires_grad=True)
    mean = weighted_mean(x[:0], torch.ones(0), mean_over)
    mean.backward()
    assert mean == 0 and x.grad is not None and not x.grad.any()
