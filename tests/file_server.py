"""A small file server on 127.0.0.1 that answers ranges, counts what it sends, and misbehaves on request."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Remote:
    """One file as the server gives it.

    Args:
        content: the bytes. etag: empty for none. cuts: after how many bytes each of the next answers breaks off.
        stops: whether an answer stops after half of it, with the connection open. too_long: bytes that Content-Length
        says too much. ranges, if_range: whether these headers are heeded. status: an error to answer with instead.
        length: whether to say Content-Length.
    """

    content: bytes
    etag: str = '"1"'
    cuts: list[int] = field(default_factory=list)
    stops: bool = False
    too_long: int = 0
    ranges: bool = True
    if_range: bool = True
    status: int = 200
    length: bool = True
    asked: list[str] = field(default_factory=list)  # the Range of each request, "" for the whole
    sent: int = 0


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        remote = self.server.files.get(self.path)
        if remote is None:
            return self.send_error(404)
        asked = self.headers.get("Range", "")
        remote.asked.append(asked)
        if remote.status != 200:
            return self.send_error(remote.status)
        body, begin = remote.content, 0
        unchanged = not remote.if_range or self.headers.get("If-Range") == remote.etag
        if asked and remote.ranges and unchanged:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if remote.etag:
            self.send_header("ETag", remote.etag)
        if remote.length:
            self.send_header("Content-Length", str(len(body) - begin + remote.too_long))
        self.end_headers()
        part = body[begin:]
        if remote.cuts:
            part = part[: remote.cuts.pop(0)]
        if remote.stops:
            part = part[: len(part) // 2]
        remote.sent += len(part)
        self.wfile.write(part)
        self.wfile.flush()
        while remote.stops:
            time.sleep(0.02)
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving(files: dict[str, Remote]):
    """Serves `files` by path ("/a.gz") and yields the base address; entries may be changed meanwhile."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.files = files
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
