"""Where starting weights come from: what fits is taken over, what would compute something else is refused."""

import pytest
import timm
import torch
from checkpoint_samples import converted_base
from export_samples import build, small_export
from safetensors.torch import load_file, save_file
from small import StubTokenizer, small_config
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from mmd2v.config.structure import differences, function
from mmd2v.data.tokenizers import load_tokenizer
from mmd2v.errors import UserError
from mmd2v.export import write_export
from mmd2v.models.exported import exported_block
from mmd2v.models.student import build_student

IMAGE_ALONE = {
    "model__encoders": {"image": {"kind": "patch", "patch_size": 8}},
    "objectives": [{"kind": "attributes", "modality": "image", "classes": 1}],
    "data__labels": "x",
}
LAYER = {"kind": "separate", "count": 2}


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    """An export of an image model of two layers."""
    return small_export(tmp_path_factory.mktemp("image"), model__layers=[LAYER], **IMAGE_ALONE)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """An export of images and texts: a separate layer, one that shares its attention, one that shares all."""
    return small_export(tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder)
    return f"hf:{folder}"


def student(layer: dict, **changes):
    return build_student(small_config(model__layers=[layer], **changes), StubTokenizer())


def refused(layer: dict, **changes) -> str:
    with pytest.raises(UserError) as error:
        student(layer, **changes)
    return str(error.value)


# ---------------------------------------------------------------------------------------------- exports


def test_shared_weights_may_come_from_a_single_owner(image_model):
    init = {"shared": {"source": f"mmd2v:{image_model}"}}
    found = student({"kind": "shared", "init": init}).state_dict()
    kept = load_file(image_model / "model.safetensors")
    for name in ("attention.image.qkv.weight", "mlp.image.fc2.bias"):
        assert torch.equal(found[f"layers.0.{name.replace('image', 'shared')}"], kept[f"layers.0.{name}"])
    mome = {"kind": "mome", "init": init}  # of shared weights it has the attention alone
    assert torch.equal(
        student(mome).state_dict()["layers.0.attention.shared.proj.weight"],
        kept["layers.0.attention.image.proj.weight"],
    )


@pytest.mark.parametrize(
    ("owner", "init", "named"),
    [("text", {}, "text"), ("text", {"modality": "imagee"}, "imagee"), ("shared", {"modality": "imag"}, "imag")],
)
def test_who_asks_for_a_modality_gets_that_one(image_model, owner, init, named):
    kind = "shared" if owner == "shared" else "separate"
    message = refused({"kind": kind, "init": {owner: {"source": f"mmd2v:{image_model}", **init}}})
    assert f"model.layers.0.init.{owner}.source: layer 0 of {image_model} has no attention of '{named}'" in message
    assert "expected one of its owners (image) as `modality`" in message
    assert ("Did you mean 'image'?" in message) == (named != "text")


def test_several_owners_are_no_single_one(both):
    message = refused({"kind": "shared", "init": {"shared": {"source": f"mmd2v:{both}"}}})
    assert "has no attention of 'shared', expected one of its owners (image, text) as `modality`." in message
    mome = {"kind": "mome", "init": {"shared": {"source": f"mmd2v:{both}", "first": 1, "parts": "attention"}}}
    student(mome)  # the owners of the half that is not taken do not matter
    student({"kind": "separate", "init": {"text": {"source": f"mmd2v:{both}", "modality": "image"}}})


def test_a_layer_that_an_export_lacks_is_named(both):
    with pytest.raises(UserError, match=r"here: layer 3 of .*, which has 3, counted from 0"):
        exported_block(str(both), 3, "image", ["mlp"], "here")


