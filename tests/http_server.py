"""A server of one file, or some, whose faults are switched on and off while it runs."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """What the server does next.

    Args:
        content: The file.
        headers: Sent with every answer; ETag and Last-Modified decide on If-Range.
        status: Sent instead of the file.
        ranges: Whether Range is understood, and whether If-Range is.
        cuts: After how many bytes each of the next connections breaks.
        longer: How many bytes more (or fewer) are announced than the file has; None: nothing is.
        gate: Waited for after the first half of each answer.
        others: What other addresses have, by path; all others have `content`.
        requests: The headers that came, with the address asked for under "target".
    """

    content: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"1"'})
    status: int = 200
    ranges: bool = True
    if_range: bool = True
    cuts: list[int] = field(default_factory=list)
    longer: int | None = 0
    gate: threading.Event | None = None
    others: dict[str, bytes] = field(default_factory=dict)
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def start_of(self, asked: dict[str, str]) -> int | None:
        """The first byte to send of a part; None asks for the whole."""
        match = re.fullmatch(r"bytes=([0-9]+)-", asked.get("Range", ""))
        known = (self.headers.get("ETag"), self.headers.get("Last-Modified"))
        if not match or not self.ranges:
            return None
        if self.if_range and "If-Range" in asked and asked["If-Range"] not in known:
            return None
        return int(match.group(1))


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        served: Served = self.server.served
        asked = {**self.headers, "target": self.path}
        served.requests.append(asked)
        start = served.start_of(asked)
        content = served.others.get(self.path, served.content)
        length = len(content)
        if served.status != 200:
            self.send_response(served.status)
        elif start is None:
            self.send_response(200)
        elif start >= length:
            self.send_response(416)
        else:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{length - 1}/{length}")
        for name, value in served.headers.items():
            self.send_header(name, value)
        refused = served.status != 200 or (start is not None and start >= length)
        body = b"" if refused else content[start or 0 :]
        if served.longer is not None:
            self.send_header("Content-Length", str(len(body) + served.longer))
        self.end_headers()
        if served.cuts and body:
            body = body[: served.cuts.pop(0)]
        if served.gate is not None:
            self.wfile.write(body[: len(body) // 2])
            served.gate.wait(10)
            body = body[len(body) // 2 :]
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def proxies() -> list[str]:
    """The names of the environment's variables that would lead requests elsewhere."""
    return [name for name in os.environ if name.lower().endswith("_proxy")]


@contextmanager
def serving(content: bytes) -> Iterator[Served]:
    """Serve a file on this machine; HTTP/1.0, so each answer ends with its connection."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.served = Served(content, url=f"http://127.0.0.1:{server.server_port}/set.zip")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
