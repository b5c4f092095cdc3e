"""A local stand-in for the Hugging Face hub, with its layout, its redirect to a CDN, and faults on demand.

    with Hub({"shard_00000.parquet": path}) as hub:
        hub.faults["shard_00000.parquet"] = Fault(status=503, times=2, retry_after="1")
        ...                                    # HF_ENDPOINT=hub.endpoint
        hub.log                                # every request that came in

Two servers: the hub at 127.0.0.1 answers /datasets/OWNER/NAME/resolve/main/FILE with a 302 to the CDN, which
is another host (localhost, its own port) and serves the bytes with Range. As the real one does, the CDN
refuses a request that brings an Authorization header beside the signature in its URL.
"""

import hashlib
import math
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

CHUNK_BYTES = 16384


@dataclass
class Fault:
    """What goes wrong with one file. The default: nothing."""

    status: int = 0  # answered instead of the file ...
    times: float = math.inf  # ... to this many requests, and then the file
    retry_after: str = ""  # the Retry-After header beside that status
    at: str = "hub"  # which of the two servers answers with the status: "hub" or "cdn"
    cut_after: int = 0  # bytes of body after which every connection is cut
    length_off_by: int = 0  # how many bytes more than it has the server says the file has
    ignore_range: bool = False  # 200 and the whole file, whatever Range asks for
    body: bytes | None = None  # served instead of the file
    chunk_seconds: float = 0.0  # pause before every 16 kB


class Request(NamedTuple):
    at: str  # "hub" or "cdn"
    method: str
    file: str
    range: str  # "" without one
    authorization: str  # "" without one
    status: int
    seconds: float  # time.monotonic() when it was answered


class Hub:
    def __init__(self, files, repo="karpathy/climbmix-400b-shuffle", token=None):
        """files: name -> bytes or Path. token: where given, the hub answers 401 to requests without it."""
        self.files, self.repo, self.token = dict(files), repo, token
        self.faults: dict[str, Fault] = {}
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self.etags: dict[str, str] = {}
        self.servers = []
        for at in ("hub", "cdn"):
            handler = type("Handler", (_Handler,), {"hub": self, "at": at})
            server = _Server(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            self.servers.append(server)
        self.endpoint = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.cdn = f"http://localhost:{self.servers[1].server_port}"

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def requests(self, at=None, file=None, method=None):
        with self.lock:
            return [
                r
                for r in self.log
                if at in (None, r.at) and file in (None, r.file) and method in (None, r.method)
            ]

    def body(self, name):
        fault = self.faults.get(name)
        if fault and fault.body is not None:
            return fault.body
        data = self.files[name]
        return data.read_bytes() if isinstance(data, Path) else data

    def size(self, name):
        data = self.files[name]
        fault = self.faults.get(name, Fault())
        true = len(fault.body) if fault.body is not None else None
        if true is None:
            true = data.stat().st_size if isinstance(data, Path) else len(data)
        return true + fault.length_off_by

    def etag(self, name):  # for a file in LFS the hub's ETag is the sha256 of what it holds
        if name not in self.etags:
            data = self.files[name]
            digest = hashlib.sha256(data.read_bytes() if isinstance(data, Path) else data).hexdigest()
            self.etags[name] = digest
        return f'"{self.etags[name]}"'


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # a client that hung up, or was killed: the tests' doing


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    at: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        url = urlsplit(self.path)
        prefix = f"/datasets/{self.hub.repo}/resolve/main/" if self.at == "hub" else "/cdn/"
        name = unquote(url.path[len(prefix) :]) if url.path.startswith(prefix) else ""
        with self.hub.lock:
            fault = self.hub.faults.get(name, Fault())
            failing = fault.status and fault.at == self.at and fault.times > 0
            if failing:
                fault.times -= 1
        if failing:
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return self.say(fault.status, name, b"out of order\n", extra)
        authorization = self.headers.get("Authorization", "")
        if self.at == "hub":
            if self.hub.token and authorization != f"Bearer {self.hub.token}":
                return self.say(401, name, b"Invalid username or password.", {"X-Error-Code": "GatedRepo"})
            if name not in self.hub.files:
                return self.say(404, name, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
            location = f"{self.hub.cdn}/cdn/{quote(name)}?Signature=ok"
            linked = {"X-Linked-Size": str(self.hub.size(name)), "X-Linked-Etag": self.hub.etag(name)}
            return self.say(302, name, b"", {"Location": location, "X-Repo-Commit": "0" * 40, **linked})
        if authorization or parse_qs(url.query).get("Signature") != ["ok"]:
            return self.say(400, name, b"Only one auth mechanism allowed")
        if name not in self.hub.files:
            return self.say(403, name, b"Access denied")
        self.send_file(name, fault)

    def send_file(self, name, fault):
        size = self.hub.size(name)  # as the server claims
        start, end = 0, size - 1
        ranged = self.headers.get("Range", "")
        if ranged.startswith("bytes=") and not fault.ignore_range:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            if first:
                start, end = int(first), min(int(last), end) if last else end
            else:
                start = max(0, size - int(last))
            if start >= size:
                return self.say(416, name, b"", {"Content-Range": f"bytes */{size}"})
        else:
            ranged = ""
        self.note(206 if ranged else 200, name)
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", self.hub.etag(name))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        if self.command == "HEAD":
            return
        # a server that claims fewer bytes than it has sends them all the same
        stop = None if fault.length_off_by < 0 else end + 1
        body = memoryview(self.hub.body(name))[start:stop]
        if fault.cut_after:
            body = body[: fault.cut_after]
        for i in range(0, len(body), CHUNK_BYTES):
            if fault.chunk_seconds:
                time.sleep(fault.chunk_seconds)
            self.wfile.write(body[i : i + CHUNK_BYTES])
        if len(body) != end - start + 1:  # cut, or a length that lies: nothing more comes on this connection
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def say(self, status, name, body, headers=None):
        self.note(status, name)
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def note(self, status, name):
        get = self.headers.get
        request = Request(
            self.at, self.command, name, get("Range", ""), get("Authorization", ""), status, time.monotonic()
        )
        with self.hub.lock:
            self.hub.log.append(request)