@pytest.mark.parametrize("at", ["layers", "encoder", "everything"])
def test_a_truncated_export_is_one_user_error(tmp_path, at):
    folder = small_export(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    changes = {
        "layers": {"model__layers": [{"kind": "shared", "init": {"shared": {"source": f"mmd2v:{folder}"}}}]},
        "encoder": {"model__encoders__image": {"kind": "patch", "patch_size": 8, "init": f"mmd2v:{folder}"}},
        "everything": {"model__init": f"mmd2v:{folder}"},
    }[at]
    with pytest.raises(UserError, match=r"^model\..*model.safetensors is no readable safetensors file: "):
        build_student(small_config(**changes), StubTokenizer())


# ------------------------------------------------------------------------------- what the weights do not say


def test_blocks_keep_their_heads_norms_and_epsilon(bert, image_model):
    fits = {"kind": "separate", "norm": "post", "eps": {"text": 1e-12}, "init": {"text": {"source": bert}}}
    student(fits)
    assert "model.layers.0.init.text.source: the source has 2 heads, the student's layer 4" in refused(
        fits | {"heads": 4}
    )
    assert "the source is post-norm, the student's layer has norm: pre; set model.layers.0.norm" in refused(
        fits | {"norm": "pre"}
    )
    assert refused(fits | {"eps": 1e-6}).startswith(
        f"model.layers.0.eps: found 1e-06 for 'text', whose blocks were trained with 1e-12 ({bert})"
    )
    ours = {"kind": "separate", "init": {"image": {"source": f"mmd2v:{image_model}"}}}
    student(ours)
    assert "the source has 2 heads" in refused(ours | {"heads": 4})
    assert "the source is pre-norm" in refused(ours | {"norm": "post"})
    assert "model.layers.0.eps: found 1e-05 for 'image'" in refused(ours | {"eps": 1e-5})


def test_a_converted_checkpoint_keeps_them_too(tmp_path):
    folder = converted_base(tmp_path / "text", "data2vec2-text")
    layer = {
        **{"kind": "separate", "norm": "post", "eps": {"text": 1e-5}},
        "init": {"text": {"source": f"data2vec2-text:{folder}"}},
    }
    base = {"model__width": 768, "model__heads": 12}
    student(layer, **base)
    assert "found 1e-06 for 'text', whose blocks were trained with 1e-05" in refused(layer | {"eps": 1e-6}, **base)
    assert "the source has 12 heads" in refused(layer | {"heads": 8}, **base)


def test_halves_of_two_sources_have_the_epsilon_of_either(bert, tmp_path):
    """One number serves both norms of an owner."""

    def layer(eps: float) -> dict:
        second = {"source": f"mmd2v:{post}", "parts": "mlp", "modality": "image"}
        init = {"text": [{"source": bert, "parts": "attention"}, second]}
        return {"kind": "separate", "norm": "post", "eps": eps, "init": init}

    post = small_export(tmp_path, model__layers=[LAYER | {"norm": "post"}], **IMAGE_ALONE)
    for eps in (1e-6, 1e-12):
        student(layer(eps))
    assert f"trained with 1e-12 ({bert}) and 1e-06 (mmd2v:{post})" in refused(layer(1e-5))


def test_a_weight_without_a_place_is_refused(tmp_path):
    scaled = small_export(tmp_path, model__layers=[LAYER | {"layer_scale": 0.1, "sub_norm": True}], **IMAGE_ALONE)
    layer = {"kind": "separate", "init": {"image": {"source": f"mmd2v:{scaled}"}}}
    assert (
        "the source has attention.inner_norm.bias, for which the student's layer has no place; "
        "set model.layers.0.sub_norm" in refused(layer)
    )
    assert (
        "the source has attention.layer_scale, for which the student's layer has no place; set "
        "model.layers.0.layer_scale" in refused(layer | {"sub_norm": True})
    )
    student(layer | {"sub_norm": True, "layer_scale": 1.0})


def test_a_layer_scale_that_the_source_lacks_keeps_its_start(image_model):
    layer = {"kind": "separate", "layer_scale": 0.5, "init": {"image": {"source": f"mmd2v:{image_model}"}}}
    assert student(layer).layers[0].mlp["image"].layer_scale.unique().tolist() == [0.5]


def test_blocks_of_a_vision_transformer_are_not_berts(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    layer = {"kind": "separate", "init": {"image": {"source": f"hf:{tmp_path}"}}}
    assert "ViTModel is not BERT-like; its blocks cannot be taken over" in refused(layer)


def test_a_source_that_is_no_name_says_what_may_stand_there():
    layer = {"kind": "separate", "init": {"image": {"source": "imge"}}}
    message = refused(layer, model__sources={"image": "mmd2v:x"})
    assert "found 'imge', expected hf:FOLDER, mmd2v:FOLDER, data2vec2-image:FOLDER" in message
    assert "beit2:FOLDER or a name in model.sources (image). Did you mean 'image'?" in message


# ------------------------------------------------------------------------------------ everything from an export


LAYERS = [{"kind": "separate"}, {"kind": "mome"}, {"kind": "shared"}]


def tuned(folder, **changes):
    """The student of the export's config with ``changes``, started from it."""
    config, tokenizer, _ = build(folder.parent, **changes)
    model = config.model.model_copy(update={"init": f"mmd2v:{folder}"})
    return build_student(config.model_copy(update={"model": model}), tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__projection": {"kind": "mlp", "dim": 5}},
        {"model__layers": [layer | {"dropout": 0.1, "heads": 2, "eps": 1e-6} for layer in LAYERS]},
        {"model__freeze": ["layers.0.*"], "model__pooling": {"image": "cls"}, "model__init_deviation": 0.1},
        {"model__encoders__text": {"kind": "tokens", "frozen": True, "position_rows": 16}},
    ],
)
def test_everything_comes_from_an_export_of_the_same_function(both, changes):
    kept = load_file(both / "model.safetensors")
    own = tuned(both, **changes).state_dict()
    assert all(torch.equal(own[name], kept[name]) for name in own if not name.startswith("projection."))


DIFFERENT = {
    "token types": ({"model__token_types": "input"}, 'model.token_types: export "none", this run ["input", "image", '),
    "final norm": ({"model__final_norm": False}, "model.final_norm: export true, this run false"),
    "pooling": ({"model__pooling": {"text": "mean"}}, 'model.pooling.text: export "cls", this run "mean"'),
    "heads": ({"model__heads": 4}, "model.layers.0.heads: export 2, this run 4"),
    "norm": ({"model__layers": [*LAYERS[:2], LAYERS[2] | {"norm": "post"}]}, 'model.layers.2.norm: export "pre", this'),
    "eps": ({"model__layers": [LAYERS[0] | {"eps": {"text": 1e-5}}, *LAYERS[1:]]}, "model.layers.0.eps.text: export 1"),
    "fewer layers": ({"model__layers": LAYERS[:2]}, "model.layers.2: export {"),
    "positions": ({"model__encoders__text": {"kind": "tokens", "first_position": 2}}, "text.first_position: export 0"),
    "layer scale": ({"model__layers": [*LAYERS[:2], LAYERS[2] | {"layer_scale": 0.1}]}, "has nothing for layers.2."),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_an_export_of_another_architecture_is_refused(both, case):
    changes, message = DIFFERENT[case]
    with pytest.raises(UserError, match=r"^model\.init: ") as error:
        tuned(both, **changes)
    assert message in str(error.value)


def test_weights_that_the_student_has_no_place_for_are_refused(tmp_path):
    scaled = small_export(tmp_path, model__layers=[*LAYERS[:2], LAYERS[2] | {"layer_scale": 0.1}])
    with pytest.raises(
        UserError,
        match=r"model\.init: .* has layers\.2\.attention\.shared\.layer_scale, .*, of which the student has nothing",
    ):
        tuned(scaled)


def test_no_other_source_is_read_then(both):
    nowhere = "data2vec2-image:/nowhere"
    config = small_config(
        data__tokenizer={"path": str(both.parent / "words.json"), "max_length": 16},
        model__init=f"mmd2v:{both}",
        model__layers=[LAYERS[0] | {"init": {"image": {"source": nowhere}}}, *LAYERS[1:]],
        model__encoders__image={"kind": "patch", "patch_size": 8, "weights": nowhere},
    )
    build_student(config, load_tokenizer(config.data.tokenizer))


def test_a_backbone_reads_no_weights_then(tmp_path):
    encoder = {"kind": "timm", "name": "resnet10t", "frozen": True, "weights": str(tmp_path / "w.safetensors")}
    save_file(timm.create_model("resnet10t").state_dict(), encoder["weights"])
    config, tokenizer, first = build(tmp_path, model__encoders__image=encoder, data__image__size=64)
    write_export(tmp_path / "export", first, config, tokenizer)
    (tmp_path / "w.safetensors").unlink()
    model = config.model.model_copy(update={"init": f"mmd2v:{tmp_path / 'export'}"})
    second = build_student(config.model_copy(update={"model": model}), load_tokenizer(config.data.tokenizer))
    own, other = first.state_dict(), second.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_groups_and_defaults_do_not_tell_models_apart():
    one = small_config(model__layers=[{"kind": "shared", "count": 2}]).model
    out = {"attention": "shared", "mlp": "shared", "heads": 2, "eps": {"shared": 1e-6}, "modalities": ["text", "image"]}
    other = small_config(model__layers=[{"kind": "shared"}, out], model__pooling={"text": "cls"}).model
    assert differences("model", function(one), function(other)) == []
