"""The student as a whole: packing, pooling, skipping modalities, freezing, starting weights."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from small import StubTokenizer, random_batch, small_config

from mmd2v.errors import UserError
from mmd2v.models.folding import fold_batch_norms
from mmd2v.models.parameters import no_decay, part
from mmd2v.models.student import build_student


def build(**changes):
    return build_student(small_config(**changes), StubTokenizer()).eval()


def test_embeddings_are_unit_vectors_of_the_projections_width():
    output = build(model__projection={"dim": 6})(random_batch(captions=2))
    assert output.embedding["image"].shape == (4, 6) and output.embedding["text"].shape == (8, 6)
    assert output.pooled["image"].shape == (4, 16)
    for embedding in output.embedding.values():
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(embedding)))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_sample_does_not_depend_on_its_neighbours(pooling):
    student = build(model__pooling={"image": pooling, "text": pooling})
    batch = random_batch()
    output = student(batch)
    stops = batch.text_lengths.cumsum(0)
    for i in range(4):
        start = stops[i] - batch.text_lengths[i]
        text = student.encode_text(batch.text_ids[start : stops[i]], batch.text_lengths[i : i + 1])
        torch.testing.assert_close(text[0], output.embedding["text"][i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.encode_image(batch.images), output.embedding["image"], rtol=1e-4, atol=1e-5)


def test_mean_pooling_counts_real_tokens_only():
    student = build(model__pooling={"text": "mean"}, model__final_norm=False)
    batch = random_batch()
    output = student(batch)
    lengths = batch.text_lengths.tolist()
    rows = output.tokens["text"].split(lengths)
    torch.testing.assert_close(output.pooled["text"], torch.stack([r.mean(0) for r in rows]))


def test_a_layer_of_one_modality_leaves_the_other_untouched():
    both = build(model__layers=[{"kind": "separate", "modalities": ["text"]}])
    none = build(model__layers=[])
    batch = random_batch()
    assert torch.equal(both(batch).tokens["image"], none(batch).tokens["image"])
    assert not torch.equal(both(batch).tokens["text"], none(batch).tokens["text"])


def test_same_seed_same_weights_whatever_was_drawn_before():
    first = build().state_dict()
    torch.rand(3)
    second = build().state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = build(seed=1).state_dict()
    assert not torch.equal(first["layers.0.attention.image.qkv.weight"], other["layers.0.attention.image.qkv.weight"])


def test_freeze_wildcards():
    student = build(model__freeze=["encoders.text.*", "layers.0.*"])
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith(("encoders.text.", "layers.0.")) for name in frozen)
    with pytest.raises(UserError, match=r"model.freeze: 'layer.0.\*' matches no parameter"):
        build(model__freeze=["layer.0.*"])


def test_patch_size_must_divide_the_image():
    with pytest.raises(UserError, match="found 32, expected a multiple of patch_size 7"):
        build(model__encoders__image={"kind": "patch", "patch_size": 7})


def test_frozen_timm_backbone_stays_in_eval_mode_without_gradient(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), weights)
    encoder = {"kind": "timm", "name": "resnet10t", "weights": str(weights), "frozen": True}
    student = build(model__encoders__image=encoder, data__image__size=64).train()
    before = {k: v.clone() for k, v in student.encoders["image"].backbone.state_dict().items()}
    student(random_batch(size=64)).embedding["image"].sum().backward()
    assert not student.encoders["image"].backbone.training
    assert all(p.grad is None for p in student.encoders["image"].backbone.parameters())
    assert student.encoders["image"].grid.bridge.weight.grad is not None
    after = student.encoders["image"].backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(("feature", "tokens"), [(-1, 4), (2, 64), (3, 16)])
def test_an_earlier_feature_map_gives_more_tokens(feature, tokens):
    encoder = {"kind": "timm", "name": "resnet10t", "feature": feature}
    student = build(model__encoders__image=encoder, data__image__size=64)
    assert student.encoders["image"].lengths(random_batch(size=64)).tolist() == [tokens + 1] * 4


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown name 'resnt10t'\. Did you mean 'resnet10t'"):
        build(model__encoders__image={"kind": "timm", "name": "resnt10t"})


def test_weights_of_another_architecture_are_refused(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, weights)
    with pytest.raises(UserError, match="is of another architecture"):
        build(model__encoders__image={"kind": "timm", "name": "resnet10t", "weights": str(weights)})


def test_parameter_roles():
    student = build()
    kept = {name for name, p in student.named_parameters() if no_decay(name, p)}
    assert {"encoders.image.grid.cls_token", "encoders.image.grid.positions"} <= kept
    assert {"encoders.text.embedding.weight", "encoders.text.positions.weight", "norm.weight"} <= kept
    assert "layers.0.mlp.image.fc1.weight" not in kept and "encoders.image.proj.weight" not in kept
    assert {part(name) for name, _ in student.named_parameters()} == {
        "encoders.image",
        "encoders.text",
        "layers",
        "norm",
        "projection",
    }


def test_text_blocks_from_a_hugging_face_encoder_compute_the_same(shared):
    from transformers import AutoModel, AutoTokenizer

    folder = str(shared / "teachers" / "minilm_l6_v2")
    student = build_student(
        small_config(
            model__width=384,
            model__heads=12,
            model__encoders={"text": {"kind": "hf", "name": folder}},
            model__layers=[
                {
                    "kind": "separate",
                    "count": 6,
                    "norm": "post",
                    "eps": 1e-12,
                    "init": {"text": {"source": f"hf:{folder}"}},
                }
            ],
            objectives=[{"kind": "attributes", "modality": "text", "classes": 1}],
            data__labels="x",
        ),
        StubTokenizer(),
    ).eval()
    texts = ["A dog runs.", "Two people sit on a bench in the park and talk."]
    encoded = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    mask = encoded["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**encoded).last_hidden_state[mask]
        batch = random_batch()
        batch = type(batch)(
            batch.images, encoded["input_ids"][mask].int(), mask.sum(1).int(), torch.zeros(2, dtype=torch.int64)
        )
        found = student(batch, ("text",)).tokens.x_TD
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_blocks_of_another_width_are_refused(shared):
    folder = str(shared / "teachers" / "minilm_l6_v2")
    with pytest.raises(UserError, match=r"layers.0.init.text.source: attention.norm.weight has shape \(384,\)"):
        build(model__layers=[{"kind": "separate", "init": {"text": {"source": f"hf:{folder}"}}}])
    with pytest.raises(UserError, match="owns no weights of attention and mlp in this layer"):
        build(model__layers=[{"kind": "shared", "init": {"text": {"source": f"hf:{folder}"}}}])
    with pytest.raises(UserError, match="block 6 was asked for, the source has 6"):
        build(
            model__width=384,
            model__heads=12,
            model__layers=[{"kind": "separate", "init": {"text": {"source": f"hf:{folder}", "first": 6}}}],
        )
    with pytest.raises(UserError, match=r"unknown name 'mmd2'\. Did you mean 'mmd2v'"):
        build(model__layers=[{"kind": "separate", "init": {"text": {"source": "mmd2:x"}}}])


def test_token_drop_leaves_tokens_out_in_training_only():
    student = build(model__encoders__image={"kind": "patch", "patch_size": 8, "token_drop": 0.5})
    batch = random_batch()
    assert student(batch).tokens["image"].shape[0] == 4 * 17
    student.train()
    first, second = student(batch), student(batch)
    assert first.tokens["image"].shape[0] == 4 * 9
    assert not torch.equal(first.pooled["image"], second.pooled["image"])


def test_token_drop_keeps_each_tokens_own_position():
    """With every token alike but for its position, what is left must be a subset of the rows of the full set."""
    student = build(model__encoders__image={"kind": "patch", "patch_size": 8, "token_drop": 0.5}, model__layers=[])
    batch = random_batch(images=1)
    full = student(batch).tokens.x_TD[:17]
    kept = student.train()(batch).tokens.x_TD[:9]
    distance = torch.cdist(kept, full)
    assert (distance.min(dim=1).values < 1e-5).all() and distance[0, 0] < 1e-5


def test_frozen_text_layers_are_not_differentiated():
    student = build(
        model__encoders__text={"kind": "tokens", "frozen": True},
        model__layers=[{"kind": "separate", "modalities": ["text"]}, {"kind": "shared"}],
        model__freeze=["layers.0.*"],
    )
    seen = []
    student.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    output = student(random_batch())
    assert seen == [False] and output.pooled["text"].requires_grad


def test_an_id_outside_the_vocabulary_is_named():
    with pytest.raises(UserError, match="found token id 50, expected ids in 0 … 49"):
        build().encode_text(torch.tensor([1, 50]), torch.tensor([2]))


def test_a_tokenizer_larger_than_the_embedding_table_is_refused(shared):
    class LargeTokenizer(StubTokenizer):
        vocab_size = 50_000

    encoders = {"text": {"kind": "hf", "name": str(shared / "teachers" / "minilm_l6_v2")}}
    config = small_config(
        model__encoders=encoders,
        objectives=[{"kind": "attributes", "modality": "text", "classes": 1}],
        data__labels="x",
    )
    with pytest.raises(UserError, match=r"has 50000 ids, but the embedding table of .* has 30522 rows"):
        build_student(config, LargeTokenizer())


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_frozen_encoder_has_no_trainable_parameter(modality):
    encoder = {"image": {"kind": "patch", "patch_size": 8}, "text": {"kind": "tokens"}}[modality]
    student = build(**{f"model__encoders__{modality}": {**encoder, "frozen": True}})
    assert not any(p.requires_grad for p in student.encoders[modality].parameters())
    assert all(p.requires_grad for p in student.layers.parameters())


def test_modalities_may_have_any_name():
    student = build(model__encoders={"photo": {"kind": "patch", "patch_size": 8}, "caption": {"kind": "tokens"}})
    batch = random_batch()
    assert set(student(batch).embedding) == {"photo", "caption"}
    assert student.encode_image(batch.images).shape == (4, 16)


def test_names_of_libraries_are_not_decayed_either():
    table, convolution, vector = torch.zeros(5, 4), torch.zeros(4, 3, 2, 2), torch.zeros(1, 5, 4)
    assert no_decay("encoders.image.backbone.pos_embed", vector)
    assert no_decay("encoders.text.embeddings.word_embeddings.weight", table)
    assert no_decay("layers.0.relative_position_bias_table", table)
    assert not no_decay("encoders.image.backbone.embeddings.patch_embeddings.projection.weight", convolution)


def test_a_frozen_backbone_of_an_export_starts_another(tmp_path):
    """An export holds a frozen backbone folded; one that trained it holds it whole. Both are sources of weights."""
    torch.manual_seed(0)
    whole = timm.create_model("resnet10t", num_classes=0)
    folded = fold_batch_norms(timm.create_model("resnet10t", num_classes=0))
    for name, model in (("whole", whole), ("folded", folded)):
        folder = tmp_path / name
        folder.mkdir()
        state = {f"encoders.photo.backbone.{k}": v for k, v in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        encoder = {"kind": "timm", "name": "resnet10t", "weights": str(folder), "frozen": True}
        backbone = build(model__encoders__image=encoder, data__image__size=64).encoders["image"].backbone
        images = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(
            backbone.forward_features(images), model.eval().forward_features(images), rtol=1e-4, atol=1e-4
        )
