"""The loss of unimodal distillation and its gradients against the original training step."""

import pytest
import torch
from originals import (
    BLOCK_PARTS,
    CPU,
    AsGiven,
    Golden,
    TokenizerOf,
    converted,
    image_batch,
    load_blocks,
    text_batch,
)

from mmd2v.config.schema import Config
from mmd2v.train.parts import build_parts


def config_of(modality: str, folder) -> Config:
    """Stage 1 or 2 as a config: the first two of the teacher's blocks, the frozen encoder run once for both."""
    family = f"data2vec2-{modality}"
    eps = 1e-6 if modality == "image" else 1e-5
    encoder = {"norm": True, "norm_eps": eps, "frozen": True, "weights": f"{family}:{folder}"}
    if modality == "image":
        encoder |= {"kind": "patch", "patch_size": 16, "positions": "sincos"}
    else:
        encoder |= {"kind": "tokens", "first_position": 2, "position_rows": 34, "padding": "longest"}
    return Config.model_validate(
        {
            "name": "stage",
            "run_dir": "unused",
            "steps": 1,
            "data": {
                "train": {"shards": "unused"},
                "image": {"size": 64},
                "tokenizer": {"path": "unused", "max_length": 32} if modality == "text" else None,
            },
            "model": {
                "width": 32,
                "heads": 4,
                "encoders": {modality: encoder},
                "layers": [
                    {
                        "kind": "separate",
                        "count": 2,
                        "norm": "post",
                        "eps": eps,
                        "init": {modality: {"source": f"{family}:{folder}"}},
                    }
                ],
                "final_norm": False,
                "projection": {"kind": "none"},
            },
            "teachers": {
                "teacher": {
                    "name": f"{family}:{folder}",
                    "modality": modality,
                    "precision": "fp32",
                    "shared_encoder": modality,
                }
            },
            "objectives": [
                {
                    "kind": "layer_results",
                    "teacher": "teacher",
                    "modality": modality,
                    "count_padding": modality == "text",
                }
            ],
            "engine": {"precision": "fp32"},
        }
    )


@pytest.mark.parametrize("modality", ["image", "text"])
def test_loss_and_gradients_equal_the_original_step(shared, tmp_path, monkeypatch, modality):
    golden = Golden(shared, f"kd_{modality}")
    folder = converted(shared, tmp_path, f"d2v2_{modality}.pt")
    monkeypatch.setattr("mmd2v.train.parts.load_tokenizer", lambda config: TokenizerOf(260, 32))
    parts = build_parts(config_of(modality, folder), CPU)
    load_blocks(parts.student, golden, modality, blocks=2)
    if modality == "image":
        parts.student.encoders["image"].normalize = AsGiven()
        parts.teachers["teacher"].model.encoders["image"].normalize = AsGiven()
        batch = image_batch(golden["in/x"])
    else:
        batch = text_batch(golden["in/x"], golden["in/padding_mask"])

    runs = []
    for encoder in (parts.student.encoders[modality], parts.teachers["teacher"].model.encoders[modality]):
        encoder.register_forward_hook(lambda module, inputs, output: runs.append(module))
    targets = {name: teacher(batch) for name, teacher in parts.teachers.items()}
    losses = parts.module(batch, targets)
    assert len(runs) == 1, "the frozen encoder is to run once for student and teacher"

    torch.testing.assert_close(losses["loss"], golden["out/loss"], rtol=1e-6, atol=0)
    losses["loss"].backward()
    found = dict(parts.student.named_parameters())
    for theirs, norm in golden.about["grad_norms_student_params"].items():
        _, block, *rest = theirs.split(".")
        part, kind = ".".join(rest[:-1]), rest[-1]
        ours = BLOCK_PARTS[part].format(owner=modality)
        gradient = found[f"layers.{block}.{ours}.{kind}"].grad
        # A bias right before the instance norm has no gradient but rounding.
        assert float(gradient.norm()) == pytest.approx(norm, rel=2e-6, abs=1e-7), theirs
    trained = {name for name, p in found.items() if p.grad is not None and float(p.grad.norm()) > 0}
    assert not [name for name in trained if name.startswith("encoders.")]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_gradient_of_the_loss_for_each_layer_result(shared, modality):
    from mmd2v_kernels import distill_target

    golden = Golden(shared, f"kd_{modality}")
    own = [golden[f"in/student_layer{i}"].requires_grad_() for i in range(2)]
    teacher = [golden[f"in/teacher_layer{i}"] for i in range(4)]
    averages = [distill_target(results, final_layer_norm=modality == "image") for results in (own, teacher)]
    torch.nn.functional.mse_loss(*averages).backward()
    for i, result in enumerate(own):
        torch.testing.assert_close(result.grad, golden[f"grad/student_layer{i}"], rtol=1e-5, atol=1e-9)
