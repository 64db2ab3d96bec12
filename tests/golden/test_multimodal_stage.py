"""The multimodal stage against the original: forward, loss, gradients and five steps of AdamW."""

from dataclasses import replace

import pytest
import torch
from originals import (
    CPU,
    FP32,
    FP64,
    AsGiven,
    Golden,
    TokenizerOf,
    converted,
    rows,
    text_batch,
)

from mmd2v.config.schema import Config
from mmd2v.models.student import Wanted
from mmd2v.train.optimizer import build_optimizer, parameter_groups
from mmd2v.train.parts import build_parts


def config_of(image, text, teacher, shared_layers: int) -> Config:
    """A row of the source's table at the golden size."""
    separate = 3 - shared_layers
    return Config.model_validate(
        {
            "name": "row",
            "run_dir": "unused",
            "steps": 5,
            "data": {
                "train": {"shards": "unused"},
                "image": {"size": 64},
                "tokenizer": {"path": "unused", "max_length": 30},
            },
            "model": {
                "width": 32,
                "heads": 4,
                "sources": {"image": f"data2vec2-image:{image}", "text": f"data2vec2-text:{text}"},
                "encoders": {
                    "image": {
                        "kind": "patch",
                        "positions": "sincos",
                        "norm": True,
                        "norm_eps": 1e-6,
                        "frozen": True,
                        "weights": "image",
                    },
                    "text": {
                        "kind": "tokens",
                        "norm": True,
                        "norm_eps": 1e-5,
                        "frozen": True,
                        "first_position": 2,
                        "weights": "text",
                    },
                },
                "layers": [
                    {
                        "kind": "separate",
                        "count": separate,
                        "norm": "post",
                        "eps": {"image": 1e-6, "text": 1e-5},
                        "init": {"image": {"source": "image"}, "text": {"source": "text"}},
                    },
                    {"kind": "shared", "count": shared_layers, "norm": "post", "eps": 1e-6},
                ],
                "final_norm": False,
                "projection": {"kind": "none"},
            },
            "teachers": {"beit2": {"name": f"beit2:{teacher}", "precision": "fp32"}},
            "objectives": [{"kind": "cls_regression", "teacher": "beit2", "head": "none"}],
            "optimizer": {
                "name": "adamw",
                "lr": 5e-4,
                "betas": [0.9, 0.98],
                "eps": 1e-6,
                "weight_decay": 0.01,
                "decay_all": True,
                "schedule": "constant",
                "warmup": 0,
            },
            "engine": {"precision": "fp32"},
        }
    )


def ours_of(name: str, separate: int) -> str:
    """Our name of a parameter of the original."""
    _, block, half, owner, *rest = name.split(".")
    owner = owner if int(block) < separate else "shared"
    where = {"attn": "attention", "norm1": "attention", "norm2": "mlp", "mlp": "mlp"}[half]
    inner = "norm." if half.startswith("norm") else ""
    return f"layers.{block}.{where}.{owner}.{inner}{'.'.join(rest)}"


class Setup:
    """The run's parts with the golden starting weights, and its one batch."""

    def __init__(self, shared, folder, monkeypatch, shared_layers: int) -> None:
        monkeypatch.setattr("mmd2v.train.parts.load_tokenizer", lambda config: TokenizerOf(260, 30))
        self.golden = golden = Golden(shared, f"mm_fused{shared_layers}")
        self.separate = 3 - shared_layers
        files = [converted(shared, folder, name) for name in ("d2v2_image.pt", "d2v2_text.pt", "beit2.pth")]
        self.config = config_of(*files, shared_layers)
        self.parts = build_parts(self.config, CPU)
        state = {ours_of(k[2:], self.separate): v for k, v in golden.tensors.items() if k.startswith("w/blocks.")}
        own = self.parts.student.state_dict()
        for name in [n for n in state if int(n.split(".")[1]) < self.separate]:
            # The separate blocks come from the converted files alone, as in the original.
            torch.testing.assert_close(own[name], state[name], rtol=0, atol=0)
        assert not self.parts.student.load_state_dict(state, strict=False).unexpected_keys
        self.parts.student.encoders["image"].normalize = AsGiven()
        self.parts.teachers["beit2"].normalize = AsGiven()
        self.batch = text_batch(golden["in/text"], golden["in/padding_mask"], golden["in/image"])
        self.targets = {name: teacher(self.batch) for name, teacher in self.parts.teachers.items()}


@pytest.fixture(params=[1, 2], ids=["one_shared", "two_shared"])
def setup(request, shared, tmp_path, monkeypatch):
    return Setup(shared, tmp_path, monkeypatch, request.param)


