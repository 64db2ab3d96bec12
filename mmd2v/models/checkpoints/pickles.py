"""Reading ``torch.save`` files of others: tensors and plain data come out, nothing in the file is ever run.

torch's own reader is not used. Its unrestricted form calls what the file names, its restricted form refuses the
configuration objects that fairseq stores beside the weights, and both hand some files to TorchScript or to tar.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO, Any

from mmd2v.errors import UserError
from mmd2v.models.checkpoints.inert import Refused, StorageKind, plain
from mmd2v.models.checkpoints.machine import Machine
from mmd2v.models.checkpoints.storages import Storage, storage_bytes, typed

_ZIP = b"PK\x03\x04"
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the format before torch 1.6
_PROTOCOL = 1001
_COUNT_BYTES = 8  # of the number of elements before each storage of that format


def read_checkpoint(path: str | Path) -> Any:
    """Return what ``torch.save`` wrote to ``path``, tensors on the CPU, configuration objects as plain data.

    Raises UserError, naming the file, when it is missing, damaged or no such file, and naming the global too when its
    pickle asks for anything but tensors, plain containers and configuration objects.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a checkpoint of torch (.pt, .pth)")
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
            file.seek(0)
            return plain(_read_zip(file) if is_zip else _read_legacy(file, path.stat().st_size))
    except Refused as error:
        raise UserError(f"{path}: refused: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever bytes that nobody wrote with torch lead to
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: damaged, or no checkpoint of torch: {reason}") from error


def _read_zip(file: IO[bytes]) -> Any:
    """The format since torch 1.6: ``NAME/data.pkl``, ``NAME/data/KEY`` for each storage, nothing compressed."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(records) != len(archive.infolist()):
            raise ValueError(f"found {len(pickles)} records NAME/data.pkl in it, expected one and no name twice")
        folder = pickles[0].partition("/")[0]
        if f"{folder}/constants.pkl" in records:
            raise Refused("it is a TorchScript archive, which holds code. Expected a file of weights")
        # Records that overlap, or are compressed, would let a small file fill the memory.
        size = file.seek(0, io.SEEK_END)
        if sum(info.file_size for info in records.values()) > size:
            raise ValueError("its records claim more bytes than the file has")
        byteorder = f"{folder}/byteorder"
        if byteorder in records and archive.read(byteorder) != b"little":
            raise ValueError("it was written on a big-endian machine")
        memory: dict[str, bytearray] = {}

        def load_storage(pid: Any) -> Storage:
            kind, key, _, count = _storage_id(pid, 4)
            size = storage_bytes(kind.dtype, count)
            if key not in memory:
                info = records.get(f"{folder}/data/{key}")
                if (0 if info is None else info.file_size) != size:
                    raise ValueError(f"storage {key} has {info and info.file_size} bytes, expected {size}")
                memory[key] = bytearray(size)
                if info is not None:
                    _fill(archive, info, memory[key])
            elif len(memory[key]) != size:
                raise ValueError(f"storage {key} has {len(memory[key])} bytes, expected {size}")
            return typed(memory[key], kind.dtype)

        return Machine(io.BytesIO(archive.read(records[pickles[0]])), load_storage).load()


def _fill(archive: zipfile.ZipFile, info: zipfile.ZipInfo, memory: bytearray) -> None:
    with archive.open(info) as record:
        view, filled = memoryview(memory), 0
        while count := record.readinto(view[filled:]):
            filled += count
        record.read()  # at its end the checksum is compared
    if filled != len(memory):
        raise EOFError(f"{info.filename} ends early")


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """The format before torch 1.6: five pickles in a row, then the bytes of each storage."""
    if Machine(file).load() != _MAGIC:
        raise ValueError("its first bytes are neither a zip archive's nor torch's")
    if Machine(file).load() != _PROTOCOL or not Machine(file).load().get("little_endian"):
        raise ValueError(f"expected protocol {_PROTOCOL} from a little-endian machine")
    memory: dict[str, bytearray] = {}
    elements: dict[str, int] = {}
    left = size

    def load_storage(pid: Any) -> Storage:
        nonlocal left
        kind, key, _, count, view = _storage_id(pid, 5)
        wanted = storage_bytes(kind.dtype, count)
        if key not in memory:
            left -= wanted
            if left < 0:
                raise ValueError(f"storage {key} claims {wanted} bytes, more than the file has left")
            memory[key], elements[key] = bytearray(wanted), count
        elif len(memory[key]) != wanted:
            raise ValueError(f"storage {key} has {len(memory[key])} bytes, expected {wanted}")
        storage = typed(memory[key], kind.dtype)
        if view is None:
            return storage
        _, offset, length = view
        return storage.part(offset, length)

    result = Machine(file, load_storage).load()
    keys = Machine(file).load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(memory):
        raise ValueError("its list of storages is not the one its tensors use")
    for key in map(str, keys):
        count = int.from_bytes(file.read(_COUNT_BYTES), "little")
        if count != elements[key]:
            raise ValueError(f"storage {key} has {count} elements, expected {elements[key]}")
        if file.readinto(memory[key]) != len(memory[key]):  # type: ignore[attr-defined]
            raise EOFError("it ends within its storages")
    return result


def _storage_id(pid: Any, parts: int) -> tuple[Any, ...]:
    """Return (kind, key, location, elements, …) of a persistent id."""
    if not isinstance(pid, tuple) or len(pid) != parts + 1 or pid[0] not in ("storage", b"storage"):
        raise Refused("its pickle refers to something that is no storage")
    kind, key, *_ = rest = pid[1:]
    if not isinstance(kind, StorageKind) or not isinstance(key, (str, int)):
        raise Refused("its pickle refers to a storage of no known type")
    return (kind, str(key), *rest[2:])
