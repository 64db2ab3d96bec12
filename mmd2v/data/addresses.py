"""Which shards a specification names: local files and folders, and addresses of any file system.

An address is ``PROTOCOL://…`` of a file system that fsspec knows, or ``pipe:COMMAND``, whose output is the shard.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from typing import Literal, Protocol

import braceexpand

from mmd2v.errors import UserError, nearest

PIPE = "pipe:"
_CONTAINER_FIRST = ("abfs", "abfss")  # CONTAINER@ACCOUNT: no user
_LOCAL = ("file", "local", "git", "pipe")  # protocols that read this machine's files, or run commands
_URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+")
_TAR_NAME = re.compile(r"[\w.{}-]+\.(tar|tgz)(\.\w+)?")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Listing(Protocol):
    """What expansion asks of the places where shards are."""

    def manifest_names(self, folder: str) -> list[str] | None:
        """Shards that the manifest of a folder lists; None without one."""

    def file_names(self, folder: str) -> list[str]:
        """Names of the files in a remote folder; raises a UserError where it cannot be listed."""

    def matches(self, pattern: str) -> list[str]:
        """Addresses that match a pattern with ``*``."""

    def text(self, address: str) -> str:
        """Content of a small local or remote file; raises a UserError when there is none."""


def is_remote(address: str) -> bool:
    """Whether an item of a specification is an address and no local path."""
    return "://" in address or address.startswith(PIPE)


def display(address: str) -> str:
    """Write an address without the secrets it may hold: user, password and the query of a signed link.

    Of a command, its program and the shard it names: any other argument may be a token.
    """
    if address.startswith(PIPE):
        return PIPE + display_command(address.removeprefix(PIPE).split())
    plain = without_secrets(address)
    return plain + ("?…" if plain != address and "?" in address else "")


def display_command(words: Sequence[str]) -> str:
    """The program and the last word that is the name of a tar, without its folder."""
    names = [without_secrets(word.strip("'\"")).rpartition("/")[2] for word in words[1:]]
    tars = [name for name in names if _TAR_NAME.fullmatch(name)]
    return " … ".join([*words[:1], *tars[-1:]]) if tars or len(words) < 2 else f"{words[0]} …"


def redacted(text: str) -> str:
    """Show the addresses inside a message as `display` does."""
    return _URL.sub(lambda match: display(match[0]), text)


def without_secrets(address: str) -> str:
    """An address without user, password and query: the same however often a link is signed anew.

    Commands and local paths stay as they are.
    """
    if address.startswith(PIPE) or "://" not in address:
        return address
    return "::".join(map(_bare, address.split("::")))


def _bare(part: str) -> str:
    """One link of a chain of addresses (``zip://FILE::https://…``) without its secrets."""
    scheme, mark, rest = part.partition("://")
    if not mark:
        return part
    rest = rest.partition("?")[0]
    if scheme in ("http", "https"):
        rest = rest.partition("#")[0]
    host, slash, path = rest.partition("/")
    user, _, server = host.rpartition("@")
    if scheme in _CONTAINER_FIRST and ":" not in user:
        server = host
    return f"{scheme}://{server}{slash}{path}"


def split_address(address: str) -> tuple[str, str, str]:
    """Split into (folder, name, query): ``https://h/set/a.tar?key`` is (``https://h/set``, ``a.tar``, ``?key``)."""
    query = ""
    if address.startswith(("http://", "https://")):
        address, mark, rest = address.partition("?")
        query = mark + rest
    folder, _, name = address.rpartition("/")
    return folder, name, query


def join_address(folder: str, name: str) -> str:
    """The address, or local path, of a file in a folder; a signed folder's query is kept."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    query = ""
    if folder.startswith(("http://", "https://")):
        folder, mark, rest = folder.partition("?")
        query = mark + rest
    return f"{folder.rstrip('/')}/{name}{query}"


Absent = Literal["ignore", "keep", "refuse"]


def expand_shards(spec: str | Sequence[str], listing: Listing | None = None, *, absent: Absent = "ignore") -> list[str]:
    """List the shard files that a specification names.

    Args:
        spec: one of these, or a list of them:

            - a folder of ``.tar`` files, local or an address;
            - a ``.tar``, with ``{000..007}`` braces or wildcards (of an address: ``*`` alone);
            - ``pipe:COMMAND``, with braces;
            - a ``.txt`` file with a shard a line (``#`` starts a comment), or a ``shards.json``, local or an address;
              names in it are relative to its folder.
        listing: how to look at places; none: as `mmd2v.data.places.Places` does.
        absent: of local shards that a folder's manifest lists and that are not there: whether to leave them out, to
            list them all the same, or to raise.

    Returns:
        Paths and addresses, sorted within each item of the specification but a ``.txt``, items in their given order.

    Raises:
        UserError: a file or folder is missing, a wildcard matches nothing, or a shard is named twice.
    """
    if listing is None:
        from mmd2v.data.places import Places

        listing = Places()
    items = [spec] if isinstance(spec, str) else list(spec)
    if not items:
        raise UserError("shards: found an empty list, expected at least one folder or .tar file")
    found: list[str] = []
    for item in items:
        found += _expand_item(item, listing, absent)
    if len(set(found)) < len(found):
        seen: set[str] = set()
        for path in found:
            if path in seen:
                raise UserError(f"shards: {display(path)} is named twice in {[display(item) for item in items]}")
            seen.add(path)
    return found


def _expand_item(item: str, listing: Listing, absent: Absent) -> list[str]:
    if is_remote(item):
        names = _braces(item)
        return sorted(address for name in names for address in _expand_address(name, listing))
    item = os.path.expanduser(item)
    if item.endswith((".txt", ".json")):
        return _read_list(item, listing)
    names = [item] if os.path.exists(item) else _braces(item)
    paths: list[str] = []
    listed: dict[str, set[str]] = {}  # one listing a folder instead of a look-up a shard
    for name in names:
        if os.path.isdir(name):
            inside = sorted(entry for entry in os.listdir(name) if entry.endswith(".tar"))
            if absent != "ignore":
                inside += _absent(name, inside, listing, absent)
            if not inside:
                raise UserError(f"shards: folder {name} holds no .tar file")
            paths += [os.path.join(name, entry) for entry in inside]
            continue
        if any(character in name for character in "*?[") and not os.path.exists(name):
            matches = glob.glob(name, recursive=True)
            if not matches:
                raise UserError(f"shards: no file matches {name}")
            paths += matches
            continue
        folder, base = os.path.split(name)
        if folder not in listed:
            if not os.path.isdir(folder or "."):
                raise UserError(f"shards: {name} not found: there is no folder {folder}{_nearest_path(folder)}")
            listed[folder] = set(os.listdir(folder or "."))
        if base not in listed[folder]:
            if absent == "keep" and base in (listing.manifest_names(folder) or []):
                paths.append(name)
                continue
            tars = [entry for entry in listed[folder] if entry.endswith(".tar")]
            raise UserError(f"shards: {name} not found.{nearest(base, tars)}")
        paths.append(name)
    return sorted(paths)


def _absent(folder: str, inside: list[str], listing: Listing, absent: Absent) -> list[str]:
    """Names that the manifest of a folder lists and that are not in it; raises a UserError under ``refuse``."""
    missing = sorted(set(listing.manifest_names(folder) or []).difference(inside))
    if missing and absent == "refuse":
        raise UserError(
            f"shards: {folder} lacks {missing[0]}"
            + (f" and {len(missing) - 1} further shards" if len(missing) > 1 else "")
            + f" that its shards.json lists: is a copy of it incomplete? It holds {len(inside)} shards"
        )
    return missing


def _braces(item: str) -> list[str]:
    if "{" not in item:  # a list may have a hundred thousand
        return [item]
    try:
        return list(braceexpand.braceexpand(item))
    except ValueError:
        raise UserError(f"shards: unbalanced braces in {display(item)!r}") from None


def _expand_address(address: str, listing: Listing) -> list[str]:
    if address.startswith(PIPE):
        return [address]
    _, name, _ = split_address(address)
    if name.endswith(_COMPRESSED):
        raise UserError(
            f"shards: {display(address)} is compressed, expected an uncompressed .tar: samples are read by random "
            "access. Unpack it on the way: pipe:curl -sfL ADDRESS | gzip -d"
        )
    if "*" in address:
        matches = listing.matches(address)
        if not matches:
            raise UserError(f"shards: no file matches {display(address)}")
        return matches
    if name.endswith((".txt", ".json")):
        return _read_list(address, listing)
    if name.endswith(".tar"):
        return [address]
    return _remote_folder(address, listing)


def _remote_folder(address: str, listing: Listing) -> list[str]:
    """The shards of a remote folder: its manifest is one request, a listing may be hundreds."""
    names = listing.manifest_names(address)
    if names is None:
        names = [name for name in listing.file_names(address) if name.endswith(".tar")]
    if not names:
        raise UserError(f"shards: folder {display(address)} holds no .tar file")
    return [join_address(address, name) for name in names]


def _read_list(path: str, listing: Listing) -> list[str]:
    folder, name, query = split_address(path) if is_remote(path) else (*os.path.split(path), "")
    if name.endswith(".json"):
        names = listing.manifest_names(folder + query)
        if names is None or name != "shards.json":
            raise UserError(
                f"shards: {display(path)} is no manifest, expected a shards.json as `mmd2v data pack` writes it, or a "
                ".txt with a shard a line"
            )
        return sorted(join_address(folder + query, entry) for entry in names)
    foreign = is_remote(path)
    shards: list[str] = []
    for number, line in enumerate(listing.text(path).splitlines(), 1):
        # A comment starts a line or follows a blank: addresses may hold a #.
        entry = line.partition(" #")[0].strip()
        if not entry or entry.startswith("#"):
            continue
        for shard in _braces(entry):
            if foreign and _reaches_this_machine(shard):
                # Whoever can write the list must not run commands here, nor read this machine's files.
                raise UserError(
                    f"shards: {display(path)} line {number}: found '{display(shard)}', expected a name in the list's "
                    "own folder or an address elsewhere: a list from an address may name no command and no local file"
                )
            if foreign:
                shards.append(shard if is_remote(shard) else join_address(folder + query, shard))
                continue
            local = os.path.expanduser(shard)
            shards.append(shard if is_remote(shard) else os.path.join(folder, local))
    if not shards:
        raise UserError(f"shards: {display(path)} names no shard")
    return shards


def _reaches_this_machine(entry: str) -> bool:
    """Whether an entry of a list is a command, a local path, or an address that leads to a local file."""
    if "::" not in entry and "://" not in entry:
        return entry.startswith(("/", "~")) or entry.partition(":")[0].lower() in _LOCAL
    *_, last = links = entry.split("::")
    return "://" not in last or any(link.partition(":")[0].lower() in _LOCAL for link in links)


def _nearest_path(path: str) -> str:
    parent, base = os.path.split(path.rstrip("/"))
    return f".{nearest(base, os.listdir(parent or '.'))}" if os.path.isdir(parent or ".") else ""
