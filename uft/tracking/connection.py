"""Whether W&B can be reached: a key that it will accept without asking, and a server that answers.

Asked before `wandb.init`, because that waits 100 s for a dead network and prompts for a missing key on a terminal.
"""

from __future__ import annotations

import netrc
import os
import socket
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from uft.errors import Problem, UftError

CONNECT_TIMEOUT = 2.0  # seconds
UPSTREAM = {"api.forge.coreweave.com": "api.wandb.ai"}  # `wandb login` of earlier versions wrote the second name
SWITCH_OFF = "or keep it on disk:  tracking.mode=offline"


@dataclass(frozen=True)
class Server:
    """The W&B server as wandb's own settings name it."""

    url: str
    key: str | None = None  # from wandb's settings files

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc


@dataclass(frozen=True)
class Choice:
    """The mode to use and, where it is not the one hoped for, why."""

    mode: str  # online or offline
    why: str = ""


def choose(mode: str, server: Server, timeout: float = CONNECT_TIMEOUT) -> Choice:
    """The mode that `tracking.mode` means here and now. `online` without a key is the user's mistake: a UftError."""
    return CHOICES[mode](server, timeout)


def _auto(server: Server, timeout: float) -> Choice:
    if not has_key(server):
        return Choice("offline", "no API key")
    if not reachable(server.url, timeout):
        return Choice("offline", f"{server.host} does not answer")
    return Choice("online")


def _online(server: Server, timeout: float) -> Choice:
    if not has_key(server):
        raise UftError(no_key(f"no W&B API key for {server.host}"))
    return Choice("online")


def _offline(server: Server, timeout: float) -> Choice:
    return Choice("offline")


CHOICES: dict[str, Callable[[Server, float], Choice]] = {"auto": _auto, "online": _online, "offline": _offline}


def no_key(why: str) -> Problem:
    return Problem("tracking.mode=online", why, advice=("log in:  wandb login   (or set WANDB_API_KEY)", SWITCH_OFF))


def has_key(server: Server) -> bool:
    """Whether wandb will find credentials by itself, where it looks: environment, netrc, its settings files."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or server.key:
        return True
    return any(_in_netrc(host) for host in (server.host, UPSTREAM.get(server.host)) if host)


def _in_netrc(host: str) -> bool:
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    path = next((p for name in candidates if (p := Path(name).expanduser()).is_file()), None)
    if path is None:
        return False
    try:
        found = netrc.netrc(str(path)).authenticators(host)
    except (netrc.NetrcParseError, OSError):  # wandb cannot read it either
        return False
    return bool(found and found[2])


def reachable(url: str, timeout: float = CONNECT_TIMEOUT) -> bool:
    """Whether the server, or the proxy on the way to it, accepts a TCP connection within `timeout` seconds.

    In a thread, because a resolver that does not answer knows no timeout.
    """
    address = _address(_proxy(url) or url)
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=timeout).close()
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=connect, daemon=True, name="uft-wandb-reachable")
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "//" in url else f"//{url}")
    return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)


def _proxy(url: str) -> str | None:
    """The proxy that this machine's environment puts before `url`; clusters often let nothing out but through one."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)
