"""What a pickle may name.

Nothing is ever imported or called because a file says so: a name that a file gives is looked up in a table, and what
the table does not hold is refused. Names of configuration classes get a holder that keeps what was put in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmd2v.models.checkpoints.inert import (
    MOST_SHOWN,
    Builder,
    InertType,
    Marker,
    NumpyArray,
    NumpyDType,
    Refused,
    StorageKind,
    is_key,
    shown,
)
from mmd2v.models.checkpoints.storages import Storage

_CONFIG_PACKAGES = ("omegaconf", "fairseq", "examples.data2vec")
"""Whose classes become holders: what fairseq writes beside the weights."""
_MARKER_MODULES = ("typing", "enum")
_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9_]*", re.ASCII)
"""Functions of those packages, and names with a dot that would reach into a module, are no configuration."""


def find(module: str, name: str) -> Any:
    """Return what stands for ``module.name``. Raises Refused for all that no checkpoint needs."""
    module = _PYTHON_2.get(module, module)
    if (module, name) in _NAMES:
        return _NAMES[module, name]
    if _CLASS_NAME.fullmatch(name):
        if any(module == package or module.startswith(f"{package}.") for package in _CONFIG_PACKAGES):
            return InertType(f"{module}.{name}")
        if module in _MARKER_MODULES:
            return Marker(f"{module}.{name}")
    raise Refused(
        f"it names '{shown(f'{module}.{name}')}', which no weights need (nothing of the file was run); expected "
        "tensors, plain containers and configuration objects of argparse, omegaconf and fairseq"
    )


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, (list, tuple)) or not all(is_key(key) for key, _ in pairs):
        raise Refused("it builds a dict from something that is no list of pairs")
    return {key: value for key, value in pairs}  # noqa: C416 - dict() would also take a mapping's own methods


def _default_dict(factory: Any = None, *pairs: Any) -> dict[Any, Any]:
    return _ordered_dict(*pairs)


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, (list, tuple)) or not all(map(is_key, items)):
        raise Refused("it builds a set from something that is no list of plain values")
    return set(items)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"it encodes text as '{shown(encoding)}', expected latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _complex(real: float, imaginary: float) -> complex:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise Refused("it builds a complex number from something that is no number")
    return complex(real, imaginary)


def _none_type(value: Any) -> Marker:
    if value is not None:
        raise Refused("it asks for the type of an object")
    return Marker("NoneType")


def _annotation(origin: Any, arguments: Any) -> Marker:
    """``List[int]`` and its like, which is how a typing annotation is pickled."""
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    if not all(isinstance(part, (Marker, InertType, Builder)) for part in (origin, *arguments)):
        raise Refused("it takes an item of an object")
    return Marker(f"{origin.name}[{', '.join(part.name for part in arguments)}]"[:MOST_SHOWN])


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise Refused("it builds a path from something that is no text")
    return "/".join(parts).replace("//", "/")


def _device(*parts: Any) -> str:
    return ":".join(str(part) for part in parts if isinstance(part, (str, int)))


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, (list, tuple)):
        raise Refused("it builds a shape from something that is no list")
    return tuple(sizes)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *ignored: Any) -> torch.Tensor:
    """``ignored``: whether it has a gradient, hooks, metadata."""
    if not isinstance(storage, Storage):
        raise Refused("it builds a tensor from something that is no storage")
    return storage.tensor(offset, size, stride)


def _typed_tensor(storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise Refused("it builds a tensor from something that is no storage")
    return Storage(storage.flat.view(torch.uint8).view(dtype)).tensor(offset, size, stride)


def _parameter(data: Any, *ignored: Any) -> torch.Tensor:
    """``ignored``: whether it has a gradient, hooks, attributes (fairseq keeps its learning rates there)."""
    if not isinstance(data, torch.Tensor):
        raise Refused("it builds a parameter from something that is no tensor")
    return data


def _subclass(rebuild: Any, kind: Any, args: Any, *ignored: Any) -> torch.Tensor:
    """A tensor with attributes; they are left out."""
    if not isinstance(rebuild, Builder) or rebuild.build not in (_tensor, _typed_tensor, _parameter):
        raise Refused("it builds a tensor with something that builds no tensor")
    return rebuild.build(*args)


def _numpy_dtype(code: Any, *ignored: Any) -> NumpyDType:
    if not isinstance(code, str) or not re.fullmatch(r"[biufcSU][0-9]{1,6}", code, re.ASCII):
        raise Refused(f"it holds a numpy array of '{shown(code)}', expected numbers or text")
    return NumpyDType(code)


def _dtype(value: Any) -> np.dtype:
    if not isinstance(value, NumpyDType):
        raise Refused("it builds a numpy value from something that is no dtype")
    return value.dtype()


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(data, _dtype(dtype), count=1)[0].item()


def _numpy_array(*ignored: Any) -> NumpyArray:
    return NumpyArray()


_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _set,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "complex"): _complex,
    ("builtins", "type"): _none_type,
    ("_codecs", "encode"): _encode,
    ("_operator", "getitem"): _annotation,
    ("operator", "getitem"): _annotation,
    ("torch", "device"): _device,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    ("numpy", "dtype"): _numpy_dtype,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _BUILDERS[_module, "scalar"] = _numpy_scalar
    _BUILDERS[_module, "_reconstruct"] = _numpy_array
for _module in ("pathlib", "pathlib._local"):
    for _name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"):
        _BUILDERS[_module, _name] = _path
_MARKERS = (
    *(
        ("builtins", name)
        for name in ("object", "dict", "list", "tuple", "str", "unicode", "int", "long", "float", "bool")
    ),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("numpy", "ndarray"),
)
_NAMES: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): InertType("argparse.Namespace"),
    **{key: Builder(".".join(key), build) for key, build in _BUILDERS.items()},
    **{key: Marker(".".join(key)) for key in _MARKERS},
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    **{(m, name): StorageKind(d) for m in ("torch", "torch.cuda", "torch.storage") for name, d in _STORAGES.items()},
}
"""(module, name) → what stands for it."""
