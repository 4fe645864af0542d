"""W&B as a mirror of the run: it may be offline, slow or broken, and training neither waits for it nor fails with it.

The run's id comes from `run.json` and never changes, so that a resumed run continues the same W&B run, and what W&B
lacks of `metrics.jsonl` is sent again. In one process one W&B run is open at a time: a second first finishes the first.
"""

from __future__ import annotations

import json
import netrc
import os
import shutil
import socket
import struct
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from uft.errors import STOPPED, Problem, UftError
from uft.runs import Run, shown
from uft.tracking.metrics import read_metrics

if TYPE_CHECKING:  # it imports torch, and compare and ls read metrics
    from uft.evaluation.evaluate import Sample

# --- Whether W&B can be reached: a key that it will accept without asking, and a server that answers.
#
# Asked before `wandb.init`, because that waits 100 s for a dead network and prompts for a missing key on a terminal.


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


LONGEST_TAG = 64  # characters; W&B refuses more
AXES = ("step", "tokens", "rows")


@dataclass
class Wandb:
    """Sends what is logged to W&B. `config` is the run's resolved configuration."""

    run: Run
    config: Mapping[str, Any]
    say: Callable[[str], None] = print
    connect_timeout: float = CONNECT_TIMEOUT
    init_timeout: float = 20.0  # wandb's own is 90 s
    finish_timeout: float = 60.0  # wandb's own is forever
    mode: str = field(default="disabled", init=False)
    why: str = field(default="", init=False)
    _handle: Any = field(default=None, init=False)
    _folder: Path = field(default=Path(), init=False)
    _broken: bool = field(default=False, init=False)
    _known: int = field(default=-1, init=False)  # rows of earlier steps are there already
    _shift: int = field(default=0, init=False)  # W&B's `_step` - ours

    def start(self) -> None:
        """Open the W&B run. Raises UftError if it is to be online and there is no key that W&B accepts."""
        asked = self._mode_asked()
        if asked == "disabled":
            self.run.update_info(wandb={**self._info(), "mode": asked})
            return
        try:
            self._begin(asked)
        except UftError:
            raise
        except Exception as error:
            self._handle = None
            _shut_down()
            self.say(f"W&B could not start ({_first_line(error)}); metrics.jsonl has everything.")
            return
        if self.why:
            self.say(f"W&B is offline: {self.why}. Upload it later:  {self.sync_command}")
        self._catch_up()

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self._send(step, lambda: metrics)

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        self._send(step, lambda: {"samples": _table(step, samples, stage)})

    def secure(self) -> None:
        """Nothing: what W&B lacks is in metrics.jsonl."""

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Close the W&B run as what it was. Takes little more than `finish_timeout` seconds at most."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            handle.summary.update({**summary, "status": status})
            if exit_code == STOPPED:
                handle.mark_preempting()  # W&B then shows "preempted" instead of "failed"
            handle.finish(exit_code=exit_code)
        except Exception as error:
            unsent = [*self._info().get("unsent", ()), os.path.relpath(self._folder, self.run.path)]
            self.run.update_info(wandb={**self._info(), "unsent": unsent})
            self.say(f"W&B did not take everything ({_first_line(error)}). Upload the rest:  {self.sync_command}")
        _shut_down()

    @property
    def description(self) -> str:
        """One line for the start card."""
        if self._handle is None:
            return "metrics.jsonl, no W&B"
        return f"metrics.jsonl, W&B {self.mode}: {self._handle.url if self.mode == 'online' else self._folder}"

    @property
    def sync_command(self) -> str:
        return f"uft sync {quote(shown(self.run.path))}"

    def _mode_asked(self) -> str:
        """`tracking.mode`; under `auto` the WANDB_MODE that users of W&B know."""
        mode = self.config["tracking"]["mode"]
        wish = os.environ.get("WANDB_MODE", "")
        return wish if mode == "auto" and wish in ("online", "offline", "disabled") else mode

    def _begin(self, asked: str) -> None:
        settings = _quiet_service().settings
        choice = choose(asked, Server(settings.base_url, settings.api_key), self.connect_timeout)
        try:
            self._open(choice)
        except Exception as error:
            if choice.mode == "offline":
                raise
            _refuse_bad_key(asked, error)
            _shut_down()
            self._open(Choice("offline", _first_line(error)))

    def _open(self, choice: Choice) -> None:
        earlier = files(inside(self.run.path, self._info().get("dirs", ())))
        for file in earlier:
            repair(file)
        handle = self._init(choice.mode)
        for axis in AXES:  # steps are the x-axis of every chart; tokens and rows can be chosen instead
            handle.define_metric(axis, hidden=True)
        handle.define_metric("*", step_metric="step")
        self._handle, self.mode, self.why = handle, choice.mode, choice.why
        self._known = self._known_step(earlier)
        self._shift = max(0, handle.starting_step - self._known) if handle.resumed else 0
        self._note()

    def _known_step(self, earlier: Sequence[Path]) -> int:
        """The last step that the server, or W&B's local logs of earlier sessions, have; -1: none."""
        if self.mode == "online":
            return int(self._handle.summary.get("step", -1)) if self._handle.resumed else -1
        return max((step for file in earlier if (step := last_step(file)) is not None), default=-1)

    def _catch_up(self) -> None:
        """Send what `metrics.jsonl` has and W&B lacks: rows lost in a kill, or of sessions that were offline."""
        for line in read_metrics(self.run):
            if line["step"] > self._known:
                self.log(line["step"], line)

    def _init(self, mode: Any) -> Any:
        import wandb

        _quiet_service()
        tracking = self.config["tracking"]
        agent = _agent()
        return wandb.init(
            mode=mode,
            id=self._id(agent),
            resume="allow",
            reinit="finish_previous",  # else a second run of this process would log into the first
            name=self.run.name,
            project=agent.get("WANDB_PROJECT") or tracking["project"],
            entity=agent.get("WANDB_ENTITY") or tracking["entity"],
            group=tracking["group"] or self.config["sweep"]["name"] or self.run.info().get("sweep"),
            job_type=tracking["job_type"],
            tags=self._tags(),
            config=dict(self.config),
            dir=str(self.run.path),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=self.init_timeout,
                finish_timeout=self.finish_timeout,
                finish_timeout_raises=True,
            ),
        )

    def _id(self, agent: Mapping[str, str]) -> str:
        return self._info().get("id") or agent.get("WANDB_RUN_ID") or self.run.info()["id"]

    def _info(self) -> dict[str, Any]:
        """What earlier sessions of this run noted about W&B in `run.json`."""
        return self.run.info().get("wandb", {})

    def _tags(self) -> list[str]:
        names = [self.config[group]["name"] for group in ("objective", "data", "model")]
        return list(dict.fromkeys(str(tag)[:LONGEST_TAG] for tag in (*names, *self.config["tracking"]["tags"]) if tag))

    def _note(self) -> None:
        self._folder = Path(self._handle.dir).parent
        here = os.path.relpath(self._folder, self.run.path)  # relative: a run folder can be moved
        dirs = list(dict.fromkeys([*self._info().get("dirs", ()), here]))
        url = self._handle.url if self.mode == "online" else None
        noted = {"id": self._handle.id, "mode": self.mode, "url": url, "dirs": dirs}
        self.run.update_info(wandb={**self._info(), **noted})

    def _send(self, step: int, row: Callable[[], Mapping[str, Any]]) -> None:
        """Send a row of step `step`, unless it is there.

        W&B drops what is logged at a `_step` that it has seen. Steps trained again since the last checkpoint are left
        out; the last step it knows may lack its evaluation and is sent again, one `_step` further.
        """
        if self._handle is None or self._broken or step < self._known:
            return
        try:
            with _staging_in(self.run.path / "wandb"):
                self._handle.log({"step": step, **row()}, step=step + self._shift)
        except Exception as error:
            self._broken = True
            self.say(f"W&B stopped taking metrics ({_first_line(error)}); metrics.jsonl has everything.")


