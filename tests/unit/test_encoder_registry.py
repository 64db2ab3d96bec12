"""A kind of encoder from outside: known to config, messages, student and export by one call."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from pydantic import Field
from small import StubTokenizer, random_batch, small_config

from mmd2v.config.encoder_kinds import encoder_kinds, set_encoder_kinds
from mmd2v.config.load import dump_config, load_config
from mmd2v.config.schema import EncoderConfig
from mmd2v.errors import UserError
from mmd2v.models.encoders import ENCODERS, ModalityEncoder, register_encoder
from mmd2v.models.student import build_student
from mmd2v.plugins import load_plugins
from mmd2v.report.model_card import _encoder
from mmd2v.train.mock import mock_batch

ARRAYS = {"audio": {"shape": [5, 7]}}
ENCODERS_OF_THREE = {
    "image": {"kind": "patch", "patch_size": 8},
    "text": {"kind": "tokens"},
    "sound": {"kind": "spectrogram", "input": "audio"},
}


def three(**changes):
    contrastive = [{"kind": "contrastive", "between": ["image", "text"]}]
    values = {"data__arrays": ARRAYS, "model__encoders": ENCODERS_OF_THREE, "objectives": contrastive}
    return small_config(**{**values, **changes})


@pytest.fixture(scope="module", autouse=True)
def spectrogram():
    """The module of the encoder from outside; afterwards there are the kinds again that there were before."""
    kinds, encoders = encoder_kinds(), dict(ENCODERS)
    import spectrogram_encoder

    yield spectrogram_encoder
    set_encoder_kinds(kinds.values())
    ENCODERS.clear()
    ENCODERS.update(encoders)


def test_a_registered_kind_is_validated_dumped_and_read_again(spectrogram, tmp_path):
    config = three()
    assert isinstance(config.model.encoders["sound"], spectrogram.SpectrogramEncoderConfig)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


MISTAKES = {
    "kind": ({"kind": "spectogram"}, "model.encoders.sound: kind: found 'spectogram'; expected one of ", "spectrogram"),
    "key": ({"postions": "none"}, "model.encoders.sound.postions: unknown key.", "positions"),
    "value": ({"norm_eps": "x"}, "model.encoders.sound.norm_eps: found 'x'; expected a valid number", None),
    "input": (
        {"input": "audi"},
        "model.encoders.sound.input: found 'audi'; expected image, text or a name in",
        "audio",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_it_are_explained_as_everywhere(tmp_path, case):
    change, message, meant = MISTAKES[case]
    values = yaml.safe_load(dump_config(three()))
    values["model"]["encoders"]["sound"].update(change)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as error:
        load_config(file)
    assert message in str(error.value)
    assert meant is None or f"Did you mean '{meant}'?" in str(error.value)


def test_a_missing_input_is_said(tmp_path):
    values = yaml.safe_load(dump_config(three()))
    del values["model"]["encoders"]["sound"]["input"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"model\.encoders\.sound\.input: missing; a value is required \(the part of a"):
        load_config(file)


def test_the_student_sees_three_modalities():
    config = three()
    student = build_student(config, StubTokenizer()).eval()
    batch = mock_batch(config, StubTokenizer(), 4)
    output = student(batch)
    assert batch.arrays["audio"].shape == (4, 5, 7)
    assert {name: tuple(x.shape) for name, x in output.embedding.items()} == dict.fromkeys(
        ("image", "text", "sound"), (4, 16)
    )
    assert output.tokens["sound"].shape == (4 * 6, 16)
    alone = student.encode_array("audio", batch.arrays["audio"])
    torch.testing.assert_close(alone, output.embedding["sound"], rtol=1e-4, atol=1e-5)
    # The others are what they are without it.
    two = build_student(small_config(), StubTokenizer()).eval()(batch)
    for name in ("image", "text"):
        torch.testing.assert_close(two.embedding[name], output.embedding[name], rtol=1e-4, atol=1e-5)


def test_its_starting_weights_depend_on_the_seed_alone():
    first, second = (build_student(three(), StubTokenizer()).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["encoders.sound.proj.weight"].std() > 0.01 and first["encoders.sound.grid.positions"].std() > 0.01
    other = build_student(three(seed=1), StubTokenizer()).state_dict()
    assert not torch.equal(first["encoders.sound.proj.weight"], other["encoders.sound.proj.weight"])


def test_a_pair_of_image_and_text_is_joint_beside_a_third():
    layers = [{"kind": "separate"}, {"kind": "mome"}, {"kind": "separate", "modalities": ["sound"]}]
    config = three(model__layers=layers, model__joint_from=1, model__token_types="shared")
    student = build_student(config, StubTokenizer()).eval()
    batch = mock_batch(config, StubTokenizer(), 4)
    rows = torch.arange(4)
    two = student(batch, ("image", "text")).pair(rows, rows)
    torch.testing.assert_close(student(batch).pair(rows, rows), two, rtol=1e-4, atol=1e-5)


def test_an_input_that_is_no_array_is_refused_by_the_encoder_too():
    config = three(model__encoders={**ENCODERS_OF_THREE, "sound": {"kind": "spectrogram", "input": "image"}})
    with pytest.raises(UserError, match=r"model\.encoders\.sound\.input: found 'image', expected a name in data\.arr"):
        build_student(config, StubTokenizer())


def test_token_batches_have_no_arrays():
    with pytest.raises(ValueError, match=r"data\.batch_tokens: model\.encoders sees arrays \(audio\), expected text"):
        three(
            model__encoders={"text": {"kind": "tokens"}, "sound": ENCODERS_OF_THREE["sound"]},
            data__batch_tokens=1000,
            engine__batch_size=None,
            objectives=[{"kind": "attributes", "modality": "text", "classes": 1}],
            data__labels="x",
        )


def test_a_model_card_names_it():
    assert _encoder(three().model.encoders["sound"]) == "`spectrogram` of `audio`"


def test_registering_twice_is_fine_and_a_taken_kind_is_not(spectrogram):
    known, encoder = spectrogram.SpectrogramEncoderConfig, spectrogram.SpectrogramEncoder
    register_encoder(known, encoder)

    class Other(EncoderConfig):
        kind: Literal["spectrogram"] = Field("spectrogram", description="another")

    class Kindless(EncoderConfig):
        pass

    class New(EncoderConfig):
        kind: Literal["new"] = Field("new", description="new")
        input: Literal["image"] = Field("image", description="the pixels")

    with pytest.raises(ValueError, match="'spectrogram': SpectrogramEncoderConfig has it already"):
        register_encoder(Other, encoder)
    with pytest.raises(ValueError, match="'spectrogram': SpectrogramEncoder is its encoder already"):
        register_encoder(known, ModalityEncoder)
    with pytest.raises(TypeError, match="expected kind: Literal"):
        register_encoder(Kindless, encoder)
    with pytest.raises(TypeError, match="expected a subclass of EncoderConfig"):
        register_encoder(dict, encoder)
    with pytest.raises(TypeError, match="expected a subclass of ModalityEncoder"):
        register_encoder(New, torch.nn.Linear)
    assert "new" not in encoder_kinds()
    register_encoder(New, ModalityEncoder)
    four = three(model__encoders={**ENCODERS_OF_THREE, "other": {"kind": "new"}})
    assert four.model.encoders["other"].input == "image"


def _run(code: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({path!r})\n{code}"], capture_output=True, text=True
    )


def test_a_config_names_kinds_of_plugins_and_imports_none(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(three()))
    found = _run(
        "from mmd2v.config.load import load_config\n"
        "from mmd2v.plugins import load_plugins\n"
        f"try:\n    load_config({str(file)!r})\n"
        "except Exception as error:\n    print(error)\n"
        "assert 'spectrogram_encoder' not in sys.modules\n"
        "import os; os.environ['MMD2V_PLUGINS'] = ' spectrogram_encoder,'\n"
        "load_plugins()\n"
        f"print(load_config({str(file)!r}).model.encoders['sound'].kind)"
    )
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()
    assert "model.encoders.sound: kind: found 'spectrogram'; expected one of patch, timm, tokens, hf." in first
    assert second == "spectrogram"


def test_a_plugin_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("MMD2V_PLUGINS", "no_such_module")
    with pytest.raises(UserError, match="MMD2V_PLUGINS: found 'no_such_module', expected a Python module"):
        load_plugins()


def test_three_modalities_regress_one_image_teacher():
    from mmd2v.models.teachers import Targets
    from mmd2v.objectives import build_objectives

    class Teacher:
        width, modality = 16, "image"

    config = three(
        objectives=[{"kind": "cls_regression", "teacher": "t", "head": "none"}],
        teachers={"t": {"name": "timm:x"}},
        data__captions_per_image=2,
    )
    student = build_student(config, StubTokenizer()).eval()
    objectives = build_objectives(config, student, {"t": Teacher()})
    batch = random_batch(captions=2)
    batch = type(batch)(**{**vars(batch), "arrays": {"audio": torch.randn(4, 5, 7)}})
    output, target = student(batch), torch.randn(4, 16)
    losses = objectives(output, {"t": Targets(target)}, batch)
    for name, expected in (("image", target), ("sound", target), ("text", target.repeat_interleave(2, 0))):
        loss = (output.pooled[name] - expected).square().mean()
        torch.testing.assert_close(losses[f"cls_regression_loss/{name}"], loss)
    Teacher.modality = "text"
    objectives = build_objectives(config, student, {"t": Teacher()})
    target = torch.randn(8, 16)
    losses = objectives(output, {"t": Targets(target)}, batch)
    loss = (output.pooled["sound"].repeat_interleave(2, 0) - target).square().mean()
    torch.testing.assert_close(losses["cls_regression_loss/sound"], loss)
