"""One fetch of one file from wherever it is: attempts that are watched and, where it may help, repeated.

Whatever the file system, an attempt runs in a thread of its own and is abandoned when nothing arrives for
``timeout`` seconds. What can never succeed (no such file, no permission, no such protocol) is not tried again.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mmd2v.config.schema import SourceConfig
from mmd2v.config.secrets import check_address, check_options
from mmd2v.data.addresses import PIPE, display, redacted
from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.pipes import PipeFailed, run_pipe
from mmd2v.data.shard_cache import NoRoom
from mmd2v.errors import UserError, disk_message, nearest

Result = TypeVar("Result")

_LOOK_EVERY = 0.05  # seconds between two looks at an attempt
_LONGEST_DELAY = 60.0  # seconds between two attempts
_TRANSIENT = (408, 425, 429)  # HTTP statuses below 500 that pass
# What to install for a protocol, where fsspec's own hint does not name a package of PyPI.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp"}
_PACKAGES |= {
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}


class Cancelled(Exception):
    """The data set was closed while something was on its way."""


class Incomplete(Exception):
    """What arrived is not what was expected; another attempt may bring it whole."""


class Stalled(Exception):
    """Nothing arrived for too long."""


class _Abandoned(Exception):
    """Raised inside a download that nobody waits for any more."""


def file_system(address: str, config: SourceConfig) -> tuple[Any, str]:
    """Return the fsspec file system of an address and its path there.

    Raises:
        UserError: no such protocol, its package is missing, or ``storage_options`` do not fit it or are placeholders.
    """
    import fsspec
    from fsspec.registry import known_implementations

    protocol = urlsplit(address).scheme.rpartition("::")[2] or address.partition("://")[0]
    check_address(address)
    check_options(config.storage_options, "data.source.storage_options")
    options = dict(config.storage_options)
    try:
        if not fsspec.get_filesystem_class(protocol).async_impl:
            # fsspec keeps an instance a thread of these for ever; an attempt's thread is short-lived.
            options["skip_instance_cache"] = True
        if protocol in ("http", "https"):
            options = _http_options(options, config.timeout)
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol, protocol)
        raise UserError(
            f"{display(address)}: {protocol}:// needs a package that is not installed: pip install {package} "
            f"({redacted(str(error))})"
        ) from None
    except ValueError as error:
        if protocol in known_implementations:
            raise UserError(f"{display(address)}: {redacted(str(error))}") from None
        raise UserError(
            f"{display(address)}: '{protocol}' is no protocol that fsspec knows."
            f"{nearest(protocol, [*known_implementations, 'pipe'])}"
        ) from None
    except TypeError as error:
        raise UserError(
            f"data.source.storage_options: found {sorted(config.storage_options)}, which the file system of "
            f"{protocol}:// does not take: {redacted(str(error))}"
        ) from None


def _http_options(options: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Fill in what aiohttp would get wrong for shards: it ends every transfer after five minutes."""
    import aiohttp

    patience = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    client = {"timeout": patience, "trust_env": True, **options.get("client_kwargs", {})}
    # A shard is asked for as it is: its size must be the size on the wire.
    headers = {"Accept-Encoding": "identity", **options.get("headers", {})}
    return {**options, "client_kwargs": client, "headers": headers}


def download(
    address: str, target: str, config: SourceConfig, stop: threading.Event, grew: Callable[[int], None]
) -> None:
    """Try once to bring a whole file.

    Args:
        address: where it is.
        target: local file that receives it.
        config: time-out and options.
        stop: set to end it.
        grew: called from time to time with the bytes so far, in this thread.

    Raises:
        Incomplete: it ended before the size that was announced.
        Stalled: no byte for ``config.timeout`` seconds.
        Cancelled: ``stop`` was set.
        Exception: whatever the file system raises.
    """
    if address.startswith(PIPE):
        run_pipe(address, target, lambda alive: _follow(alive, lambda: _size(target), config.timeout, stop, grew))
        return
    import fsspec

    class Tracker(fsspec.Callback):
        """Counts what arrives, and ends a download that was given up."""

        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if abandoned.is_set():
                raise _Abandoned

    abandoned = threading.Event()
    tracker = Tracker()

    def transfer() -> None:
        system, path = file_system(address, config)
        if not abandoned.is_set():
            system.get_file(path, target, callback=tracker)

    def look() -> int:
        return max(_size(target), tracker.value)

    try:
        _watched(transfer, look, config.timeout, stop, grew)
    except BaseException:
        abandoned.set()
        raise
    found = _size(target)
    if tracker.size and found < tracker.size:
        raise Incomplete(f"found {found:,} bytes, expected {tracker.size:,}: the transfer ended early")


def read_bytes(
    address: str, config: SourceConfig, stop: threading.Event, start: int | None = None, end: int | None = None
) -> bytes:
    """Try once to read a whole small file, or the bytes ``start`` … ``end - 1`` of any file; raises as `download`.

    Nothing tells how much of it has come so far: all of it must come within the time-out.
    """
    try:
        data = ask(address, config, stop, lambda system, path: system.cat_file(path, start=start, end=end))
    except Stalled:
        what = "it was" if start is None or end is None else f"bytes {start:,} to {end - 1:,} were"
        raise Incomplete(f"{what} not complete within {config.timeout:g} s (data.source.timeout)") from None
    if start is not None and end is not None and len(data) != end - start:
        if len(data) > end - start:
            raise UserError(
                f"{display(address)}: found {len(data):,} bytes, expected {end - start:,}: the server does not answer "
                "requests for a range of bytes; use data.source.access: cache"
            )
        raise Incomplete(f"found {len(data):,} bytes from byte {start:,} on, expected {end - start:,}")
    return data


