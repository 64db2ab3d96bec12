"""Looks at the places where shards are: manifests, listings and small files, local or remote."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from mmd2v.config.schema import SourceConfig
from mmd2v.data.addresses import PIPE, display, is_remote, join_address
from mmd2v.data.fetch import ask, describe, read_if_there, retrying
from mmd2v.data.manifest import MANIFEST_NAME, MOST_SAMPLES, ManifestEntry, is_natural, parse_manifest, read_manifest
from mmd2v.errors import UserError, disk_message

Result = TypeVar("Result")

SIZES_NAME = "sizes.json"  # of webdataset: shard name → samples
UNKNOWN = -1


class Places:
    """Asks each place once and remembers what it said."""

    def __init__(self, config: SourceConfig | None = None) -> None:
        self.config = config if config is not None else SourceConfig()
        self._manifests: dict[str, dict[str, ManifestEntry] | None] = {}

    def manifest(self, folder: str) -> dict[str, ManifestEntry] | None:
        """Shard name → what the ``shards.json`` of a folder tells; None without one.

        Raises:
            UserError: it is damaged or cannot be read.
        """
        if folder not in self._manifests:
            if folder.startswith(PIPE):
                self._manifests[folder] = None
            elif is_remote(folder):
                where = join_address(folder, MANIFEST_NAME)
                data = read_if_there(where, self.config)
                self._manifests[folder] = None if data is None else parse_manifest(data, display(where))
            else:
                self._manifests[folder] = read_manifest(folder) or None
        return self._manifests[folder]

    def counts(self, folder: str) -> dict[str, ManifestEntry]:
        """As `manifest`; without one, what a ``sizes.json`` tells, where bytes are `UNKNOWN`; without both, nothing."""
        known = self.manifest(folder)
        if known is None:
            known = self._manifests[folder] = self._sizes(folder)
        return known

    def _sizes(self, folder: str) -> dict[str, ManifestEntry]:
        if folder.startswith(PIPE):
            return {}
        path = join_address(folder, SIZES_NAME)
        if is_remote(path):
            data = read_if_there(path, self.config)
        else:
            try:
                with open(path, "rb") as handle:
                    data = handle.read()
            except FileNotFoundError:
                data = None
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if data is None:
            return {}
        try:
            record = json.loads(data)
            return {str(name): ManifestEntry(_natural(count), UNKNOWN) for name, count in record.items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{display(path)}: expected a JSON object of shard name → samples, as webdataset writes it; "
                "delete it to scan the shards"
            ) from None

    # What `mmd2v.data.addresses.Listing` asks for.

    def manifest_names(self, folder: str) -> list[str] | None:
        """Shards that the manifest of a folder lists; None without one."""
        known = self.manifest(folder)
        return None if known is None else list(known)

    def file_names(self, folder: str) -> list[str]:
        """Names of the files in a remote folder.

        Raises:
            UserError: it cannot be listed.
        """

        def listing(system: Any, path: str) -> list[str]:
            try:
                return [str(entry).rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=False)]
            except NotImplementedError:
                raise UserError("this file system cannot list folders") from None

        return self._look(listing, folder, f"no {MANIFEST_NAME} in it, and it cannot be listed")

    def matches(self, pattern: str) -> list[str]:
        """Addresses that match a pattern with ``*``."""

        def listing(system: Any, path: str) -> list[str]:
            return [system.unstrip_protocol(entry) for entry in system.glob(path)]

        return self._look(listing, pattern, "cannot be listed")

    def text(self, address: str) -> str:
        """Content of a small local or remote file; raises a UserError when there is none."""
        if is_remote(address):
            data = read_if_there(address, self.config)
            if data is None:
                raise UserError(f"shards: {display(address)}: there is no such file")
        else:
            try:
                with open(address, "rb") as handle:
                    data = handle.read()
            except OSError as error:
                raise UserError(f"shards: {address} cannot be read: {disk_message(error)}") from None
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(
                f"shards: {display(address)} is not UTF-8, expected a text file with a shard a line"
            ) from None

    def _look(self, question: Callable[[Any, str], Result], address: str, otherwise: str) -> Result:
        stop = threading.Event()
        try:
            return retrying(lambda: ask(address, self.config, stop, question), address, self.config, stop)
        except UserError as error:
            cause = error.__cause__
            reason = describe(cause, self.config.timeout) if cause is not None else str(error)
            raise UserError(f"shards: {display(address)}: {otherwise}: {reason}") from None


def _natural(value: Any) -> int:
    if not is_natural(value, MOST_SAMPLES):
        raise ValueError(value)
    return value