def _refuse_bad_key(asked: str, error: Exception) -> None:
    import wandb

    if asked == "online" and isinstance(error, wandb.errors.AuthenticationError):
        raise UftError(no_key(_first_line(error))) from error


def _quiet_service() -> Any:
    """wandb's state in this process, with its settings; started without its usual lines."""
    import wandb

    return wandb.setup(wandb.Settings(silent=True))


def _shut_down() -> None:
    """Stop wandb's service.

    Only then is an offline run on disk to its end; after a failure, the service would keep the run's id as in use.
    """
    import wandb

    with suppress(Exception):  # it may be what died
        wandb.teardown()


def _agent() -> Mapping[str, str]:
    """The environment if a W&B sweep agent made it. Else W&B's variables would give every job of a sweep one id."""
    return os.environ if os.environ.get("WANDB_SWEEP_ID") else {}


def _table(step: int, samples: Sequence[Sample], stage: str | None) -> Any:
    import wandb

    verdicts = sorted({name for sample in samples for name in sample.verdict})
    named = {} if stage is None else {"stage": stage}
    columns: list[str | int] = ["step", *named, "source", "row", "prompt", "reply", "answer", *verdicts]
    rows = [
        [
            step,
            *named.values(),
            s.source,
            s.row,
            s.prompt,
            s.reply,
            s.answer,
            *(s.verdict.get(name) for name in verdicts),
        ]
        for s in samples
    ]
    return wandb.Table(columns=columns, data=rows)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _staging_in(folder: Path) -> Iterator[None]:
    """Copies of tables, which wandb keeps under the home directory, go where the run is, unless the user chose."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder / "data")
    try:
        yield
    finally:
        os.environ.pop("WANDB_DATA_DIR", None)


# --- W&B's local logs of a run: what they hold, and their repair after a kill.
#
# Each process of a run writes a segment, `wandb/*run-TIME-ID/run-ID.wandb`: seven bytes of header, then records in
# LevelDB's log framing (blocks of 32 KiB; a record is one fragment, or several marked first, middle and last, each
# with
# the CRC of kind and content, length and kind in seven bytes). The block being filled stays in memory. A process that
# is
# killed thus loses some rows and leaves half a record, and `wandb sync` stops there without uploading the segments
# that
# follow. Cut at the last whole record, a segment uploads like any other.


BLOCK = 32 * 1024
HEADER = 7
MAGIC = b":W&B"
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def files(folders: Iterable[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("run-*.wandb"))]


def inside(run: Path, names: Iterable[str]) -> list[Path]:
    """The folders of these names below `run`. Files in them are repaired, so one that a record names outside is not
    gone to."""
    folders = (run / name for name in names)
    return [folder for folder in folders if folder.resolve().is_relative_to(run.resolve())]


def readable(path: Path) -> bool:
    """Whether W&B would take the file for a log, or one that had hardly begun."""
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
    return MAGIC.startswith(start)


def repair(path: Path, keep: Path | None = None) -> int:
    """Cut a segment at its last whole record; how many bytes were cut. The file as it was is kept as `keep`."""
    data = path.read_bytes()
    ends = [end for end, _ in records(data)]
    whole = ends[-1] if ends else min(HEADER, len(data))
    if whole < len(data):
        if keep is not None and not keep.exists():
            shutil.copy2(path, keep)
        os.truncate(path, whole)
    return len(data) - whole


def last_step(path: Path) -> int | None:
    """The last `step` among the history rows of a segment."""
    for record in reversed(list(parsed(path))):
        for item in record.history.item:
            if item.key == "step" or list(item.nested_key) == ["step"]:
                return int(json.loads(item.value_json))
    return None


def kinds(path: Path) -> set[str]:
    """What kinds of records a segment has: run, history, exit, ..."""
    return {record.WhichOneof("record_type") for record in parsed(path)}


def parsed(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2 as messages  # made at run time: no type checker sees what is in it

    for _, content in records(path.read_bytes()):
        yield messages.Record.FromString(content)  # type: ignore[attr-defined]


def records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset of its end, content) of each record, up to the first that is torn or damaged."""
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # a block's last bytes, too few for a fragment, are padding
            position += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        start, position = position + HEADER, position + HEADER + length
        if not FULL <= kind <= LAST or position > len(data) or zlib.crc32(data[start - 1 : position]) != crc:
            return
        parts = data[start:position] if kind in (FULL, FIRST) else parts + data[start:position]
        if kind in (FULL, LAST):
            yield position, parts
