"""A hub that breaks off in the middle of a download: one clean line, and the second try works."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from uft.playground.world import model_dir

COMMIT = "c" * 40
NAME = "somebody/tiny"


class Hub:
    """Serves the embedded model as a hub does. `ill`: file -> what happens to requests for it, in turn."""

    def __init__(self) -> None:
        self.ill: dict[str, list[str]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.reply(body=False)

        def do_GET(self) -> None:
            self.reply(body=True)

        def reply(self, body: bool) -> None:
            if self.path == "/cure":
                hub.ill.clear()
            file = model_dir() / self.path.rpartition("/")[2]
            if "/resolve/" not in self.path or not file.is_file():
                self.send_response(204 if self.path == "/cure" else 404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            waiting = hub.ill.get(file.name, []) if body else []
            trouble, content = waiting.pop(0) if waiting else "", file.read_bytes()
            start = int(self.headers.get("Range", "bytes=0-").partition("=")[2].partition("-")[0])
            self.send_response(500 if trouble == "500" else 206 if start else 200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(0 if trouble == "500" else len(content) - start))
            self.end_headers()
            if body and trouble != "500":
                self.wfile.write(content[start : (start + len(content)) // 2] if trouble == "cut" else content[start:])
            self.close_connection = True

    return Handler


@pytest.fixture
def hub():
    served = Hub()
    yield served
    served.server.shutdown()
    served.server.server_close()


PROGRAM = """
import os, sys, urllib.request
import torch
from uft.config.schema import Model
from uft.errors import UftError
from uft.model.load import load_policy, load_tokenizer
model = Model(name="tiny", path=sys.argv[1])
load_tokenizer(model)
try:
    load_policy(model, torch.device("cpu"), 0)
except UftError as error:
    print(error, flush=True)
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/cure").close()
load_policy(model, torch.device("cpu"), 0)
print("there")
"""


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["cut", "500"])
def test_a_download_that_breaks_off(hub, environment, trouble):
    """A process of its own: the library reads its environment once."""
    hub.ill["model.safetensors"] = [trouble] * 50
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    command = [sys.executable, "-c", PROGRAM, NAME]
    variables = os.environ | environment | online
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert f"model.path={NAME}  the model cannot be loaded: " in done.stdout
    assert done.stdout.endswith("there\n")
    assert "Traceback" not in done.stdout + done.stderr
