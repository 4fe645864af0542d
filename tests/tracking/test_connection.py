"""Where a key is looked for, and how long an absent network may take."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from uft.errors import UftError
from uft.tracking.wandb import Server, has_key, obstacle, reachable

DEFAULT = Server("https://api.forge.coreweave.com")


def write_netrc(path: Path, machine: str, password: str = "x" * 40) -> None:
    path.write_text(f"machine {machine}\n  login user\n  password {password}\n")
    path.chmod(0o600)


def test_a_key_of_the_environment_or_of_wandbs_settings(monkeypatch):
    assert not has_key(DEFAULT)
    assert has_key(Server(DEFAULT.url, key="x" * 40))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        with monkeypatch.context() as variables:
            variables.setenv(name, "something")
            assert has_key(DEFAULT)


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
def test_a_key_of_netrc(home, name):
    cases = [
        ("api.forge.coreweave.com", DEFAULT.url, True),
        ("api.wandb.ai", DEFAULT.url, True),  # logged in with an earlier version
        ("api.wandb.ai", "https://api.wandb.ai", True),
        ("wandb.lab.org", DEFAULT.url, False),
        ("wandb.lab.org:8080", "http://wandb.lab.org:8080", True),
    ]
    for machine, url, there in cases:
        write_netrc(home / name, machine)
        assert has_key(Server(url)) is there, machine


def test_a_netrc_elsewhere_and_a_broken_one(home, monkeypatch, tmp_path):
    write_netrc(tmp_path / "mine", "api.wandb.ai")
    monkeypatch.setenv("NETRC", str(tmp_path / "mine"))
    assert has_key(DEFAULT)
    (tmp_path / "mine").write_text("machine\n")
    assert not has_key(DEFAULT)


def test_a_server_that_listens_and_one_that_does_not():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert reachable(f"http://127.0.0.1:{port}/wandb")
    assert not reachable(f"http://127.0.0.1:{port}/wandb")


def test_a_resolver_that_never_answers_is_not_waited_for(monkeypatch):
    release = threading.Event()

    def hang(*args: object, **kwargs: object) -> None:
        release.wait(30)
        raise socket.gaierror("nobody knows")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    began = time.monotonic()
    assert not reachable("https://api.example.org", timeout=0.2)
    assert time.monotonic() - began < 2
    release.set()


def test_a_proxy_is_what_must_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert reachable("https://nowhere.invalid")
        monkeypatch.setenv("no_proxy", "nowhere.invalid")
        assert not reachable("https://nowhere.invalid")


def test_what_is_in_the_way_of_an_online_run():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(f"http://127.0.0.1:{listening.getsockname()[1]}", key="x" * 40)
        assert obstacle("auto", server) == ""
    assert obstacle("auto", server) == f"{server.host} does not answer"
    assert obstacle("auto", Server(server.url)) == "no API key"
    assert obstacle("online", server) == "", "whether it answers, wandb.init finds out"
    with pytest.raises(UftError, match="no W&B API key"):
        obstacle("online", Server(server.url))
