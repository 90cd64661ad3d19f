"""A hub on this machine that huggingface_hub downloads from: repositories are folders, of one commit each."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


@contextlib.contextmanager
def serve_hub(repos: dict[str, Path]) -> Iterator[str]:
    """Serve folders as repositories owner/name, as long as the context lasts: the value of HF_ENDPOINT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(self.path.split("?")[0])

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing on stderr."""

        def _answer(self, path: str) -> None:
            name = next((name for name in repos if name in path), None)
            if name is None:
                return self._send(404, b"", "X-Error-Code", "RepoNotFound")
            files = {
                file.relative_to(repos[name]).as_posix(): file for file in repos[name].rglob("*") if file.is_file()
            }
            if path == f"/api/models/{name}/revision/main":
                return self._send(200, json.dumps({"id": name, "sha": COMMIT}).encode())
            if path == f"/api/models/{name}/tree/{COMMIT}":
                listed = [{"type": "file", "path": f, "size": p.stat().st_size, "oid": "0"} for f, p in files.items()]
                return self._send(200, json.dumps(listed).encode())
            file = files.get(path.removeprefix(f"/{name}/resolve/{COMMIT}/"))
            if file is None:
                return self._send(404, b"", "X-Error-Code", "RevisionNotFound")
            self._send(200, file.read_bytes(), "X-Repo-Commit", COMMIT)

        def _send(self, status: int, body: bytes, *header: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            if header:
                self.send_header(*header)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
