"""A web server of a folder on 127.0.0.1 whose answers can be made to fail."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from waiting import LONG


class ShardServer:
    """Serves a folder; use as a context manager.

    Attributes:
        faults: file name → what happens to the next requests for it, in turn: a status (500, 404, …), "truncate" (the
            connection ends after half of the body), "stall" (nothing comes after half of it), "slow" (20 pieces over a
            second), "garble" (one byte is another), "whole" (a range is ignored) or "ok".
        always: file name → what happens to every request.
        requests: file name → bytes of the body of each answer.
        etags: file name → ETag.
        lists: whether a folder is answered with links to its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[object]] = defaultdict(list)
        self.always: dict[str, object] = {}
        self.requests: dict[str, list[int]] = defaultdict(list)
        self.etags: dict[str, str] = {}
        self.lists = False
        self.stopped = threading.Event()

    def __enter__(self) -> ShardServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def do_HEAD(self) -> None:
                server.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_fault(self, name: str) -> object:
        """What will happen to the next request for a file name."""
        return self.faults[name][0] if self.faults[name] else self.always.get(name, "ok")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bool = True) -> None:
        name = unquote(urlsplit(request.path).path).lstrip("/")
        base = os.path.basename(name)
        fault = self.next_fault(base)
        if self.faults[base]:
            self.faults[base].pop(0)
        path = self.folder / name
        if self.lists and path.is_dir():
            page = "".join(f'<a href="{entry}">{entry}</a>' for entry in sorted(os.listdir(path))).encode()
            request.send_response(200)
            request.send_header("Content-Type", "text/html")
            request.send_header("Content-Length", str(len(page)))
            request.end_headers()
            request.wfile.write(page)
            return
        if isinstance(fault, int) or not path.is_file():
            status = fault if isinstance(fault, int) else 404
            self.requests[base].append(0)
            request.send_response(status)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        total = path.stat().st_size
        wanted = request.headers.get("Range") if fault != "whole" else None
        first, last = (wanted or "bytes=0-").removeprefix("bytes=").split("-")
        with open(path, "rb") as handle:
            handle.seek(int(first))
            data = handle.read(int(last) + 1 - int(first) if last else -1)
        if wanted:
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        if base in self.etags:
            request.send_header("ETag", self.etags[base])
        request.end_headers()
        if not body:
            return
        if fault == "garble":
            data = bytes([data[0] ^ 1]) + data[1:]
        self.requests[base].append(len(data))
        try:
            self._send(request, data, fault)
        except OSError:
            request.close_connection = True

    def _send(self, request: BaseHTTPRequestHandler, data: bytes, fault: object) -> None:
        if fault in ("truncate", "stall"):
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            if fault == "stall":
                self.stopped.wait(LONG)
            request.close_connection = True
        elif fault == "slow":
            piece = -(-len(data) // 20)
            for start in range(0, len(data), piece):
                request.wfile.write(data[start : start + piece])
                request.wfile.flush()
                time.sleep(0.05)
        else:
            request.wfile.write(data)
