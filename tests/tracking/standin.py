"""A stand-in for the W&B server on the loopback interface: what wandb 0.31 asks of it, and no more.

It keeps what runs send, so that tests can look at it: `history[run_id]` is the list of rows, `exits[run_id]` the exit
code, `runs[run_id]` the variables of the last UpsertBucket. `deaf` makes it accept connections and never answer,
`slow` wait so many seconds before each answer, and `broken` answer 500.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40  # wandb refuses keys that are shorter
PROJECT = {"id": "project", "name": "uft", "entity": {"id": "entity", "name": "tester"}}


class Standin:
    def __init__(self) -> None:
        self.history: dict[str, list[dict]] = {}
        self.exits: dict[str, int] = {}
        self.preempted: set[str] = set()
        self.runs: dict[str, dict] = {}
        self.uploads: dict[str, bytes] = {}
        self.operations: list[str] = []
        self.deaf = threading.Event()
        self.slow, self.broken = 0.0, False
        self._release = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> dict:
        if self.deaf.is_set():
            self._release.wait()
        if path.startswith("/graphql"):
            return {"data": self.graphql(json.loads(body))}
        if path.endswith("/file_stream"):
            self.file_stream(path.split("/")[4], json.loads(body))
        elif path.startswith("/upload/"):
            self.uploads[path.removeprefix("/upload/")] = body
        return {}

    def file_stream(self, run: str, message: dict) -> None:
        chunk = message.get("files", {}).get("wandb-history.jsonl")
        if chunk:
            rows = self.history.setdefault(run, [])
            rows[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
        if message.get("preempting"):
            self.preempted.add(run)
        if message.get("complete"):
            self.exits[run] = message["exitcode"]

    def graphql(self, request: dict) -> dict:
        name = request.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
        self.operations.append(name)
        reply = getattr(self, f"on_{name}", None)
        return reply(request.get("variables") or {}) if reply else {}

    def on_Viewer(self, v: dict) -> dict:
        return {"viewer": {"id": "u", "entity": "tester", "username": "tester", "flags": "{}", "teams": {"edges": []}}}

    def on_UpsertBucket(self, v: dict) -> dict:
        run = v["name"]
        fresh = run not in self.runs
        self.runs[run] = {**self.runs.get(run, {}), **{key: value for key, value in v.items() if value is not None}}
        bucket = {"id": f"id-{run}", "name": run, "displayName": v.get("displayName") or run, "config": "{}"}
        bucket |= {"sweepName": None, "historyLineCount": len(self.history.get(run, []))}
        bucket["project"] = {**PROJECT, "name": v.get("project") or "uft"}
        return {"upsertBucket": {"bucket": bucket, "inserted": fresh}}

    def on_RunResumeStatus(self, v: dict) -> dict:
        rows = self.history.get(v["name"])
        bucket = None
        if rows:
            tail = json.dumps([json.dumps(rows[-1])])
            summary = {key: value for row in rows for key, value in row.items()}
            bucket = {"id": f"id-{v['name']}", "name": v["name"], "displayName": v["name"], "config": "{}", "tags": []}
            bucket |= {"summaryMetrics": json.dumps(summary), "historyLineCount": len(rows), "historyTail": tail}
            bucket |= {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
        return {"model": {**PROJECT, "name": v.get("project") or "uft", "bucket": bucket}}

    def on_CreateRunFiles(self, v: dict) -> dict:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}

    def on_ArtifactType(self, v: dict) -> dict:
        return {"project": {"artifact": None}}

    def on_CreateArtifact(self, v: dict) -> dict:
        sequence = {"id": "sequence", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": "artifact", "state": "PENDING", "artifactSequence": sequence}}}

    def on_CreateArtifactManifest(self, v: dict) -> dict:
        return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": self._file("manifest")}}}

    def on_UpdateArtifactManifest(self, v: dict) -> dict:
        return {"updateArtifactManifest": {"artifactManifest": {"id": "manifest", "file": self._file("manifest")}}}

    def on_CreateArtifactFiles(self, v: dict) -> dict:
        nodes = [{**self._file(spec["name"]), "artifact": {"id": "artifact"}} for spec in v["input"]["artifactFiles"]]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def on_CommitArtifact(self, v: dict) -> dict:
        return {"commitArtifact": {"artifact": {"id": "artifact", "digest": "digest"}}}

    def _file(self, name: str) -> dict:
        place = {"id": name, "name": name, "displayName": name, "uploadUrl": f"{self.url}/upload/artifact/{name}"}
        return place | {"uploadHeaders": [], "storagePath": None, "uploadMultipartUrls": None}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # wandb's service hangs up without a word
            super().handle_error(request, client_address)


def _handler(standin: Standin) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def reply(self) -> None:
            body = self._body()
            time.sleep(standin.slow)
            text = b"{}" if standin.broken else json.dumps(standin.answer(self.path, body)).encode()
            self.send_response(500 if standin.broken else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = reply

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    return Handler
