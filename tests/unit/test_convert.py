"""`mmd2v convert`: every dress of the public files, strict keys, folders that are whole, errors that help."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

import mmd2v.teachers
from mmd2v.cli.main import USER_ERROR_STATUS, main
from mmd2v.config.schema import TeacherConfig
from mmd2v.errors import UserError
from mmd2v.models.checkpoints.convert import convert
from mmd2v.models.checkpoints.converted import FAMILIES, block, encoder_state, load_state, read_architecture
from mmd2v.models.positions import sincos_2d
from mmd2v.models.teachers.identity import teacher_settings

WIDTH, DEPTH, HEADS = 8, 2, 2
CONFIG = {"model": {"_name": "data2vec_multi", "num_heads": HEADS, "norm_eps": 1e-6}}


def numbers(*shape: int) -> torch.Tensor:
    numbers.seed += 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(numbers.seed))


numbers.seed = 0


def blocks(start: str, count: int) -> dict[str, torch.Tensor]:
    state = {}
    for i in range(count):
        for name, rows, columns in (("attn.qkv", 24, 8), ("attn.proj", 8, 8), ("mlp.fc1", 16, 8), ("mlp.fc2", 8, 16)):
            state |= {f"{start}{i}.{name}.weight": numbers(rows, columns), f"{start}{i}.{name}.bias": numbers(rows)}
        for name in ("norm1", "norm2"):
            state |= {f"{start}{i}.{name}.weight": numbers(WIDTH), f"{start}{i}.{name}.bias": numbers(WIDTH)}
    return state


def image_state() -> dict[str, torch.Tensor]:
    start = "modality_encoders.IMAGE."
    return {
        f"{start}extra_tokens": numbers(1, 1, WIDTH),
        f"{start}local_encoder.proj.weight": numbers(WIDTH, 3, 4, 4),
        f"{start}local_encoder.proj.bias": numbers(WIDTH),
        f"{start}fixed_positional_encoder.positions": sincos_2d((3, 3), WIDTH)[None],
        f"{start}context_encoder.norm.weight": numbers(WIDTH),
        f"{start}context_encoder.norm.bias": numbers(WIDTH),
        **blocks("blocks.", DEPTH),
    }


def text_state() -> dict[str, torch.Tensor]:
    start = "modality_encoders.TEXT.local_encoder."
    return {
        f"{start}embed_tokens.weight": numbers(11, WIDTH),
        f"{start}embed_positions.weight": numbers(7, WIDTH),
        f"{start}layernorm_embedding.weight": numbers(WIDTH),
        f"{start}layernorm_embedding.bias": numbers(WIDTH),
        **blocks("blocks.", DEPTH),
    }


def write(path, state, **rest):
    torch.save({"args": None, "cfg": CONFIG, "model": state, **rest}, path)
    return path


def test_the_names_are_ours(tmp_path):
    state = image_state()
    convert(write(tmp_path / "a.pt", state), tmp_path / "out")
    found = load_state(tmp_path / "out", "data2vec2-image", "here")
    pairs = {
        "encoders.image.proj.weight": "modality_encoders.IMAGE.local_encoder.proj.weight",
        "encoders.image.grid.cls_token": "modality_encoders.IMAGE.extra_tokens",
        "encoders.image.grid.norm.bias": "modality_encoders.IMAGE.context_encoder.norm.bias",
        "layers.1.attention.image.norm.weight": "blocks.1.norm1.weight",
        "layers.1.attention.image.qkv.bias": "blocks.1.attn.qkv.bias",
        "layers.0.attention.image.proj.weight": "blocks.0.attn.proj.weight",
        "layers.0.mlp.image.norm.weight": "blocks.0.norm2.weight",
        "layers.1.mlp.image.fc1.weight": "blocks.1.mlp.fc1.weight",
        "layers.1.mlp.image.fc2.weight": "blocks.1.mlp.fc2.weight",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(found[ours], state[theirs]), ours
    assert len(found) == len(state) - 1  # the positions are computed again
    architecture = read_architecture(tmp_path / "out", "data2vec2-image", "here")
    assert architecture.model_dump(exclude_none=True) == {
        "width": 8, "depth": 2, "heads": 2, "eps": 1e-6, "mlp_ratio": 2.0, "image_size": 12, "patch_size": 4,
    }  # fmt: skip


def test_text_names_and_the_parts_readers_get(tmp_path):
    state = text_state()
    convert(write(tmp_path / "a.pt", state, cfg=None), tmp_path / "out", heads=4)
    encoder = encoder_state(tmp_path / "out", "data2vec2-text", "here")
    start = "modality_encoders.TEXT.local_encoder."
    assert encoder.keys() == {"embedding.weight", "positions.weight", "norm.weight", "norm.bias"}
    assert torch.equal(encoder["positions.weight"], state[f"{start}embed_positions.weight"])
    assert torch.equal(encoder["norm.weight"], state[f"{start}layernorm_embedding.weight"])
    one = block(tmp_path / "out", "data2vec2-text", 1, "here")
    assert torch.equal(one["attention.qkv.weight"], state["blocks.1.attn.qkv.weight"]) and len(one) == 12
    architecture = read_architecture(tmp_path / "out", "data2vec2-text", "here")
    assert (architecture.eps, architecture.heads) == (1e-5, 4)
    assert (architecture.vocab_size, architecture.positions, architecture.image_size) == (11, 7, None)


@pytest.mark.parametrize(
    ("name", "family"),
    [("d2v2_image.pt", 0), ("d2v2_image_prenet2.pt", 0), ("d2v2_text.pt", 1), ("d2v2_text_namespace_fp16.pt", 1)],
)
def test_published_formats_give_the_originals_weights(shared, tmp_path, name, family):
    golden = load_file(shared / "golden" / f"{name.removesuffix('.pt').removesuffix('_namespace_fp16')}.safetensors")
    weights = {key.removeprefix("w/"): value for key, value in golden.items() if key.startswith("w/")}
    conversion = convert(shared / "golden" / name, tmp_path / "out")
    found = load_state(tmp_path / "out", FAMILIES[family], "here")
    assert conversion.family == FAMILIES[family] and all(value.dtype == torch.float32 for value in found.values())
    architecture = read_architecture(tmp_path / "out", FAMILIES[family], "here")
    assert (architecture.depth, architecture.heads) == (4, 4)
    modality, prenet = ("image", "text")[family], 2 if "prenet" in name else 0
    parts = {"attn.qkv": "attention.{}.qkv", "attn.proj": "attention.{}.proj", "norm1": "attention.{}.norm"}
    parts |= {"norm2": "mlp.{}.norm", "mlp.fc1": "mlp.{}.fc1", "mlp.fc2": "mlp.{}.fc2"}
    used = set()
    for i in range(4):
        start = f"modality_encoders.IMAGE.context_encoder.blocks.{i}" if i < prenet else f"blocks.{i - prenet}"
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                key = f"layers.{i}.{ours.format(modality)}.{kind}"
                assert torch.equal(found[key], weights[f"{start}.{theirs}.{kind}"]), key
                used.add(key)
    encoder = {key for key in found if key.startswith(f"encoders.{modality}.")}
    assert found.keys() == used | encoder and len(encoder) == (4 if family else 5)
    kept = [key for key in weights if ".decoder." not in key and "fixed_positional" not in key]
    assert len(kept) == len(found)
    for mine, theirs in (("proj.weight", "proj.weight"), ("embedding.weight", "embed_tokens.weight")):
        key = f"encoders.{modality}.{mine}"
        if key in found:
            assert torch.equal(found[key], weights[f"modality_encoders.{modality.upper()}.local_encoder.{theirs}"])


def test_beit2_keeps_the_originals_weights(shared, tmp_path):
    golden = load_file(shared / "golden" / "beit2.safetensors")
    conversion = convert(shared / "golden" / "beit2.pth", tmp_path / "out")
    found = load_state(tmp_path / "out", "beit2", "here")
    for key, value in found.items():
        assert torch.equal(value, golden[f"w/{key}"]), key
    ignored = {"cls_pt_layers.*": 30, "lm_head.*": 2, "mask_token": 1, "rel_pos_bias.relative_position_index": 1}
    assert conversion.ignored == ignored
    assert len(found) + sum(ignored.values()) == sum(key.startswith("w/") for key in golden)
    one = block(tmp_path / "out", "beit2", 3, "here")
    width = conversion.architecture.width
    assert torch.equal(one["attention.qkv.bias"][:width], golden["w/blocks.3.attn.q_bias"])
    assert not one["attention.qkv.bias"][width : 2 * width].any()
    assert torch.equal(one["mlp.layer_scale"], golden["w/blocks.3.gamma_2"])
    with pytest.raises(UserError, match=r"here: .* has no encoder of its own"):
        encoder_state(tmp_path / "out", "beit2", "here")


def test_all_dresses_are_the_same_model(tmp_path):
    state = image_state()
    half = {key: value.half() for key, value in state.items()}
    model_args = argparse.Namespace(**CONFIG["model"])
    fine_tuned = {f"model.{key}": value for key, value in state.items()}
    fine_tuned |= {"fc_norm.weight": numbers(8), "head.weight": numbers(5, 8), "head.bias": numbers(5)}
    pretraining = {
        "shared_decoder.x": numbers(1),
        "modality_encoders.IMAGE.decoder.proj.weight": numbers(2, 2),
        "recon_proj.weight": numbers(2, 2),
    }
    nested = {key: torch.zeros_like(value) for key, value in state.items()}
    dresses = {
        "plain": write(tmp_path / "plain.pt", state),
        "args": write(tmp_path / "args.pt", state, cfg=None, args=model_args),
        "fp16": write(tmp_path / "fp16.pt", half),
        "nested": write(tmp_path / "nested.pt", {**state, "_ema": nested, **pretraining}),
        "flat": write(tmp_path / "flat.pt", state | {f"_ema.{key}": value for key, value in nested.items()}),
        "fine-tuned": write(
            tmp_path / "tuned.pt", fine_tuned, cfg={"model": {"_name": "x", "pretrained_model_args": CONFIG}}
        ),
    }
    first = convert(dresses.pop("plain"), tmp_path / "plain")
    for name, path in dresses.items():
        found = convert(path, tmp_path / name)
        assert found.architecture == first.architecture, name
        for key, value in first.state.items():
            assert torch.equal(found.state[key], value.half().float() if name == "fp16" else value), (name, key)
    assert convert(dresses["fine-tuned"], tmp_path / "again").ignored["head.*"] == 2


def test_blocks_a_modality_owns_come_first(tmp_path):
    state = image_state() | blocks("modality_encoders.IMAGE.context_encoder.blocks.", 1)
    found = convert(write(tmp_path / "a.pt", state), tmp_path / "out")
    assert found.architecture.depth == 3
    first = state["modality_encoders.IMAGE.context_encoder.blocks.0.norm1.bias"]
    assert torch.equal(found.state["layers.0.attention.image.norm.bias"], first)
    assert torch.equal(found.state["layers.2.mlp.image.fc1.bias"], state["blocks.1.mlp.fc1.bias"])


def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    state = image_state()
    state[new] = state.pop(old)
    return state


def test_every_key_is_accounted_for(tmp_path):
    def complaint(state, **rest) -> str:
        path = write(tmp_path / "a.pt", state, **rest)
        with pytest.raises(UserError) as caught:
            convert(path, tmp_path / "out")
        assert not (tmp_path / "out").exists() and str(caught.value).startswith(f"{path}: ")
        return str(caught.value)

    message = complaint(renamed("blocks.0.norm1.bias", "blocks.0.nrom1.bias"))
    assert "1 key missing: 'blocks.0.norm1.bias'. Did you mean 'blocks.0.nrom1.bias'?" in message
    assert "1 key unexpected: 'blocks.0.nrom1.bias'. Did you mean 'blocks.0.norm1.bias'?" in message
    assert "unexpected: 'norm.weight'" in complaint(image_state() | {"norm.weight": numbers(8)})
    assert "unexpected: 'head.weight'" in complaint(image_state() | {"head.weight": numbers(8, 8)})
    gap = {key.replace("blocks.1.", "blocks.2."): value for key, value in image_state().items()}
    assert "no key begins with 'blocks.1.'" in complaint(gap)
    none = {key: value for key, value in image_state().items() if not key.startswith("blocks.")}
    assert "no key begins with 'blocks.0.'" in complaint(none)
    wide = image_state() | {"blocks.1.mlp.fc1.weight": numbers(24, 8)}
    assert "'blocks.1.mlp.fc1.weight' is float32 of shape (24, 8), expected floating-point" in complaint(wide)
    whole = image_state() | {"blocks.1.norm1.bias": torch.zeros(8, dtype=torch.int64)}
    assert "'blocks.1.norm1.bias' is int64" in complaint(whole)
    assert "is a dict" in complaint(image_state() | {"blocks.1.norm1.bias": {}})
    nan = image_state() | {"blocks.1.norm1.bias": torch.full((8,), float("nan"))}
    assert "'blocks.1.norm1.bias' holds a number that is not finite" in complaint(nan)
    key = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    turned = image_state() | {key: sincos_2d((3, 3), WIDTH).roll(4, dims=1)[None]}
    assert f"'{key}' is up to" in complaint(turned) and "sine-cosine" in complaint(turned)
    assert "of a square image" in complaint(image_state() | {key: sincos_2d((2, 4), WIDTH)[None]})
    pre = {"model": {**CONFIG["model"], "layer_norm_first": True}}
    assert "post-norm" in complaint(image_state(), cfg=pre)
    assert "3 heads, which do not divide its width 8" in complaint(image_state(), cfg={"model": {"num_heads": 3}})
    assert "give --heads" in complaint(image_state(), cfg=None)
    assert "of no known family" in complaint({"encoder.layer.0.weight": numbers(1)})
    close = complaint({"cls_tokens": numbers(1, 1, 8), "a": numbers(1)})
    assert "Did you mean 'cls_tokens'?" in close


def test_a_file_without_weights_is_named(tmp_path):
    torch.save({"state": image_state()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"found \['state'\], expected a dict whose key 'model'"):
        convert(tmp_path / "a.pt", tmp_path / "out")
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(UserError, match="found list"):
        convert(tmp_path / "b.pt", tmp_path / "out")


@pytest.fixture
def folder(tmp_path):
    convert(write(tmp_path / "a.pt", image_state()), tmp_path / "images")
    return tmp_path / "images"


def test_a_folder_says_where_it_is_from(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["version"], config["family"]) == ("mmd2v-converted", 1, "data2vec2-image")
    assert config["source"]["file"] == "a.pt" and len(config["source"]["sha256"]) == 64
    assert config["ignored"] == [{"keys": "modality_encoders.IMAGE.fixed_positional_encoder.positions", "count": 1}]
    readme = (folder / "README.md").read_text()
    assert "a.pt" in readme and "CC-BY-NC" in readme and "`data2vec2-image:THIS-FOLDER`" in readme
    assert str(tmp_path) not in readme


def test_what_is_no_folder_of_that_family_is_named(folder, tmp_path):
    def complaint(name, family="data2vec2-image") -> str:
        with pytest.raises(UserError) as caught:
            read_architecture(name, family, "here")
        assert str(caught.value).startswith("here: ")
        return str(caught.value)

    assert "Did you mean 'images'?" in complaint(tmp_path / "image")
    assert f"run `mmd2v convert {tmp_path / 'a.pt'} --out DIR`" in complaint(tmp_path / "a.pt")
    assert "has no config.json" in complaint(tmp_path)
    assert f"Did you mean 'data2vec2-image:{folder}'?" in complaint(folder, "beit2")
    with pytest.raises(UserError, match=r"here: block 2 of .*images, which has the blocks 0 to 1"):
        block(folder, "data2vec2-image", 2, "here")
    config = (folder / "config.json").read_text()
    for damaged, reason in (
        (config[:20], "Invalid JSON"),
        (config.replace("mmd2v-converted", "x"), "format: "),
        (config.replace('"width": 8', '"width": 0'), "architecture.width: "),
        (config.replace('"width": 8', '"wdith": 8'), "architecture.width: Field required"),
    ):
        (folder / "config.json").write_text(damaged)
        assert reason in complaint(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"here: .*model.safetensors is no readable safetensors file"):
        load_state(folder, "data2vec2-image", "here")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"here: .* has no model.safetensors"):
        load_state(folder, "data2vec2-image", "here")


def test_the_command(tmp_path, capsys):
    path = write(tmp_path / "a.pt", image_state() | {"_ema": {}})
    assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "data2vec2-image" in printed and "width 8, depth 2, heads 2" in printed
    assert "29 keys" in printed and "_ema (1)" in printed
    arguments = ["convert", str(path), "--out", str(tmp_path / "out")]
    assert main(arguments) == USER_ERROR_STATUS
    assert f"error: --out: {tmp_path / 'out'} exists" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "b.pt"), "--out", str(tmp_path / "b")]) == USER_ERROR_STATUS
    assert "b.pt: no such file" in capsys.readouterr().err
    assert main(["convert", str(path), "--out", str(tmp_path / "b"), "--heads", "3"]) == USER_ERROR_STATUS
    assert "--heads says 3 heads" in capsys.readouterr().err
    assert main(["convert", str(path), "--out", str(tmp_path / "b"), "--heads", "0"]) == USER_ERROR_STATUS
    assert "--heads: found 0" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:2000])
    assert main(["convert", str(path), "--out", str(tmp_path / "b")]) == USER_ERROR_STATUS
    assert "a.pt: damaged" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_command_refuses_hostile_files(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in sorted((shared / "golden" / "malicious").glob("*.pt")):
        assert main(["convert", str(path), "--out", "out"]) == USER_ERROR_STATUS
        assert f"{path.name}: refused" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_teacher_is_known_by_its_files(folder):
    config = TeacherConfig(name=f"data2vec2-image:{folder}")
    settings = teacher_settings(config, torch.device("cpu"), "here")
    assert settings["the teacher's name"] == "data2vec2-image"
    moved = folder.rename(folder.parent / "moved")
    again = teacher_settings(TeacherConfig(name=f"data2vec2-image:{moved}"), torch.device("cpu"), "here")
    assert settings == again
    (moved / "model.safetensors").write_bytes(b"other")
    changed = teacher_settings(TeacherConfig(name=f"data2vec2-image:{moved}"), torch.device("cpu"), "here")
    assert changed != again
    with pytest.raises(UserError, match="here: no file"):
        teacher_settings(config, torch.device("cpu"), "here")


def test_beit2_as_a_teacher_says_what_does_not_fit(shared, folder, tmp_path):
    convert(shared / "golden" / "beit2.pth", tmp_path / "beit2")
    name = f"beit2:{tmp_path / 'beit2'}"
    assert mmd2v.teachers.load(name, image_size=64).width == 32
    for options, reason in (
        ({"image_size": 32}, "image_size is 32, but .* takes 64"),
        ({"modality": "text"}, "sees images"),
        ({"kwargs": {"depth": 3}}, "takes no kwargs"),
    ):
        with pytest.raises(UserError, match=reason):
            mmd2v.teachers.load(name, **options)
    with pytest.raises(UserError, match="Did you mean 'data2vec2-image:"):
        mmd2v.teachers.load(f"beit2:{folder}")
