"""A local stand-in for Google Cloud Storage: what gcsfs and TensorStore's own driver ask of its JSON API, over HTTP.

Objects are whole or not there: nothing is appended to, and nothing renamed. Preconditions (`ifGenerationMatch`) hold,
lists come in pages, large objects in resumable uploads. What these two do not ask for is not there, and is refused.
"""

import contextlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grpo_jax import storage

__all__ = ["Refused", "Store", "opened", "served"]

PAGE = 50  # objects of a list's page: few, so that lists have several


class Refused(Exception):
    """What is asked is answered with a status of its own."""

    def __init__(self, status: int, reason: str = ""):
        super().__init__(reason or str(status))
        self.status = status


class Store:
    """Buckets in memory."""

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {name: {} for name in buckets}  # generation, content
        self.asked: list[tuple[str, str]] = []  # what was asked for: method and object
        self.before: Callable[[str, str], None] = lambda method, name: None  # may raise Refused
        self.after: Callable[[str, str], None] = self.before  # what was asked is done, and the answer lost
        self.port = 0
        self._uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self._numbers, self._lock = itertools.count(1), threading.RLock()

    @property
    def environment(self) -> dict[str, str]:
        """Where gcsfs and TensorStore find it, without anybody's credentials."""
        url = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GCE_METADATA_HOST": "127.0.0.1:1",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true",
            "GOOGLE_APPLICATION_CREDENTIALS": "",
        }  # fmt: skip

    def files(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Contents by name behind the prefix."""
        with self._lock:
            objects = self.buckets[bucket].items()
            return {name.removeprefix(prefix): data for name, (_, data) in objects if name.startswith(prefix)}

    def put(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> dict[str, Any]:
        """Makes an object, or another in its place."""
        with self._lock:
            self._check(bucket, name, query)
            self.buckets[bucket][name] = next(self._numbers), data
            return self.described(bucket, name)

    def found(self, bucket: str, name: str, query: dict[str, str]) -> tuple[int, bytes]:
        """Generation and content."""
        with self._lock:
            self._check(bucket, name, query)
            if name not in self._of(bucket):
                raise Refused(404)
            return self.buckets[bucket][name]

    def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
        """Removes an object."""
        with self._lock:
            self.found(bucket, name, query)
            del self.buckets[bucket][name]

    def described(self, bucket: str, name: str) -> dict[str, Any]:
        """Of an object, all but its content."""
        generation, data = self.buckets[bucket][name]
        when = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "generation": str(generation),
            "metageneration": "1", "size": str(len(data)), "timeCreated": when, "updated": when,
            "contentType": "application/octet-stream", "storageClass": "STANDARD",
        }  # fmt: skip

    def listed(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        """A page of the objects behind a prefix, those with another delimiter behind it as prefixes."""
        prefix, delimiter, after = (query.get(key, "") for key in ("prefix", "delimiter", "pageToken"))
        start, end = query.get("startOffset", ""), query.get("endOffset", "")
        most, items, prefixes, last = min(int(query.get("maxResults", PAGE)), PAGE), [], [], ""
        with self._lock:
            for name in sorted(self._of(bucket)):
                if not name.startswith(prefix) or name <= after or name < start or (end and name >= end):
                    continue
                head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                shown = prefix + head + cut if cut else name
                if cut and (shown <= after[: len(shown)] or shown in prefixes):
                    continue
                if len(items) + len(prefixes) == most:
                    return self._page(items, prefixes, last)
                if cut:
                    prefixes.append(shown)
                else:
                    items.append(self.described(bucket, name))
                last = shown + "\U0010ffff" if cut else name
        return self._page(items, prefixes, "")

    @staticmethod
    def _page(items: list[dict[str, Any]], prefixes: list[str], last: str) -> dict[str, Any]:
        page = {"kind": "storage#objects", "items": items, "prefixes": prefixes, "nextPageToken": last}
        return {key: value for key, value in page.items() if value}

    def _of(self, bucket: str) -> dict[str, tuple[int, bytes]]:
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[bucket]

    def _check(self, bucket: str, name: str, query: dict[str, str]) -> None:
        here = self._of(bucket).get(name, (0, b""))[0]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != here:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == here:
            raise Refused(304 if here else 412)

    def begin_upload(self, bucket: str, name: str, query: dict[str, str]) -> str:
        """Of a large object: its number."""
        with self._lock:
            self._check(bucket, name, query)
            number = str(next(self._numbers))
            self._uploads[number] = bucket, name, query, bytearray()
            return number

    def go_on_with(self, number: str, chunk: bytes, said: str) -> dict[str, Any] | int:
        """Adds a chunk, as its Content-Range says: what is made of all once it is whole, before that how much is in."""
        bucket, name, query, held = self._uploads[number]
        match = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\*|\d+)", said or f"bytes */{len(chunk)}")
        if match is None or (match[1] and int(match[1]) != len(held)):
            raise Refused(400, f"Content-Range {said!r} behind {len(held)} bytes")
        held += chunk
        return self.put(bucket, name, bytes(held), query) if match[3] == str(len(held)) else len(held)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet
    store: Store

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
        self.send_response(status)
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content_Type": "application/json", **headers}
        if status != 304:
            headers = {"Content_Length": str(len(body)), **headers}
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked may not want it any more, or be dead
            self.wfile.write(body if status not in (204, 304) else b"")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _handle(self) -> None:
        url, body = urllib.parse.urlsplit(self.path), self._body()
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        try:
            self._do(self.command, url.path, query, body)
        except Refused as refused:
            said = {"error": {"code": refused.status, "message": str(refused)}}
            self._answer(refused.status, b"" if refused.status == 304 else said)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def _do(self, method: str, path: str, query: dict[str, str], body: bytes) -> None:
        if path.rstrip("/") == "/batch/storage/v1":
            return self._batch(body)
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/([^/]+)(?:/(\w+)/(.+))?)?)?/?", path)
        if match is None:
            raise Refused(501, f"{method} {path}")
        bucket, name = match[2], urllib.parse.unquote(match[4] or query.get("name", ""))
        self.store.asked.append((method, name))
        self.store.before(method, name)
        if match[1] == "/upload":
            return self._upload(bucket, name, query, body)
        if not match[3]:
            self.store._of(bucket)
            return self._answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "HERE"})
        if not match[4]:
            return self._answer(200, self.store.listed(bucket, query))
        if match[5] == "rewriteTo":
            to_bucket, _, to = match[6].removeprefix("b/").partition("/o/")
            made = self.store.put(to_bucket, urllib.parse.unquote(to), self.store.found(bucket, name, {})[1], query)
            said = {"kind": "storage#rewriteResponse", "done": True, "resource": made}
            return self._answer(200, said)
        if method == "GET":
            return self._get(bucket, name, query)
        if method == "DELETE":
            self.store.delete(bucket, name, query)
            return self._answer(204)
        raise Refused(501, f"{method} {path}")

    def _get(self, bucket: str, name: str, query: dict[str, str]) -> None:
        generation, data = self.store.found(bucket, name, query)
        if query.get("alt") != "media":
            return self._answer(200, self.store.described(bucket, name))
        headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
            end = int(match[2]) + 1 if match[1] and match[2] else len(data)
            if first >= len(data):
                raise Refused(416)
            part = data[first:end]
            said = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
            return self._answer(206, part, Content_Range=said, **headers)
        return self._answer(200, data, **headers)

    def _upload(self, bucket: str, name: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if "upload_id" in query:
            done = self.store.go_on_with(query["upload_id"], body, self.headers.get("Content-Range", ""))
            if isinstance(done, dict):
                return self._answer(200, done)
            return self._answer(308, Range=f"bytes=0-{done - 1}") if done else self._answer(308)
        if kind == "media":
            made = self.store.put(bucket, name, body, query)
            self.store.after("PUT", name)
            return self._answer(200, made)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])
            assert boundary is not None
            mark = b"--" + boundary[1].encode()
            _, about, content = body.split(mark, 2)
            line = b"\r\n" if about.startswith(b"\r\n") else b"\n"  # gcsfs ends them so
            content = content[: content.rindex(line + mark)].partition(line * 2)[2]
            name = json.loads(about.partition(line * 2)[2])["name"]
            self.store.before("PUT", name)
            made = self.store.put(bucket, name, content, query)
            self.store.after("PUT", name)
            return self._answer(200, made)
        if kind == "resumable":
            name = name or json.loads(body)["name"]
            self.store.before("PUT", name)
            number = self.store.begin_upload(bucket, name, query)
            place = f"http://{self.headers['Host']}{self.path}&upload_id={number}"
            return self._answer(200, Location=place)
        raise Refused(501, f"uploadType={kind}")

    def _batch(self, body: bytes) -> None:
        """Of deletions."""
        parts = []
        for name in re.findall(rb"DELETE (\S+) HTTP/1.1", body):
            url = urllib.parse.urlsplit(name.decode())
            bucket, _, key = url.path.removeprefix("/storage/v1/b/").partition("/o/")
            status = 204
            try:
                key = urllib.parse.unquote(key)
                self.store.asked.append(("DELETE", key))
                self.store.before("DELETE", key)
                self.store.delete(urllib.parse.unquote(bucket), key, {})
            except Refused as refused:
                status = refused.status
            parts.append(f"--batch_x\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} OK\r\n\r\n\r\n")
        said = "".join(parts) + "--batch_x--"
        self._answer(200, said.encode(), Content_Type="multipart/mixed; boundary=batch_x")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing is said of one who was killed while asking."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def served(*buckets: str) -> Iterator[Store]:
    """Serves these buckets, which are empty, from a port of its own."""
    made = Store(*buckets)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": made}))
    made.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def opened() -> Iterator[tuple[Store, storage.Path]]:
    """A store with one bucket, `bucket`, that this process and those it starts find; and the bucket's path."""
    with served("bucket") as store, pytest.MonkeyPatch.context() as patched:
        for name, value in store.environment.items():
            patched.setenv(name, value)
        yield store, storage.path("gs://bucket")
