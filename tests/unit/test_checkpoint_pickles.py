"""Foreign checkpoint files: what torch wrote comes back, nothing a file asks for is run, damage is named."""

import argparse
import io
import json
import os
import pathlib
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from mmd2v.errors import UserError
from mmd2v.models.checkpoints.pickles import read_checkpoint

VIEWS = torch.arange(12.0).view(3, 4)
CONTENT = {
    "model": OrderedDict(
        whole=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        half=torch.ones(2, dtype=torch.float16),
        brain=torch.full((2, 2), 0.5, dtype=torch.bfloat16),
        ids=torch.tensor([1, -2]),
        flags=torch.tensor([True, False]),
        scalar=torch.tensor(3.5),
        nothing=torch.empty(0, 4),
        transposed=VIEWS.t(),
        column=VIEWS[:, 1],
        parameter=torch.nn.Parameter(torch.ones(2)),
    ),
    "args": argparse.Namespace(num_heads=4, path=pathlib.PurePosixPath("/a/b"), nested={"x": (1, 2.5, None, True)}),
    "sets": {"names": {"a", "b"}, "bytes": b"\x00\xff", "empty": b"", "complex": 1 + 2j, "long": 1 << 70},
    "default": defaultdict(list, {"a": [1]}),
    "numpy": {"scalar": np.float64(0.25), "int": np.int32(7), "array": np.arange(6, dtype=np.int16).reshape(2, 3)},
    "size": torch.Size([2, 3]),
    "dtype": torch.float16,
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Hostile files try to leave ./pwned."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves_comes_back(tmp_path, zipped, protocol):
    path = tmp_path / "c.pt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = read_checkpoint(path)
    expected = torch.load(path, weights_only=False)
    assert found["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value) and found["model"][name].dtype == value.dtype, name
    assert found["args"] == {"num_heads": 4, "path": "/a/b", "nested": {"x": (1, 2.5, None, True)}}
    assert found["sets"] == CONTENT["sets"]
    assert found["default"] == {"a": [1]}
    assert found["numpy"]["scalar"] == 0.25 and found["numpy"]["int"] == 7
    assert np.array_equal(found["numpy"]["array"], CONTENT["numpy"]["array"])
    assert found["size"] == (2, 3) and found["dtype"] == torch.float16


def test_tensors_that_share_memory_still_do(tmp_path):
    torch.save({"a": VIEWS, "b": VIEWS[1]}, tmp_path / "c.pt")
    found = read_checkpoint(tmp_path / "c.pt")
    found["b"].zero_()
    assert found["a"][1].abs().sum() == 0


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def write_zip(path: pathlib.Path, body: bytes, **records: bytes) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", b"\x80\x04" + body + b".")
        for name, data in records.items():
            archive.writestr(f"c/{name.replace('__', '/')}", data)
    return path


CALL_PWNED = text("touch pwned") + b"\x85R"
REDUCES = {
    "posix.system": global_("posix", "system") + CALL_PWNED,
    "nt.system": global_("nt", "system") + CALL_PWNED,
    "os.system": stack_global("os", "system") + CALL_PWNED,
    "subprocess.Popen": global_("subprocess", "Popen") + CALL_PWNED,
    "builtins.eval": global_("__builtin__", "eval") + text("open('pwned', 'w')") + b"\x85R",
    "builtins.getattr": global_("builtins", "getattr") + stack_global("argparse", "Namespace") + text("x") + b"\x86R",
    "builtins.__import__": global_("builtins", "__import__") + text("os") + b"\x85R",
    "builtins.bytearray": global_("builtins", "bytearray") + b"J\xff\xff\xff\x7f\x85R",
    "torch.hub.load": global_("torch.hub", "load") + text("x") + b"\x85R",
    "torch.load": global_("torch", "load") + text("c.pt") + b"\x85R",
    "torch.storage._load_from_bytes": global_("torch.storage", "_load_from_bytes") + b"C\x01a\x85R",
    "torch._utils._import_dotted_name": global_("torch._utils", "_import_dotted_name") + text("os.system") + b"\x85R",
    "torch.ops": global_("torch", "ops"),
    "functools.partial": global_("functools", "partial") + stack_global("argparse", "Namespace") + b"\x85R",
    "operator.attrgetter": global_("operator", "attrgetter") + text("x") + b"\x85R",
    "operator.methodcaller": global_("_operator", "methodcaller") + text("x") + b"\x85R",
    "numpy.load": global_("numpy", "load") + text("x.npy") + b"\x85R",
    "numpy.testing._private.utils.runstring": global_("numpy.testing._private.utils", "runstring")
    + text("x")
    + b"\x85R",
    "argparse.__builtins__": global_("argparse", "__builtins__"),
    "argparse.FileType": global_("argparse", "FileType") + text("w") + b"\x85R" + text("pwned") + b"\x85R",
    "argparse.Namespace.__init__.__globals__": stack_global("argparse", "Namespace.__init__.__globals__"),
    "fairseq.utils.import_user_module": global_("fairseq.utils", "import_user_module") + b"}\x85R",
    "fairseq.file_utils.os.system": stack_global("fairseq.file_utils", "os.system") + CALL_PWNED,
    "omegaconf.omegaconf.OmegaConf.load": stack_global("omegaconf.omegaconf", "OmegaConf.load") + text("x") + b"\x85R",
    "fairseqx.Thing": global_("fairseqx", "Thing"),
    "pathlib.os": global_("pathlib", "os"),
    "typing.sys": global_("typing", "sys"),
    "enum._make_class_unpicklable": global_("enum", "_make_class_unpicklable"),
    "collections.namedtuple": global_("collections", "namedtuple") + text("x") + text("y") + b"\x86R",
    "copyreg._reconstructor": global_("copy_reg", "_reconstructor") + b")R",
    "codecs.open": global_("codecs", "open") + text("pwned") + text("w") + b"\x86R",
    "types.FunctionType": global_("types", "FunctionType") + b")R",
    "pickle.loads": global_("pickle", "loads") + b"C\x01.\x85R",
}


@pytest.mark.parametrize("name", REDUCES)
def test_any_other_global_is_refused_by_name(tmp_path, name):
    body = REDUCES[name]
    name = name.replace("operator.methodcaller", "_operator.methodcaller")
    path = write_zip(tmp_path / "c.pt", body)
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and f"'{name}'" in str(caught.value)
    bare = tmp_path / "bare.pt"  # in the place of the magic number of the old format
    bare.write_bytes(b"\x80\x04" + body + b".")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_checkpoint(bare)


NAMESPACE, ORDERED = global_("argparse", "Namespace"), global_("collections", "OrderedDict")
REBUILD = global_("torch._utils", "_rebuild_tensor_v2")
FLOATS = global_("torch", "FloatStorage")
TRICKS = {
    "call of what is no function": text("x") + b")R",
    "call of a type": global_("__builtin__", "dict") + b")R",
    "call of an object": NAMESPACE + b")\x81)R",
    "object of a function": REBUILD + b")\x81",
    "attributes of a function": REBUILD + b"}" + text("__call__") + NAMESPACE + b"sb",
    "attributes of a type": NAMESPACE + b"}" + text("__reduce__") + text("x") + b"sb",
    "attributes of text": text("x") + b"}b",
    "attributes that are no dict": NAMESPACE + b")\x81" + text("x") + b"b",
    "OrderedDict of an object": ORDERED + NAMESPACE + b")\x81\x85R",
    "OrderedDict of pairs that are none": ORDERED + b"](" + text("abc") + b"e\x85R",
    "items of text": text("x") + text("k") + text("v") + b"s",
    "append to text": text("x") + text("y") + b"a",
    "append to an object": NAMESPACE + b")\x81" + text("y") + b"a",
    "list as a key": b"}]" + text("v") + b"s",
    "nested tuples as a key": b"})" + b"2\x86" * 60 + text("v") + b"s",
    "type of an object": global_("builtins", "type") + text("x") + b"\x85R",
    "a class made": global_("builtins", "type") + text("x") + b")}\x87R",
    "item of an object": global_("_operator", "getitem") + b"]K\x00\x86R",
    "tensor of no storage": REBUILD + b"(]K\x00)))t" + b"R",
    "tensor by another function": global_("torch._tensor", "_rebuild_from_type_v2")
    + b"("
    + global_("collections", "OrderedDict")
    + NAMESPACE
    + b")}tR",
    "numpy objects": global_("numpy", "dtype") + text("O8") + b"\x89\x88\x87R",
    "numpy scalar of text": global_("numpy.core.multiarray", "scalar") + text("f8") + b"C\x01a\x86R",
    "array that is none": global_("numpy.core.multiarray", "_reconstruct")
    + b")R(K\x01)"
    + text("f8")
    + b"\x89C\x01atb",
    "encoding by a codec": global_("_codecs", "encode") + text("x") + text("zlib") + b"\x86R",
    "path of objects": global_("pathlib", "PosixPath") + b"]\x85R",
    "persistent id that is text": text("0") + b"Q",
    "persistent id in text": b"Pstorage\n",
    "persistent id of a module": b"(" + text("module") + NAMESPACE + text("f") + text("source") + b"tQ",
    "persistent id too short": b"(" + text("storage") + FLOATS + b"tQ",
    "storage of a class": b"(" + text("storage") + NAMESPACE + text("0") + text("cpu") + b"K\x01tQ",
    "storage named by a list": b"(" + text("storage") + FLOATS + b"]" + text("cpu") + b"K\x01tQ",
    "storage that is missing": b"(" + text("storage") + FLOATS + text("9") + text("cpu") + b"K\x01tQ",
    "storage elsewhere": b"(" + text("storage") + FLOATS + text("../data.pkl") + text("cpu") + b"K\x01tQ",
    "storage of negative length": b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"J\xff\xff\xff\xfftQ",
    "storage too long": b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"J\xff\xff\xff\x7ftQ",
    "storage too short": b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"K\x01tQ",
    "extension code": b"\x82\x01",
    "extension code, two bytes": b"\x83\x01\x00",
    "out-of-band buffer": b"\x97",
    "memo that is not there": b"h\x05",
    "empty stack": b"R",
    "text that ends early": b"X\xff\xff\xff\x7fab",
    "bytes of any length": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "a frame of any length": b"\x95" + b"\xff" * 7 + b"\x7f",
    "protocol that does not exist": b"\x80\x63",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_with_what_may_be_named_are_refused(tmp_path, trick):
    path = write_zip(tmp_path / "c.pt", TRICKS[trick], data__0=b"\0" * 8)
    with pytest.raises(UserError, match=r"c\.pt"):
        read_checkpoint(path)


def test_an_extension_registered_by_somebody_is_refused(tmp_path):
    import copyreg

    copyreg.add_extension("os", "system", 240)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")  # fills the cache that is asked before any name is looked up
        path = write_zip(tmp_path / "c.pt", b"\x82\xf0" + CALL_PWNED)
        with pytest.raises(UserError, match="operation"):
            read_checkpoint(path)
    finally:
        copyreg.remove_extension("os", "system", 240)


def tensor_of(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    storage = b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"K\x02tQ"
    rest = b"\x8a\x08" + struct.pack("<q", offset) + numbers(size) + numbers(stride) + b"\x89)"
    return REBUILD + b"(" + storage + rest + b"tR"


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (3,), (1,)), (1, (2,), (1,)), (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (1 << 40,), (0,)), (0, (1,), (1, 1))],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, offset, size, stride):
    path = write_zip(tmp_path / "c.pt", tensor_of(offset, size, stride), data__0=b"\0" * 8)
    with pytest.raises(UserError, match="tensor"):
        read_checkpoint(path)


def test_the_tensor_builder_of_these_tests_builds_one(tmp_path):
    data = struct.pack("<2f", 1.0, 2.0)
    found = read_checkpoint(write_zip(tmp_path / "c.pt", tensor_of(1, (1,), (1,)), data__0=data))
    assert found.tolist() == [2.0]


def test_configuration_objects_become_plain_data(tmp_path):
    modality = global_("examples.data2vec.data.modality", "Modality") + b"K\x02\x85R"
    node = global_("omegaconf.nodes", "IntegerNode") + b")\x81}" + text("_val") + b"K\x07sb"
    listed = (
        global_("omegaconf.listconfig", "ListConfig") + b")\x81}" + text("_content") + b"](" + node + modality + b"esb"
    )
    hint = global_("_operator", "getitem") + global_("typing", "List") + global_("__builtin__", "int") + b"\x86R"
    slots = global_("fairseq.data.x", "Slots") + b")\x81N}" + text("a") + b"K\x01s\x86b"
    children = text("list") + listed + text("hint") + hint + text("slots") + slots
    content = (
        global_("omegaconf.dictconfig", "DictConfig")
        + b")\x81}("
        + (
            text("_metadata")
            + NAMESPACE
            + b")\x81"
            + text("_parent")
            + b"N"
            + text("_content")
            + b"}("
            + children
            + b"u"
        )
        + b"ub"
    )
    found = read_checkpoint(write_zip(tmp_path / "c.pt", content))
    assert found == {"list": [7, 2], "hint": "typing.List[builtins.int]", "slots": {"a": 1}}


def test_objects_that_contain_themselves_or_double_end(tmp_path):
    path = write_zip(tmp_path / "c.pt", b"]q\x00h\x00a")
    found = read_checkpoint(path)
    assert found[0] is found
    doubled = write_zip(tmp_path / "d.pt", b"]" + b"q\x00](h\x00h\x00e" * 80)
    assert len(read_checkpoint(doubled)) == 2
    deep = write_zip(tmp_path / "e.pt", b"]" * 20000 + b"a" * 19999)
    with pytest.raises(UserError, match="recursion"):
        read_checkpoint(deep)
    own = write_zip(
        tmp_path / "f.pt", global_("omegaconf.nodes", "AnyNode") + b")\x81q\x00}" + text("_val") + b"h\x00sb"
    )
    with pytest.raises(UserError, match="recursion"):
        read_checkpoint(own)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_is_named(tmp_path, zipped):
    whole = io.BytesIO()
    content = {"a": torch.arange(40.0), "b": argparse.Namespace(x=1)}
    torch.save(content, whole, _use_new_zipfile_serialization=zipped)
    data = whole.getvalue()
    path = tmp_path / "c.pt"
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"c\.pt"):
            read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_changed_bytes_lead_to_no_other_error(tmp_path, zipped):
    whole = io.BytesIO()
    content = {"a": torch.arange(40.0), "b": argparse.Namespace(x=1), "c": np.float32(1)}
    torch.save(content, whole, _use_new_zipfile_serialization=zipped)
    data = bytearray(whole.getvalue())
    path = tmp_path / "c.pt"
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(data), 300):
        changed = data.copy()
        changed[position] ^= int(generator.integers(1, 256))
        path.write_bytes(changed)
        try:
            read_checkpoint(path)
        except UserError as error:
            assert "c.pt" in str(error)


