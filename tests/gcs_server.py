"""A small strict Google Cloud Storage: the JSON API's objects, with generation preconditions.

The published emulators ignore `ifGenerationMatch` on uploads and fail on ranges that Arrow asks
for; this one answers as the real service documents it (409/412/416/404, 308 while resumable).
Run as `python gcs_server.py PORT`; it has one bucket named `bucket`.
"""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
OBJECTS: dict[str, tuple[bytes, int]] = {}  # name -> (content, generation)
UPLOADS: dict[str, dict] = {}  # resumable session -> its name, query and bytes so far
LOCK = threading.Lock()
CLOCK = iter(range(1, sys.maxsize))


def metadata(name: str) -> dict:
    content, generation = OBJECTS[name]
    return {
        "kind": "storage#object",
        "id": f"{BUCKET}/{name}/{generation}",
        "name": name,
        "bucket": BUCKET,
        "generation": str(generation),
        "metageneration": "1",
        "size": str(len(content)),
        "contentType": "application/octet-stream",
        "timeCreated": "2026-01-01T00:00:00Z",
        "updated": "2026-01-01T00:00:00Z",
        "storageClass": "STANDARD",
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer takes 40 ms

    def log_message(self, *args):
        if "-v" in sys.argv:
            super().log_message(*args)

    def reply(self, status: int, body: dict | bytes = b"", **headers: str) -> None:
        is_json = isinstance(body, dict)
        data = json.dumps(body).encode() if is_json else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        kind = "application/json" if is_json else "application/octet-stream"
        self.send_header("Content-Type", kind)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status: int, reason: str) -> None:
        self.reply(status, {"error": {"code": status, "message": reason}})

    def parse(self) -> tuple[str, dict[str, str], bytes]:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return url.path, query, body

    def store(self, name: str, query: dict[str, str], content: bytes) -> None:
        with LOCK:
            generation = OBJECTS.get(name, (b"", 0))[1]
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
                return self.fail(412, "conditionNotMet")
            OBJECTS[name] = (content, next(CLOCK))
            body = metadata(name)
        return self.reply(200, body)

    def do_POST(self):
        path, query, body = self.parse()
        if path != f"/upload/storage/v1/b/{BUCKET}/o":
            return self.fail(404, "no such bucket")
        kind = query.get("uploadType")
        if kind == "media":
            return self.store(query["name"], query, body)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            parts = body.split(b"--" + boundary)[1:3]
            described, content = (p.partition(b"\r\n\r\n")[2][:-2] for p in parts)
            name = query.get("name") or json.loads(described)["name"]
            return self.store(name, query, content)
        session = str(next(CLOCK))
        name = query.get("name") or json.loads(body)["name"]
        UPLOADS[session] = {"name": name, "query": query, "content": b""}
        host, port = self.server.server_address[:2]
        location = f"http://{host}:{port}/resumable/{session}?upload_id={session}"
        return self.reply(200, Location=location)

    def do_PUT(self):
        path, _, body = self.parse()
        upload = UPLOADS.get(path.removeprefix("/resumable/"))
        if upload is None:
            return self.fail(404, "no such upload")
        said = self.headers.get("Content-Range", "bytes 0-/*")
        upload["content"] += body
        total = said.rpartition("/")[2]
        if total != "*" and len(upload["content"]) == int(total):
            return self.store(upload["name"], upload["query"], upload["content"])
        done = len(upload["content"])
        return self.reply(308, **({"Range": f"bytes=0-{done - 1}"} if done else {}))

    def do_GET(self):
        path, query, _ = self.parse()
        if path == f"/storage/v1/b/{BUCKET}":
            return self.reply(200, {"kind": "storage#bucket", "name": BUCKET})
        if path == f"/storage/v1/b/{BUCKET}/o":
            return self.listing(query)
        match = re.fullmatch(rf"/(?:download/)?storage/v1/b/{BUCKET}/o/(.+)", path)
        name = unquote(match[1]) if match else ""
        with LOCK:
            if name not in OBJECTS:
                return self.fail(404, f"no object {name!r}")
            body, (content, generation) = metadata(name), OBJECTS[name]
        if query.get("generation", str(generation)) != str(generation):
            return self.fail(404, "no such generation")
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.reply(304)
        if query.get("alt") != "media":
            return self.reply(200, body)
        headers = {"x_goog_generation": str(generation), "ETag": f'"{generation}"'}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.reply(200, content, **headers)
        size = len(content)
        first = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
        last = min(int(wanted[2]) if wanted[1] and wanted[2] else size - 1, size - 1)
        if first >= size:
            return self.fail(416, "requested range not satisfiable")
        headers["Content_Range"] = f"bytes {first}-{last}/{size}"
        return self.reply(206, content[first : last + 1], **headers)

    def listing(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        with LOCK:
            names = [n for n in sorted(OBJECTS) if n.startswith(prefix) and start <= n < end]
            folders = set()
            if delimiter:
                for name in names:
                    head, cut, _ = name[len(prefix) :].partition(delimiter)
                    if cut:
                        folders.add(prefix + head + cut)
                names = [n for n in names if delimiter not in n[len(prefix) :]]
            items = [metadata(n) for n in names]
        body = {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}
        self.reply(200, body)

    def do_DELETE(self):
        path, query, _ = self.parse()
        name = unquote(path.removeprefix(f"/storage/v1/b/{BUCKET}/o/"))
        with LOCK:
            generation = OBJECTS.get(name, (b"", 0))[1]
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
                return self.fail(412, "conditionNotMet")
            if OBJECTS.pop(name, None) is None:
                return self.fail(404, f"no object {name!r}")
        return self.reply(204)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
