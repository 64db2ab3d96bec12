"""Export → load: the same embeddings, nothing of the machine in it, clear errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from export_samples import CAPTIONS, build, photo, small_export
from safetensors.torch import load_file, save_file
from small import random_batch

import mmd2v
from mmd2v.config.load import load_config
from mmd2v.config.schema import Config, InitConfig, LayerConfig
from mmd2v.errors import UserError
from mmd2v.export import export, write_export
from mmd2v.report.model_card import Training


def hf_encoder(folder):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=60, max_position_embeddings=20, **sizes)).save_pretrained(folder / "bert")
    return {"kind": "hf", "name": str(folder / "bert")}


def timm_encoder(folder):
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), folder / "resnet.safetensors")
    return {"kind": "timm", "name": "test_resnet", "weights": str(folder / "resnet.safetensors"), "frozen": True}


@pytest.mark.parametrize("kind", ["own", "borrowed"])
def test_load_gives_the_embeddings_of_the_model_without_its_sources(tmp_path, kind):
    sources, place = tmp_path / "sources", tmp_path / "elsewhere"
    sources.mkdir()
    changes = {}
    if kind == "borrowed":
        changes["model__encoders"] = {"image": timm_encoder(sources), "text": hf_encoder(sources)}
        init = {"text": {"source": f"hf:{sources / 'bert'}"}}
        # The width of the blocks is the source's.
        layer = {"kind": "separate", "norm": "post", "eps": 1e-12, "heads": 2, "mlp_ratio": 32 / 24, "init": init}
        changes |= {"model__width": 24, "model__layers": [layer, {"kind": "shared"}]}
    config, tokenizer, student = build(sources, **changes)
    write_export(sources / "export", student, config, tokenizer)
    shutil.copytree(sources / "export", place)
    images = torch.stack([torch.from_numpy(np.array(photo(i, (32, 32)))) for i in range(3)])
    images = images.permute(0, 3, 1, 2).contiguous()
    ids, lengths = tokenizer.encode_batch(CAPTIONS)
    with torch.no_grad():
        expected_images = student.encode_image(images)
        expected_texts = student.encode_text(torch.from_numpy(ids), torch.from_numpy(lengths))
    shutil.rmtree(sources)

    encoder = mmd2v.load(place)
    assert (encoder.encode_image(images) - expected_images).abs().max() <= 1e-5
    assert (encoder.encode_text(CAPTIONS) - expected_texts).abs().max() <= 1e-5
    for file in place.rglob("*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file


def test_machine_paths_of_data_and_teachers_stay_at_home(tmp_path):
    config, tokenizer, student = build(
        tmp_path,
        data__train={"shards": [str(tmp_path / "flickr8k" / "train")]},
        data__eval={"shards": str(tmp_path / "flickr8k" / "val")},
        teachers={
            "seen": {"name": f"timm:test_resnet@{tmp_path / 'w.safetensors'}", "outputs": str(tmp_path / "stored")},
            "hub": {"name": "hf:org/name"},
        },
    )
    training = Training(step=1200, samples=76800, metrics={"i2t_R@1": 0.185, "images": 1000, "captions": 5000})
    write_export(tmp_path / "export", student, config, tokenizer, training)
    card = (tmp_path / "export" / "README.md").read_text()
    text = (tmp_path / "export" / "config.yaml").read_text()
    assert str(tmp_path) not in card + text
    assert "timm:test_resnet@w.safetensors" in card and "hf:org/name" in card
    assert "`flickr8k/train`" in card and "`flickr8k/val` (1,000 images, 5,000 captions)" in card
    assert "1,200 steps of 4 images" in card and "76,800 images seen" in card and "18.50" in card
    assert f"| total | {sum(p.numel() for p in student.parameters()):,} |" in card
    assert "licences" in card and "mmd2v.load(" in card
    mmd2v.load(tmp_path / "export")


def test_card_names_every_source_of_first_weights(tmp_path):
    config, tokenizer, student = build(tmp_path)
    both = [InitConfig(source="image", parts="attention"), InitConfig(source="hf:org/name", parts="mlp")]
    layers = [config.model.layers[0].model_copy(update={"init": {"text": both}}), *config.model.layers[1:]]
    model = config.model.model_copy(update={"layers": layers, "sources": {"image": "mmd2v:towers/image/export"}})
    write_export(tmp_path / "export", student, config.model_copy(update={"model": model}), tokenizer)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "started from `hf:org/name`" in card and "started from `mmd2v:image/export`" in card


def test_no_string_of_an_export_names_the_machine(tmp_path, monkeypatch):
    """Every key of a config that may hold a path, absolute, from the home folder and relative."""
    home, here = str(tmp_path / "home" / "me"), str(tmp_path / "runs" / "image_tower" / "export")
    encoder = timm_encoder(tmp_path)
    encoder["kwargs"] = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w" / "resnet.safetensors")}}
    inits = {"image": {"source": f"mmd2v:{here}"}, "text": {"source": "tower"}}
    config, tokenizer, student = build(tmp_path, model__encoders={"image": encoder, "text": {"kind": "tokens"}})
    model = config.model.model_copy(
        update={
            "init": f"mmd2v:{here}",
            "sources": {"tower": "mmd2v:../runs/text@2/export", "top": "beit2:../beit2"},
            "layers": [LayerConfig.model_validate({"kind": "separate", "init": inits})],
        }
    )
    teachers = {
        "a": {"name": f"mmd2v:{here}", "shared_encoder": "image", "outputs": home},
        "b": {"name": "hf:~/models/minilm", "modality": "text"},
        "c": {"name": "hf:org/name", "modality": "text"},
        "d": {"name": "hf:./name", "modality": "text"},
        "e": {"name": f"timm:test_resnet@{here}", "kwargs": {"checkpoint_path": "~/me/x/y.pth", "act_layer": "silu"}},
        "f": {"name": f"data2vec2-image:{tmp_path / 'checkpoints' / 'image'}"},
        "g": {"name": "hf:bert"},
    }
    options = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": f"{home}/swap/nvme"}}}
    values = config.model_dump() | {"model": model.model_dump(), "teachers": teachers}
    values["engine"]["deepspeed"] = options
    values["data"] |= {"trace": f"{home}/trace", "source": {"cache_dir": f"{home}/cache"}, "batch_tokens": None}
    values["data"]["train"]["shards"] = [f"{home}/coco/train", "../train", "https://host/a/b/c.tar?signature=SECRET"]
    values["data"]["eval"] = {"shards": "~/val"}
    changed = Config.model_validate(values)
    changed = changed.model_copy(update={"data": changed.data.model_copy(update={"lengths_dir": f"{home}/lengths"})})
    write_export(tmp_path / "export", student, changed, tokenizer)

    texts = [(tmp_path / "export" / name).read_text() for name in ("config.yaml", "README.md")]
    for secret in (str(tmp_path), "..", "~", "SECRET"):
        assert not any(secret in text for text in texts), secret
    written = load_config(tmp_path / "export" / "config.yaml")
    assert {name: teacher.name for name, teacher in written.teachers.items()} == {
        "a": "mmd2v:image_tower/export",
        "b": "hf:models/minilm",
        "c": "hf:org/name",
        "d": "hf:name",
        "e": "timm:test_resnet@export",
        "f": "data2vec2-image:checkpoints/image",
        "g": "hf:bert",
    }
    assert written.teachers["a"].shared_encoder == "image"
    assert written.teachers["e"].kwargs == {"checkpoint_path": "x/y.pth", "act_layer": "silu"}
    assert written.model.sources == {"tower": "mmd2v:text@2/export", "top": "beit2:beit2"}
    assert [init.source for init in written.model.layers[0].init.values()] == ["mmd2v:image_tower/export", "tower"]
    assert written.model.encoders["image"].kwargs["pretrained_cfg_overlay"] == {"file": "w/resnet.safetensors"}
    assert written.engine.deepspeed["zero_optimization"]["offload_param"] == {
        "device": "nvme",
        "nvme_path": "swap/nvme",
    }
    assert written.data.lengths_dir is None
    assert written.data.train.shards == ["coco/train", "train", "b/c.tar?…"] and written.data.eval.shards == "val"


def test_weights_are_fp32_even_if_the_model_is_not(tmp_path):
    config, tokenizer, student = build(tmp_path)
    write_export(tmp_path / "export", student.bfloat16(), config, tokenizer)
    state = load_file(tmp_path / "export" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    config, tokenizer, student = build(tmp_path)
    monkeypatch.setattr("mmd2v.export.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_export(tmp_path / "out" / "export", student, config, tokenizer)
    assert list((tmp_path / "out").iterdir()) == []


def test_code_that_comes_with_an_encoder_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    config, tokenizer, student = build(
        tmp_path, model__encoders={"image": {"kind": "patch"}, "text": hf_encoder(tmp_path)}
    )
    ran = tmp_path / "ran"
    (tmp_path / "bert" / "code.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import BertConfig\nclass Own(BertConfig): model_type = 'own'\n"
    )
    described = {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(described))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"model\.encoders\.text\.name: .*bert' has no usable config"):
        write_export(tmp_path / "export", student, config, tokenizer)
    assert not ran.exists() and not (tmp_path / "export").exists()


def break_export(folder, how):
    if how == "no config":
        (folder / "config.yaml").unlink()
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif how == "damaged weights":
        (folder / "model.safetensors").write_bytes(b"\x10" * 100)
    elif how == "unknown key":
        (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("width:", "widht:"))
    else:
        state = load_file(folder / "model.safetensors")
        if how == "missing":
            del state["norm.weight"]
        elif how == "shape":
            state["norm.weight"] = torch.ones(3)
        save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "is no export: it has no config.yaml"),
        ("no weights", "is no export: it has no model.safetensors"),
        ("no tokenizer", "data.tokenizer.path: .*not found"),
        ("damaged weights", r"model\.safetensors is no readable safetensors file"),
        ("unknown key", "widht: unknown key. Did you mean 'width'"),
        ("missing", r"1 parameters missing \['norm\.weight'\]"),
        ("shape", r"1 of another shape \['norm.weight'\]"),
    ],
)
def test_a_broken_export_is_refused_with_a_reason(tmp_path, how, message):
    folder = small_export(tmp_path)
    break_export(folder, how)
    with pytest.raises(UserError, match=message):
        mmd2v.load(folder)


def test_load_says_what_a_folder_is_instead(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        mmd2v.load(tmp_path / "nothing")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is a run; first `mmd2v export"):
        mmd2v.load(tmp_path)


def test_export_says_what_it_cannot_export(tmp_path):
    with pytest.raises(UserError, match=r"no such folder.*Did you mean 'runs'"):
        (tmp_path / "runs").mkdir()
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="no complete checkpoint"):
        export(tmp_path / "runs", tmp_path / "out")
    folder = small_export(tmp_path)
    with pytest.raises(UserError, match="an export already"):
        export(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"--out: .*export exists"):
        export(tmp_path / "runs", folder)
    lonely = tmp_path / "copied" / "checkpoints" / "step-000001"
    lonely.mkdir(parents=True)
    (lonely / "mmd2v.json").write_text("{}")
    with pytest.raises(UserError, match="exported from inside its run"):
        export(lonely, tmp_path / "out")


def test_a_frozen_encoder_has_no_gradient_and_runs_without(tmp_path):
    encoder = mmd2v.load(small_export(tmp_path))
    assert not any(p.requires_grad for p in encoder.student.parameters())
    batch = random_batch(2)
    assert not encoder.encode_image(batch.images).requires_grad