def test_a_changed_weight_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"a": torch.full((1000,), 1.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<8f", *[1.0] * 8)) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="CRC"):
        read_checkpoint(path)


def test_archives_of_another_kind(tmp_path):
    path = write_zip(tmp_path / "script.pt", b"}", **{"constants.pkl": b""})
    with pytest.raises(UserError, match="TorchScript"):
        read_checkpoint(path)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", b"\x80\x02N.")
        archive.writestr("c/data/0", b"\0" * 10_000_000)
    with pytest.raises(UserError, match="more bytes than the file has"):
        read_checkpoint(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as archive:
        archive.writestr("c/data.pkl", b"\x80\x02N.")
        archive.writestr("d/data.pkl", b"\x80\x02N.")
    with pytest.raises(UserError, match="found 2 records"):
        read_checkpoint(tmp_path / "two.pt")
    write_zip(tmp_path / "big.pt", b"N", byteorder=b"big")
    with pytest.raises(UserError, match="big-endian"):
        read_checkpoint(tmp_path / "big.pt")


def test_other_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "none.pt")
    for data in (b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", pickle.dumps({"a": 1})):
        (tmp_path / "c.pt").write_bytes(data)
        with pytest.raises(UserError, match=r"c\.pt: damaged, or no checkpoint of torch"):
            read_checkpoint(tmp_path / "c.pt")


def test_an_old_file_may_not_claim_more_than_it_has(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "c.pt").read_bytes()
    huge = data.replace(b"K\x04N", b"J\xff\xff\xff\x7fN", 1).replace(b"K\x04q", b"J\xff\xff\xff\x7fq", 1)
    assert huge != data
    (tmp_path / "c.pt").write_bytes(huge)
    with pytest.raises(UserError, match=r"c\.pt"):
        read_checkpoint(tmp_path / "c.pt")


def test_the_published_hostile_files(shared, tmp_path):
    folder = shared / "golden" / "malicious"
    for name in json.loads((folder / "malicious.json").read_text())["files"]:
        with pytest.raises(UserError, match=rf"{name}: refused: it names '(io\.open|builtins\.exec|posix\.system)'"):
            read_checkpoint(folder / name)
    assert not os.listdir(tmp_path)
