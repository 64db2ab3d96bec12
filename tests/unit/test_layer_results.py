"""Regression of layer results and of tokens: what counts, padding, teachers of other libraries, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import StubTokenizer, random_batch, small_config

import mmd2v
from mmd2v.errors import UserError
from mmd2v.models.student import build_student
from mmd2v.models.teachers import Needs, Targets
from mmd2v.objectives import build_objectives
from mmd2v_kernels import distill_target


class StubTeacher:
    """What an objective asks of a teacher when it is built."""

    def __init__(self, modality: str, width: int = 16, token_width: int | None = 16) -> None:
        self.modality, self.width, self.token_width = modality, width, token_width


def parts(modality: str, kind: str = "layer_results", teacher: StubTeacher | None = None, **settings):
    config = small_config(
        objectives=[{"kind": kind, "teacher": "t", "modality": modality, **settings}],
        teachers={"t": {"name": "timm:test_vit", "modality": modality}},
        model__encoders__text={"kind": "tokens", "padding": "longest" if settings.get("count_padding") else "none"},
    )
    torch.manual_seed(0)
    student = build_student(config, StubTokenizer()).eval()
    return student, build_objectives(config, student, {"t": teacher or StubTeacher(modality)})


def written_out(own, teacher, counts, final_norm):
    """The definition, sample by sample: instance norm over the tokens that count, mean over layers, mean distance."""
    losses = []
    for b in range(len(own[0])):

        def average(results, b=b):
            rows = [result[b][: int(counts[b].sum())] for result in results]
            normed = [(r - r.mean(0)) / (r.var(0, correction=0) + 1e-5).sqrt() for r in rows]
            mean = torch.stack(normed).mean(0)
            return F.layer_norm(mean, mean.shape[-1:]) if final_norm else mean

        losses.append((average(own) - average(teacher)).square().mean())
    return torch.stack(losses).mean()


def test_a_modality_without_layers_is_refused():
    term = {"kind": "layer_results", "teacher": "t", "modality": "text"}
    config = small_config(
        objectives=[term],
        teachers={"t": {"name": "timm:test_vit", "modality": "text"}},
        model__layers=[{"kind": "separate", "modalities": ["image"]}],
    )
    student = build_student(config, StubTokenizer())
    with pytest.raises(UserError, match=r"objectives.0.modality: 'text' passes no layer, expected at least one"):
        build_objectives(config, student, {"t": StubTeacher("text")})


@pytest.mark.parametrize("modality", ["image", "text"])
def test_loss_is_the_definition_over_real_tokens(modality):
    student, objectives = parts(modality)
    batch = random_batch()
    output = student(batch, wanted=objectives.wanted)
    layout = output.tokens.layout
    own = [layout.rectangle(rows, modality) for rows in output.results[modality]]
    generator = torch.Generator().manual_seed(3)
    teacher = [torch.randn(own[0].shape, generator=generator) for _ in range(5)]
    is_token = layout.is_token(modality)
    counts = torch.ones(own[0].shape[:2], dtype=torch.bool) if is_token is None else is_token
    losses = objectives(output, {"t": Targets(teacher[0][:, 0], None, teacher)}, batch)
    expected = written_out(own, teacher, counts, final_norm=modality == "image")
    torch.testing.assert_close(losses[f"layer_results_loss/{modality}"], expected)
    # What stands in the padding of the teacher changes nothing.
    padded = [torch.where(counts[..., None], result, 7.0) for result in teacher]
    again = objectives(output, {"t": Targets(teacher[0][:, 0], None, padded)}, batch)
    torch.testing.assert_close(again["loss"], losses["loss"])


def test_padding_counts_where_the_source_counts_it():
    student, objectives = parts("text", count_padding=True)
    batch = random_batch()
    output = student(batch, wanted=objectives.wanted)
    own = [output.tokens.layout.rectangle(rows, "text") for rows in output.results["text"]]
    teacher = [torch.randn(own[0].shape) for _ in range(2)]
    found = objectives(output, {"t": Targets(teacher[0][:, 0], None, teacher)}, batch)["loss"]
    averages = [distill_target(results, final_layer_norm=False) for results in (own, teacher)]
    torch.testing.assert_close(found, F.mse_loss(*averages))
    with pytest.raises(UserError, match=r"objectives\.0\.count_padding: needs rows of padding"):
        parts("image", count_padding=True)


@pytest.mark.parametrize("by", ["most", "least"])
def test_masked_variant_keeps_the_patches_the_teacher_attends_to(by):
    student, objectives = parts("image", keep=0.5, keep_by=by)
    assert objectives.needs == {"t": Needs(layer_results=True, cls_attention=True)}
    batch = random_batch()
    output = student(batch, wanted=objectives.wanted)
    own = [output.tokens.layout.rectangle(rows, "image") for rows in output.results["image"]]
    teacher = [torch.randn(own[0].shape) for _ in range(2)]
    patches = own[0].shape[1] - 1
    attention = torch.rand(len(batch), patches + 1)
    targets = Targets(teacher[0][:, 0], None, teacher, cls_attention_BT=attention)
    found = objectives(output, {"t": targets}, batch)["loss"]
    target, prediction = (distill_target(results, final_layer_norm=True) for results in (teacher, own))
    expected = []
    for b in range(len(batch)):
        order = attention[b, 1:].argsort(descending=by == "most")[: round(patches * 0.5)] + 1
        kept = torch.cat([torch.tensor([0]), order])  # the CLS always counts
        expected.append((prediction[b, kept] - target[b, kept]).square().mean())
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_damaged_samples_add_nothing():
    student, objectives = parts("image")
    batch = random_batch()
    output = student(batch, wanted=objectives.wanted)
    own = output.tokens.layout.rectangle(output.results["image"][0], "image")
    teacher = [torch.randn(own.shape) for _ in range(2)]
    weighted = replace(batch, weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    other = [result.clone() for result in teacher]
    for result in other:
        result[1] = 9.0
    losses = [
        objectives(output, {"t": Targets(results[0][:, 0], None, results)}, weighted)["loss"]
        for results in (teacher, other)
    ]
    assert torch.equal(*losses)


def test_other_tokens_and_widths_are_refused():
    student, objectives = parts("image")
    batch = random_batch()
    output = student(batch, wanted=objectives.wanted)
    with pytest.raises(UserError, match=r"\[4, 17, 16\].*'t' \[4, 5, 16\]: they see different"):
        objectives(output, {"t": Targets(torch.zeros(4, 16), None, [torch.zeros(4, 5, 16)])}, batch)
    with pytest.raises(UserError, match="has width 24, the student 16"):
        parts("image", teacher=StubTeacher("image", width=24))
    with pytest.raises(UserError, match="'t' sees text, image is image"):
        parts("image", teacher=StubTeacher("text"))


@pytest.mark.parametrize("with_cls", [True, False])
@pytest.mark.parametrize("loss", ["mse", "smooth_l1", "cosine"])
def test_tokens_of_a_map_are_regressed_one_by_one(with_cls, loss):
    student, objectives = parts("image", "token_regression", StubTeacher("image", 40, 24), head="linear", loss=loss)
    batch = random_batch()
    output = student(batch)
    own = output.tokens.layout.rectangle(output.tokens.x_TD, "image")
    own = own if with_cls else own[:, 1:]
    target = torch.randn(4, own.shape[1], 24)
    found = objectives(output, {"t": Targets(torch.zeros(4, 40), target)}, batch)["token_regression_loss/image"]
    prediction, wanted = objectives.terms[0].head(own), F.layer_norm(target, (24,))
    expected = {
        "mse": F.mse_loss(prediction, wanted),
        "smooth_l1": F.smooth_l1_loss(prediction, wanted),
        "cosine": (1 - F.cosine_similarity(prediction, wanted, dim=-1)).mean(),
    }[loss]
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="the student has 17 tokens a sample, 't' 9"):
        objectives(output, {"t": Targets(torch.zeros(4, 40), torch.zeros(4, 9, 24))}, batch)


def test_results_of_a_hugging_face_encoder_are_its_mlps(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=50, max_position_embeddings=16)).save_pretrained(tmp_path)
    teacher = mmd2v.teachers.load(f"hf:{tmp_path}", modality="text", precision="fp32")
    teacher.prepare(Needs(layer_results=True), "here")
    batch = random_batch()
    targets = teacher(batch)
    assert len(targets.layer_results) == 2 and targets.is_token_BT.sum() == batch.text_lengths.sum()
    # The last result, its residual and its norm give the last hidden state.
    starts = np.cumsum([0, *batch.text_lengths])
    first = batch.text_ids[starts[0] : starts[1]][None].long()
    with torch.no_grad():
        hidden = teacher.model(input_ids=first, output_hidden_states=True).hidden_states
        block = teacher.model.encoder.layer[1]
        attended = block.attention(hidden[1])[0]
        expected = block.output.dense(block.intermediate(attended))
    torch.testing.assert_close(targets.layer_results[1][0, : starts[1]], expected[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="gives no cls attention"):
        teacher.prepare(Needs(cls_attention=True), "here")


def test_results_of_a_vit_of_timm_are_its_mlps(tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    teacher = mmd2v.teachers.load(f"timm:test_vit@{tmp_path / 'vit.safetensors'}", precision="fp32")
    teacher.prepare(Needs(layer_results=True), "here")
    seen = []
    teacher.model.blocks[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    targets = teacher(random_batch(size=160))
    assert len(targets.layer_results) == len(teacher.model.blocks)
    assert torch.equal(targets.layer_results[-1], seen[0])
