"""The lifeless things that stand for types, functions and objects a pickle names, and plain data made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmd2v.models.checkpoints.storages import Storage

SCALARS = (str, bytes, int, float, complex, bool, type(None))
MOST_SHOWN = 120  # characters of a name that a file gives


class Refused(Exception):
    """A pickle asks for something that no checkpoint needs."""


@dataclass(frozen=True)
class Marker:
    """A type or function that a file names as a value; it cannot be called."""

    name: str


@dataclass(frozen=True)
class InertType:
    """A configuration class that is not imported."""

    name: str


@dataclass(frozen=True)
class Builder:
    """A name that a file may call, and the function of ours that is called instead."""

    name: str
    build: Callable[..., Any]


@dataclass(frozen=True)
class StorageKind:
    """A storage class of torch: only its element type matters."""

    dtype: torch.dtype


@dataclass(eq=False)
class Inert:
    """An object of a class that is not imported: its arguments and its attributes."""

    type: InertType
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)

    def set_state(self, state: Any) -> None:
        """Keep the attributes a pickle gives; those of ``__slots__`` come as a second dict."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)
            elif part is not None:
                raise ValueError(f"attributes of {self.type.name} are no dict")


@dataclass(eq=False)
class NumpyDType:
    """A numpy dtype while it is being read."""

    code: str
    order: str = "="

    def dtype(self) -> np.dtype:
        """Return the real one."""
        return np.dtype(self.code).newbyteorder(self.order)


@dataclass(eq=False)
class NumpyArray:
    """A numpy array while it is being read."""

    value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        """Fill it from (version, shape, dtype, Fortran order, bytes)."""
        _, shape, dtype, fortran, data = state
        order = "F" if fortran else "C"
        if not isinstance(dtype, NumpyDType):
            raise ValueError("a numpy array has a dtype that is none")
        self.value = np.frombuffer(data, dtype.dtype()).reshape(shape, order=order).copy()


def shown(name: object) -> str:
    """Return a name that a file gives in a form that is fit for a message: printable and not long."""
    text = "".join(c if c.isprintable() else "?" for c in str(name)[: MOST_SHOWN + 1])
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def is_key(value: Any) -> bool:
    """Whether ``value`` may be a key: hashing nested tuples can take for ever, tensors and lists have no hash."""
    if isinstance(value, tuple):
        return all(isinstance(item, SCALARS) for item in value)
    return isinstance(value, (*SCALARS, Inert, Marker, InertType))


def plain(value: Any) -> Any:
    """Return ``value`` with every holder as a dict, a list, text or the one value it holds. Tensors stay.

    omegaconf's containers and nodes become their contents, enumerations their value, a type its name.
    """
    return _plain(value, {})


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """``done`` maps identities: a file may hold the same object often, nested doubling would never end."""
    if id(value) in done:
        return done[id(value)]
    result: Any
    if isinstance(value, dict):
        result = done[id(value)] = {}  # known before it is filled: it may contain itself
        result.update({_plain_key(key, done): _plain(item, done) for key, item in value.items()})
    elif isinstance(value, list):
        result = done[id(value)] = []
        result.extend(_plain(item, done) for item in value)
    elif isinstance(value, tuple):
        result = done[id(value)] = tuple(_plain(item, done) for item in value)
    elif isinstance(value, set):
        result = done[id(value)] = {_plain_key(item, done) for item in value}
    elif isinstance(value, Inert):
        result = done[id(value)] = _plain_object(value, done)
    elif isinstance(value, (Marker, InertType, Builder)):
        result = value.name
    elif isinstance(value, StorageKind):
        result = str(value.dtype)
    elif isinstance(value, NumpyArray):
        result = value.value
    elif isinstance(value, NumpyDType):
        result = value.code
    elif isinstance(value, Storage):
        result = value.flat
    else:
        result = value
    return result


def _plain_key(key: Any, done: dict[int, Any]) -> Any:
    value = _plain(key, done)
    return value if isinstance(value, (*SCALARS, tuple)) and is_key(value) else shown(value)


def _plain_object(value: Inert, done: dict[int, Any]) -> Any:
    if value.type.name.startswith("omegaconf."):
        # The rest of their attributes is bookkeeping: parents, flags, annotations.
        for attribute in ("_content", "_val"):
            if attribute in value.state:
                return _plain(value.state[attribute], done)
    if value.state or not value.args:
        return _plain(value.state, done)
    return _plain(value.args[0] if len(value.args) == 1 else list(value.args), done)
