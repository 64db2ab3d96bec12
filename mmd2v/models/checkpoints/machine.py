"""A pickle machine that builds tensors, plain containers and inert holders, and nothing else.

It is CPython's own machine in Python with the few operations replaced that call something, import something or touch an
object whose type the file decides; all others that we do not know are refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any

import torch

from mmd2v.models.checkpoints.inert import Builder, Inert, InertType, NumpyArray, NumpyDType, Refused, is_key, shown
from mmd2v.models.checkpoints.names import find

_SAFE = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 LIST EMPTY_LIST EMPTY_DICT EMPTY_SET PUT BINPUT LONG_BINPUT "
    "MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"
)
"""Operations that only move plain values, or end in ``find_class`` and ``persistent_load``."""


class _Operations(dict[int, Callable[["Machine"], None]]):
    def __missing__(self, code: int) -> Callable[[Machine], None]:
        raise pickle.UnpicklingError(f"found operation {bytes([code])!r}, which no pickle of weights has")


class Machine(pickle._Unpickler):  # type: ignore[misc,name-defined]
    """Reads one pickle from ``file``; ``load_storage`` answers what torch calls persistent ids."""

    dispatch = _Operations()

    def __init__(self, file: IO[bytes], load_storage: Callable[[Any], Any] | None = None) -> None:
        super().__init__(file, encoding="utf-8")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for ``module.name``."""
        return find(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that ``pid`` names."""
        if self._load_storage is None:
            raise Refused("its pickle refers to storages where there are none")
        return self._load_storage(pid)

    def reduce(self) -> None:
        """REDUCE: a call. Only functions of ours are called, holders are filled."""
        args = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], args)

    def new_object(self) -> None:
        """NEWOBJ: ``cls.__new__(cls, *args)``, for holders alone."""
        args = self.stack.pop()
        self.stack[-1] = _instance(self.stack[-1], args)

    def new_object_ex(self) -> None:
        """NEWOBJ_EX: the same with keyword arguments."""
        keywords, args = self.stack.pop(), self.stack.pop()
        holder = self.stack[-1] = _instance(self.stack[-1], args)
        holder.set_state(keywords)

    def instance(self) -> None:
        """INST: the call of protocol 0."""
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(_instance(self.find_class(module, name), tuple(self.pop_mark())))

    def build(self) -> None:
        """BUILD: attributes of the object below."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, (Inert, NumpyArray)):
            target.set_state(state)
        elif isinstance(target, NumpyDType):
            order = state[1]
            if order not in ("<", ">", "=", "|"):
                raise ValueError("a numpy dtype has an order that is none")
            target.order = order
        elif not isinstance(target, (dict, torch.Tensor)):  # theirs (torch's versions of modules) are left out
            raise Refused(f"its pickle sets attributes of a {type(target).__name__}")

    def put_item(self) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        _items(self.stack[-1], [key, value])

    def put_items(self) -> None:
        """SETITEMS."""
        items = self.pop_mark()
        _items(self.stack[-1], items)

    def make_dict(self) -> None:
        """DICT: of the items above the mark."""
        items = self.pop_mark()
        self.append({})
        _items(self.stack[-1], items)

    def add(self) -> None:
        """APPEND."""
        value = self.stack.pop()
        _list(self.stack[-1]).append(value)

    def add_all(self) -> None:
        """APPENDS."""
        values = self.pop_mark()
        _list(self.stack[-1]).extend(values)

    def add_to_set(self) -> None:
        """ADDITEMS."""
        values = self.pop_mark()
        if not isinstance(self.stack[-1], set) or not all(map(is_key, values)):
            raise Refused("its pickle adds what is no plain value to a set")
        self.stack[-1].update(values)

    def make_frozen_set(self) -> None:
        """FROZENSET."""
        values = self.pop_mark()
        if not all(map(is_key, values)):
            raise Refused("its pickle adds what is no plain value to a set")
        self.append(set(values))


def _call(function: Any, args: Any) -> Any:
    if not isinstance(args, tuple):
        raise Refused("its pickle calls with arguments that are no tuple")
    return function.build(*args) if isinstance(function, Builder) else _instance(function, args)


def _instance(kind: Any, args: Any) -> Inert:
    if not isinstance(kind, InertType) or not isinstance(args, tuple):
        raise Refused(f"its pickle calls '{shown(getattr(kind, 'name', type(kind).__name__))}'")
    return Inert(kind, args)


def _items(target: Any, items: list[Any]) -> None:
    if isinstance(target, Inert):
        target = target.state  # a class derived from dict
    if not isinstance(target, dict):
        raise Refused(f"its pickle sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not is_key(key):
            raise Refused(f"its pickle has a {type(key).__name__} as a key")
        target[key] = value


def _list(target: Any) -> list[Any]:
    if not isinstance(target, list):
        raise Refused(f"its pickle appends to a {type(target).__name__}")
    return target


Machine.dispatch.update(
    {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _SAFE.split())}
)
Machine.dispatch.update(
    {
        pickle.REDUCE[0]: Machine.reduce,
        pickle.NEWOBJ[0]: Machine.new_object,
        pickle.NEWOBJ_EX[0]: Machine.new_object_ex,
        pickle.INST[0]: Machine.instance,
        pickle.BUILD[0]: Machine.build,
        pickle.SETITEM[0]: Machine.put_item,
        pickle.SETITEMS[0]: Machine.put_items,
        pickle.DICT[0]: Machine.make_dict,
        pickle.APPEND[0]: Machine.add,
        pickle.APPENDS[0]: Machine.add_all,
        pickle.ADDITEMS[0]: Machine.add_to_set,
        pickle.FROZENSET[0]: Machine.make_frozen_set,
    }
)