def test_forward_equals_the_original(setup):
    golden, student, batch = setup.golden, setup.parts.student, setup.batch
    torch.testing.assert_close(setup.targets["beit2"].cls_BD, golden["in/teacher_cls"], **FP32)
    is_pad = golden["in/padding_mask"]
    with torch.no_grad():
        output = student(batch, wanted=Wanted(results=frozenset({"image", "text"})))
    torch.testing.assert_close(output.tokens["image"], golden["out/image_x"].flatten(0, 1), **FP32)
    torch.testing.assert_close(output.tokens["text"], rows(golden["out/text_x"], is_pad), **FP32)
    for i in range(3):
        torch.testing.assert_close(output.results["image"][i], golden[f"out/image_block{i}.t"].flatten(0, 1), **FP32)
        torch.testing.assert_close(output.results["text"][i], rows(golden[f"out/text_block{i}.t"], is_pad), **FP32)
    for modality in ("image", "text"):
        torch.testing.assert_close(output.pooled[modality], golden[f"out/{modality}_cls"], **FP32)
        torch.testing.assert_close(output.embedding[modality], golden[f"out/enc_{modality}"], **FP32)
    exact = student.double()(batch)
    for modality in ("image", "text"):
        torch.testing.assert_close(exact.pooled[modality], golden[f"out64/{modality}_cls"], **FP64)


def test_loss_gradients_and_five_steps_equal_the_original(setup):
    golden, module = setup.golden, setup.parts.module
    optimizer, _ = build_optimizer(
        setup.config, parameter_groups(setup.config.optimizer, module.named_parameters()), torch.device("cpu")
    )
    names = ("loss", "cls_regression_loss/text", "cls_regression_loss/image")
    sequence = []
    for step in range(6):
        losses = module(setup.batch, setup.targets)
        sequence.append([float(losses[name].detach()) for name in names])
        optimizer.zero_grad()
        losses["loss"].backward()
        if step == 0:
            compare_gradients(setup)
        if step < 5:
            optimizer.step()
    expected = golden.about["losses_total_text_image"]
    torch.testing.assert_close(torch.tensor(sequence), torch.tensor(expected), rtol=1e-6, atol=0)
    parameters = dict(setup.parts.student.named_parameters())
    for key in (k for k in golden.tensors if k.startswith("after5/")):
        found = parameters[ours_of(key.removeprefix("after5/"), setup.separate)]
        torch.testing.assert_close(found.detach(), golden[key], rtol=1e-5, atol=1e-6)


def test_norm_of_every_gradient_is_that_of_the_original(setup):
    """In float64: in fp32 the order in which a processor sums is as large as the bound."""
    batch = replace(setup.batch, images=setup.batch.images.double())
    targets = {name: replace(one, cls_BD=one.cls_BD.double()) for name, one in setup.targets.items()}
    setup.parts.module.double()(batch, targets)["loss"].backward()
    parameters = dict(setup.parts.student.named_parameters())
    for name, norm in setup.golden.about["grad_norms"].items():
        assert float(parameters[ours_of(name, setup.separate)].grad.norm()) == pytest.approx(norm, rel=1e-6), name


def compare_gradients(setup) -> None:
    parameters = dict(setup.parts.student.named_parameters())
    about = setup.golden.about
    for name in about["grad_norms"]:
        if f"grad/{name}" in setup.golden.tensors:
            gradient = parameters[ours_of(name, setup.separate)].grad
            torch.testing.assert_close(gradient, setup.golden[f"grad/{name}"], rtol=1e-4, atol=1e-6)
    trained = [p.grad for p in parameters.values() if p.grad is not None]
    total = torch.stack([g.norm() for g in trained]).norm()
    assert float(total) == pytest.approx(about["total_grad_norm"], rel=1e-6)
    assert len(trained) == len(about["grad_norms"])


def test_negative_controls_would_be_seen(setup):
    """A step without weight decay, the subtlest of the usual mistakes, leaves the losses by more than the tolerance."""
    without = setup.config.model_copy(
        update={"optimizer": setup.config.optimizer.model_copy(update={"weight_decay": 0.0})}
    )
    module = setup.parts.module
    groups = parameter_groups(without.optimizer, module.named_parameters())
    optimizer, _ = build_optimizer(without, groups, torch.device("cpu"))
    for _ in range(5):
        optimizer.zero_grad()
        module(setup.batch, setup.targets)["loss"].backward()
        optimizer.step()
    last = float(module(setup.batch, setup.targets)["loss"].detach())
    assert last != pytest.approx(setup.golden.about["losses_total_text_image"][5][0], rel=1e-6)
