"""A real HTTP server of a folder, with Range, that does on demand what stores do on bad days."""

import re
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[["Handler", str, bytes], bool]
"""Answers a request for a path whose right answer is given; False leaves that to the server."""


class Store(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.faults: list[Fault] = []
        """Of the next requests for tars, one each; the last one stays where `stays` says so."""
        self.stays = False
        self.pattern = r"\.tar$"
        self.requests: list[tuple[str, int | None, int | None]] = []
        """Path and range of every request."""
        self.lock = threading.Lock()
        self.ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, suffix: str) -> list[tuple[str, int | None, int | None]]:
        return [request for request in self.requests if request[0].endswith(suffix)]

    def fault_for(self, path: str) -> Fault | None:
        with self.lock:
            if not self.faults or not re.search(self.pattern, path):
                return None
            return self.faults[0] if self.stays and len(self.faults) == 1 else self.faults.pop(0)


class Handler(BaseHTTPRequestHandler):
    server: Store

    def do_GET(self) -> None:
        file = self.server.root / self.path.lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranges else None
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (None, None)
        self.server.requests.append((self.path, start, stop))
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()[start:stop]
        fault = self.server.fault_for(self.path)
        if not (fault and fault(self, self.path, data)):
            self.answer(data, len(data), 206 if asked else 200)

    def answer(self, data: bytes, length: int, status: int = 206) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def fails(status: int) -> Fault:
    def fault(handler: Handler, path: str, data: bytes) -> bool:
        handler.send_error(status)
        return True

    return fault


def drops(handler: Handler, path: str, data: bytes) -> bool:
    """Sends half and closes the connection."""
    handler.answer(data[: len(data) // 2], len(data))
    handler.close_connection = True
    return True


def truncates(handler: Handler, path: str, data: bytes) -> bool:
    """Sends half and says that this is all."""
    handler.answer(data[: len(data) // 2], len(data) // 2)
    return True


def lies(handler: Handler, path: str, data: bytes) -> bool:
    """Sends as many bytes, one of them another."""
    wrong = bytearray(data)
    wrong[len(data) * 3 // 4] ^= 0x40
    handler.answer(bytes(wrong), len(data))
    return True


def stalls(seconds: float) -> Fault:
    """Sends half and waits."""

    def fault(handler: Handler, path: str, data: bytes) -> bool:
        handler.answer(data[: len(data) // 2], len(data))
        time.sleep(seconds)
        return True

    return fault


def refuses(handler: Handler, path: str, data: bytes) -> bool:
    """Closes the connection without a word."""
    handler.connection.close()
    return True


def well(handler: Handler, path: str, data: bytes) -> bool:
    """Does nothing amiss."""
    return False


def slow(seconds: float) -> Fault:
    """Answers rightly, but late, as a store far away."""

    def fault(handler: Handler, path: str, data: bytes) -> bool:
        time.sleep(seconds)
        return False

    return fault


@contextmanager
def store_of(root: Path):
    """Serves a folder until the block ends."""
    store = Store(root)
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()