def ask(address: str, config: SourceConfig, stop: threading.Event, question: Callable[[Any, str], Result]) -> Result:
    """Try once to get what ``question(file system, path)`` returns, within the time-out; raises as `download`.

    Making a file system may connect to its server: that is a part of the attempt.
    """
    return _watched(lambda: question(*file_system(address, config)), lambda: 0, config.timeout, stop, lambda _: None)


def read_if_there(address: str, config: SourceConfig, stop: threading.Event | None = None) -> bytes | None:
    """Read a small file, with retries; None when the server says that there is none.

    Raises:
        Damage: it cannot be read.
    """
    stop = stop or threading.Event()

    def attempt() -> bytes | None:
        try:
            return read_bytes(address, config, stop)
        except Exception as error:
            if _is_absent(error):
                return None
            raise

    return retrying(attempt, address, config, stop)


def retrying(attempt: Callable[[], Result], address: str, config: SourceConfig, stop: threading.Event) -> Result:
    """Call ``attempt`` until it succeeds, pausing ever longer.

    Raises:
        Damage: it failed for good; names the address, the attempts and the last error.
        UserError: as raised by ``attempt``; a setting must be changed.
        NoRoom: as raised by ``attempt``; the place is fine, and there may be room later.
        Cancelled: ``stop`` was set.
    """
    tries = 0
    while True:
        try:
            return attempt()
        except (UserError, Cancelled, NoRoom):
            raise
        except Exception as error:
            tries += 1
            if _is_local(error):
                raise UserError(
                    f"data.source.cache_dir: {display(address)} cannot be kept: {disk_message(error)}"
                ) from error
            if _is_final(error) or tries > config.retries:
                times = f"{tries} attempts" if tries > 1 else "1 attempt"
                reason = describe(error, config.timeout)
                raise Damage(
                    DamageKind.SHARD_UNREADABLE, f"{display(address)}: cannot be fetched ({times}): {reason}"
                ) from error
        delay = min(config.retry_delay * 2 ** (tries - 1), _LONGEST_DELAY) * random.uniform(0.5, 1.5)
        if stop.wait(delay):
            raise Cancelled


def describe(error: BaseException, timeout: float) -> str:
    """Say in one line what an exception of a file system means; ``timeout``: of the config, in seconds."""
    if isinstance(error, (Stalled, TimeoutError)):
        return f"no byte came for {timeout:g} s (data.source.timeout)"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if (status := _status(error)) is not None:
        return f"the server answered {status} {redacted(str(getattr(error, 'message', '')))}".rstrip()
    text = redacted(" ".join(str(error).split()))
    if isinstance(error, (Incomplete, PipeFailed)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _watched(
    call: Callable[[], Result],
    look: Callable[[], int],
    timeout: float,
    stop: threading.Event,
    grew: Callable[[int], None],
) -> Result:
    """Run ``call`` in a thread as long as ``look`` shows progress; a thread that hangs is left behind.

    Nothing can end a thread that waits for a dead connection, so it must not be waited for: it is a daemon.
    """
    done = threading.Event()
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))
        done.set()

    threading.Thread(target=run, daemon=True, name="mmd2v-fetch").start()
    _follow(done.wait, look, timeout, stop, grew)
    good, value = outcome[0]
    if good:
        return value
    if isinstance(value, Exception):
        raise value
    raise RuntimeError(f"a file system raised {value!r}")


def _follow(
    finished: Callable[[float], bool],
    look: Callable[[], int],
    timeout: float,
    stop: threading.Event,
    grew: Callable[[int], None],
) -> None:
    """Wait until ``finished(seconds)`` is true, with a look at the progress now and then."""
    last, since = -1, time.monotonic()
    while not finished(_LOOK_EVERY):
        if stop.is_set():
            raise Cancelled
        now = look()
        if now != last:
            last, since = now, time.monotonic()
            grew(now)
        elif time.monotonic() - since > timeout:
            raise Stalled


def is_unreachable(error: BaseException | None) -> bool:
    """Whether an exception of a file system tells of its server or the whole file, and not of one slow answer."""
    if error is None or isinstance(error, TimeoutError):
        return False
    return isinstance(error, OSError) or _status(error) is not None


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _status(error: BaseException) -> int | None:
    """The HTTP status an exception carries: aiohttp, httpx, requests and the clouds' libraries each have their way."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None


def _is_absent(error: BaseException) -> bool:
    """Whether the server says that there is no such file; S3 answers 403 for it where listing is not allowed."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return True
    return _status(error) in (400, 403, 404, 410)


def _is_final(error: BaseException) -> bool:
    """Whether another attempt cannot succeed."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return True
    if isinstance(error, (ImportError, NotImplementedError, TypeError)) or "Credentials" in type(error).__name__:
        return True
    status = _status(error)
    return status is not None and status < 500 and status not in _TRANSIENT


def _is_local(error: BaseException) -> bool:
    """Whether it is this node's disk that failed."""
    import errno

    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
