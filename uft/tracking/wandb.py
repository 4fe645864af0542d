"""W&B mirrors metrics.jsonl and samples.jsonl of a run. Training neither waits for it nor fails with it.

Offline, nothing is sent: `uft sync` sends the files later. Online, the rows that the server lacks are sent when a
session starts, and further rows as they are logged, by a thread: wandb blocks for seconds where it uploads a table and
the server does not answer. The run's id is in `run.json` and never changes, so that a resumed run continues the same
W&B run. In one process one W&B run is open at a time: a second first finishes the first.
"""

from __future__ import annotations

import atexit
import math
import netrc
import os
import shlex
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from uft.config.schema import Tracking
from uft.errors import FAILED, GOOD, STOPPED, Problem, UftError, first_line
from uft.runs import SWEEP_FILE, Run, read_json, typed_path
from uft.tracking.metrics import read_metrics, read_samples

if TYPE_CHECKING:
    from uft.evaluation.evaluate import Sample

Row = tuple[int, Mapping[str, Any]]  # step and values, "samples" being rows of samples.jsonl
LONGEST_TAG = 64  # characters; W&B refuses more
WAITING = 10_000  # rows that may wait to be sent; one more and W&B is left behind
AXES = ("step", "tokens", "rows")
TRAINING = ("loss", "nll", "lr", "grad_norm", "epoch", "seconds", "supervised_tokens", "tokens_per_second", "mfu")


@dataclass
class Wandb:
    """Sends what is logged to W&B. `config` is the run's resolved configuration.

    `folder`: where W&B keeps its files while this process uploads a run that another process trained; nothing about
    this machine is sent then. None: in the run's folder.
    """

    run: Run
    config: Mapping[str, Any]
    say: Callable[[str], None] = print
    init_timeout: float = 20.0  # wandb's own is 90 s
    finish_timeout: float = 60.0  # wandb's own is forever
    folder: Path | None = None
    mode: str = field(default="disabled", init=False)  # disabled, offline or online
    sent: set[int] = field(default_factory=set, init=False)  # steps
    failure: str = field(default="", init=False)  # why W&B did not take everything
    _handle: Any = field(default=None, init=False)  # wandb's run
    _known: int = field(default=-1, init=False)  # the last step that the server had when this session began
    _shift: int = field(default=0, init=False)  # W&B's `_step` minus the step
    _waiting: Queue[Row | None] = field(default_factory=Queue, init=False)  # None ends the thread
    _sender: threading.Thread | None = field(default=None, init=False)
    _failure_told: bool = field(default=False, init=False)  # of the failure

    def start(self) -> None:
        """Open the W&B run. Raises UftError if it is to be online and there is no key that W&B accepts."""
        identity, tracking, why = self._identity(), self.config["tracking"], ""
        mode, variable, wish = tracking["mode"], "WANDB_MODE", os.environ.get("WANDB_MODE", "")
        if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
            variable, wish = "WANDB_DISABLED", "disabled"
        if wish in ("online", "offline", "disabled") and mode == "auto":
            mode = wish
        elif wish in {"online", "offline", "disabled"} - {mode} and mode != "disabled" and not self.folder:
            self.say(f"{variable}={os.environ[variable]} is not followed: tracking.mode={mode}")
        for key in ("project", "entity") if mode != "disabled" and not self.folder else ():
            wanted, used = os.environ.get(f"WANDB_{key.upper()}"), identity.get(key) or tracking[key]
            if wanted and wanted != used:
                self.say(f"WANDB_{key.upper()}={wanted} is not followed: this run has tracking.{key}={used or 'null'}")
        if mode in ("auto", "online"):
            why = self._go_online(mode)
            mode = "offline" if why else "online"
        self.mode = mode
        if mode == "disabled":
            self._note(mode="disabled")
        elif mode == "offline":
            self._note(**self._identity(), mode="offline", url=None, sent=None)
            if why:
                self.say(f"W&B is offline: {why}. Upload it later:  {self.sync_command}")

    def connect(self) -> None:
        """Open the W&B run online and begin to send the rows that the server lacks. Raises any error of wandb's."""
        import wandb

        own_media_folder(os.getpid())
        identity, tracking = self._identity(), self.config["tracking"]
        names = [self.config[group]["name"] for group in ("objective", "data", "model")]
        typed = command(self.run)
        nothing_of_here: dict[str, Any] = {"x_disable_stats": True, "x_disable_meta": True, "disable_git": True}
        handle = wandb.init(
            mode="online",
            id=identity["id"],
            resume="allow",
            reinit="finish_previous",  # else a second run of this process would log into the first
            name=self.run.name,
            project=identity.get("project") or tracking["project"],
            entity=identity.get("entity") or tracking["entity"],
            group=identity.get("group"),
            notes=typed or None,
            job_type=tracking["job_type"],
            tags=list(dict.fromkeys(str(tag)[:LONGEST_TAG] for tag in (*names, *tracking["tags"]) if tag)),
            config={**self.config, "run_info": about(self.run)},
            dir=str(self.folder or self.run.path),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=self.init_timeout,
                finish_timeout=self.finish_timeout,
                finish_timeout_raises=True,
                **(nothing_of_here if self.folder else {}),
            ),
        )
        for axis in AXES:  # steps are the x-axis of every chart; tokens and rows can be chosen instead
            handle.define_metric(axis, hidden=True)
        handle.define_metric("*", step_metric="step")
        self._handle, self.mode = handle, "online"
        if handle.resumed:  # `starting_step` follows the last row; the summary tells how `_step` differs from our step
            last = handle.summary
            ahead = int(last.get("_step", last.get("step", 0))) - int(last.get("step", 0))
            self._known, self._shift = handle.starting_step - 1 - ahead, ahead + 1
        self._note(**identity, mode="online", url=handle.url, sent=None)
        samples = ((step, {"samples": rows}) for step, rows in read_samples(self.run).items())
        written = [*((row["step"], row) for row in read_metrics(self.run)), *samples]
        backlog = sorted(written, key=lambda row: row[0])
        self._sender = threading.Thread(target=self._send, args=(handle, backlog), daemon=True, name="uft-wandb")
        self._sender.start()
        atexit.register(self._await_sender)  # before wandb's own end, which takes nothing more

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self._queue(step, dict(metrics))

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        named = {"step": step} if stage is None else {"step": step, "stage": stage}
        self._queue(step, {"samples": [{**named, **asdict(sample)} for sample in samples]})

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Close the W&B run as what it was. Takes little more than twice `finish_timeout` seconds at most."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        atexit.unregister(self._await_sender)
        if self._await_sender():
            try:
                found = {**summary, **run_summary(self.run), "status": status}
                handle.summary.update({panel(name): value for name, value in found.items()})
                if exit_code == STOPPED:
                    handle.mark_preempting()  # W&B then shows "preempted" instead of "failed"
                handle.finish(exit_code=exit_code)
            except Exception as error:
                self.failure = first_line(error).rstrip(".")
        if self.failure:
            self.say(f"W&B did not take everything ({self.failure}). Upload the rest:  {self.sync_command}")
        else:
            self._note(sent=extent(self.run, status))
        shut_down()

    @property
    def description(self) -> str:
        """One line for the start card."""
        if self.mode == "disabled":
            return "metrics.jsonl, no W&B"
        return f"metrics.jsonl, W&B {self.mode}: {self._handle.url if self.mode == 'online' else self.sync_command}"

    @property
    def sync_command(self) -> str:
        return f"uft sync {typed_path(self.run.path)}"

    def _go_online(self, mode: str) -> str:
        """Open the run online; the reason where a server does not answer or refuses, or there is no key for `auto`."""
        try:
            why = obstacle(mode, wandb_server())
            if not why:
                self.connect()
                return ""
        except UftError:
            raise
        except Exception as error:  # also that wandb is not installed
            self._handle, why = None, first_line(error).rstrip(".")
            if mode == "online" and type(error).__name__ == "AuthenticationError":
                raise UftError(no_key(why)) from error
        shut_down()
        return why

    def _identity(self) -> dict[str, str]:
        """Id and group of the W&B run, project and entity that the environment names; noted by the first session.

        WANDB_PROJECT and WANDB_ENTITY count where the configuration leaves the default, or where a W&B sweep's agent
        set them. The id is an agent's alone: else every job of a sweep would have the same one.
        """
        info, tracking = self.run.info(), self.config["tracking"]
        noted = info.get("wandb", {})
        environment = {} if self.folder or "id" in noted else os.environ
        agent = environment if environment.get("WANDB_SWEEP_ID") else {}
        identity = {"id": noted.get("id") or agent.get("WANDB_RUN_ID") or info["id"]}
        for key in ("project", "entity"):
            counts = agent or tracking[key] == getattr(Tracking(), key)
            identity[key] = noted.get(key) or (environment.get(f"WANDB_{key.upper()}") if counts else None)
        identity["group"] = noted.get("group") or group_of(self.run, self.config)
        return {name: value for name, value in identity.items() if value}

    def _note(self, **values: Any) -> None:
        """Keep facts about the W&B run in `run.json`."""
        self.run.update_info(wandb={**self.run.info().get("wandb", {}), **values})

    def _queue(self, step: int, values: Mapping[str, Any]) -> None:
        """Leave a row to the thread that sends it. Never waits: W&B is given up where too many rows wait."""
        if self._handle is None:
            return
        if self._waiting.qsize() >= WAITING:
            self.failure = self.failure or f"it does not keep up: {WAITING} rows wait"
        if not self.failure:
            self._waiting.put((step, values))
        if self.failure and not self._failure_told:
            self._failure_told = True
            self.say(f"W&B stopped taking metrics ({self.failure}); metrics.jsonl has everything.")

    def _await_sender(self) -> bool:
        """Wait until wandb has all rows, for `finish_timeout` seconds at most; whether the thread has ended.

        A slow server takes many seconds for a table, and what was logged meanwhile stands behind it.
        """
        assert self._sender is not None
        self._waiting.put(None)
        self._sender.join(self.finish_timeout)
        if self._sender.is_alive():
            self.failure = self.failure or f"the server does not answer for {self.finish_timeout:.0f} s"
        return not self._sender.is_alive()

    def _send(self, handle: Any, backlog: Sequence[Row]) -> None:
        """Send the rows of the files, then those that are logged, until the last or a failure. In a thread of its own.

        W&B drops a row at a `_step` that it has seen. Steps trained again since the last checkpoint are left out. The
        last step on the server may lack its evaluation: its new values are sent, one `_step` further.
        """
        try:
            with _staging_in((self.folder or self.run.path) / "wandb"):
                for step, values in chain(backlog, iter(self._waiting.get, None)):
                    if self.failure:
                        return
                    if step < self._known:
                        continue
                    if "samples" in values:
                        values = sample_columns(values["samples"])
                    values = {panel(name): value for name, value in values.items()}
                    if step == self._known:
                        values = {name: value for name, value in values.items() if not _has(handle, name, value)}
                    if values:
                        handle.log({"step": step, **values}, step=step + self._shift)
                        self.sent.add(step)
        except Exception as error:
            self.failure = first_line(error).rstrip(".")


def panel(name: str) -> str:
    """A metric's name in W&B, which makes a section of what stands before the first slash: `train/loss` for `loss`,
    `eval_pairs/nll` for `eval/pairs/nll`. metrics.jsonl keeps its names."""
    if name in TRAINING or name.startswith("memory_"):
        return f"train/{name}"
    source, slash, metric = name.removeprefix("eval/").rpartition("/")
    return f"eval_{source}/{metric}" if slash and name.startswith("eval/") else name


def group_of(run: Run, config: Mapping[str, Any]) -> str | None:
    """The W&B group: the configured one, else the sweep with the minute it was made, since others have its name."""
    tracking, sweep = config["tracking"], config["sweep"]["name"] or run.info().get("sweep")
    file = run.path.parent / SWEEP_FILE
    made = read_json(file).get("made") if sweep and not tracking["group"] and file.is_file() else None
    minute = str(made)[:16].replace("T", " ").replace(":", ".")  # W&B's filters know no colon
    return tracking["group"] or (f"{sweep} {minute}" if made else sweep)


def command(run: Run) -> str:
    """What was typed; "" where it is not known."""
    first, *words = run.info().get("command") or [""]
    return f"{first} {shlex.join(words)}".strip()


def about(run: Run) -> dict[str, Any]:
    """What the configuration does not say of a run: command, code, data, size of the model."""
    info, files = run.info(), [run.path / name for name in ("data.json", "check.json")]
    data, checks = (read_json(file) if file.is_file() else {} for file in files)
    code = info.get("code") or {}
    return {
        "command": command(run),
        "commit": code.get("commit"),
        "uncommitted_changes": code.get("dirty"),
        "data_digest": info.get("data_digest"),
        "model": next(iter(checks.get("model", [])), None),
        "parameters": checks.get("parameters"),
        "rows": {name: source.get("rows") for name, source in data.get("sources", {}).items()},
    }


def run_summary(run: Run) -> dict[str, Any]:
    """`min/NAME` and `max/NAME` of every metric of the evaluation over all sources, the metric that chose the best
    checkpoint, its step, and what the run took."""
    result, found = run.result(), dict[str, Any]()
    for row in read_metrics(run):
        for name, value in row.items():
            if name.startswith("eval/") and name.count("/") == 1 and math.isfinite(value):
                found[f"min/{name}"] = min(value, found.get(f"min/{name}", value))
                found[f"max/{name}"] = max(value, found.get(f"max/{name}", value))
    found |= {f"best/{name}": value for name, value in (result.get("best") or {}).items()}
    names = {"best/step": "best_step", "peak_memory_bytes": "peak_memory_bytes", "seconds": "seconds"}
    return found | {name: result[key] for name, key in names.items() if result.get(key) is not None}


def _has(handle: Any, name: str, value: Any) -> bool:
    """Whether the last row on the server has this value. The file of a table is named after its `_step`."""
    last = handle.summary
    if name == "samples":
        return f"/samples_{last.get('_step')}_" in str((last.get(name) or {}).get("path"))
    return name == "step" or last.get(name) == value or str(last.get(name)).lower() == str(value).lower()  # NaN


def unsent(run: Run) -> bool:
    """Whether W&B may lack something of the run."""
    info = run.info().get("wandb", {})
    if info.get("mode", "disabled") == "disabled":
        return False
    if "sent" in info:
        return info["sent"] != extent(run, run.status)
    if info["mode"] == "online":  # of the previous version, as all below
        return "unsent" in info or run.status == "interrupted"
    logs = list(run.path.glob("wandb/offline-run-*"))
    return not logs or not all(any(log.glob("*.synced")) for log in logs)  # `wandb sync` leaves a mark


def extent(run: Run, status: str) -> dict[str, Any]:
    """What W&B has when it has the whole run: compared with a later one, it tells whether something was added."""
    files = {"metrics": run.metrics_file, "samples": run.samples_file}
    return {"status": status, **{name: file.stat().st_size if file.is_file() else 0 for name, file in files.items()}}


def sample_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of samples.jsonl as a table, with a column for each verdict."""
    import wandb

    verdicts = sorted({name for row in rows for name in row["verdict"]})
    names = ["step", *(["stage"] if "stage" in rows[0] else []), "source", "row", "prompt", "reply", "answer"]
    data = [[*(row.get(name) for name in names), *(row["verdict"].get(name) for name in verdicts)] for row in rows]
    return {"samples": wandb.Table(columns=[*names, *verdicts], data=data)}


@cache
def own_media_folder(process: int) -> None:
    """Give this process a folder of its own for the files of tables.

    wandb makes one when it is imported. Jobs of a sweep are forks of a process that has imported it, share that folder,
    and the first one that ends removes it for all.
    """
    from wandb.sdk.data_types import table

    table.MEDIA_TMP = tempfile.TemporaryDirectory(prefix="uft-wandb-")


def shut_down() -> None:
    """Stop wandb's service. After a failure it would keep the run's id as in use."""
    with suppress(Exception):  # the service may be what died
        import wandb

        wandb.teardown()


@contextmanager
def _staging_in(folder: Path) -> Iterator[None]:
    """Copies of tables, which wandb keeps under the home directory, go where the run is, unless the user chose."""
    ours = str(folder / "data")
    chosen = os.environ.setdefault("WANDB_DATA_DIR", ours)
    try:
        yield
    finally:
        if chosen == ours:
            os.environ.pop("WANDB_DATA_DIR", None)


# --- Whether W&B can be reached: a key that it will accept without asking, and a server that answers. Asked before
# `wandb.init`, because that waits 100 s for a dead network and prompts for a missing key on a terminal.


UPSTREAM = {"api.forge.coreweave.com": "api.wandb.ai"}  # `wandb login` of earlier versions wrote the second name


@dataclass(frozen=True)
class Server:
    """The W&B server as wandb's own settings name it."""

    url: str
    key: str | None = None  # from wandb's settings files

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc


def wandb_server() -> Server:
    """The server that wandb would use."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    return Server(settings.base_url, settings.api_key)


def obstacle(mode: str, server: Server) -> str:
    """Why a run cannot be online, as `tracking.mode` asks (auto or online); "" where it can.

    `online` without a key is the user's mistake: a UftError. Whether its server answers, wandb will find out.
    """
    if not has_key(server):
        if mode == "online":
            raise UftError(no_key(f"no W&B API key for {server.host}"))
        return "no API key"
    return f"{server.host} does not answer" if mode == "auto" and not reachable(server.url) else ""


def no_key(why: str) -> Problem:
    advice = ("log in:  wandb login   (or set WANDB_API_KEY)", "or keep it on disk:  tracking.mode=offline")
    return Problem("tracking.mode=online", why, advice=advice)


def has_key(server: Server) -> bool:
    """Whether wandb will find credentials by itself, where it looks: environment, netrc, its settings files."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or server.key:
        return True
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    file = next((path for name in candidates if (path := Path(name).expanduser()).is_file()), None)
    if file is None:
        return False
    try:
        logins = [netrc.netrc(str(file)).authenticators(host) for host in (server.host, UPSTREAM.get(server.host, ""))]
    except (netrc.NetrcParseError, OSError):  # wandb cannot read it either
        return False
    return any(login and login[2] for login in logins)


def reachable(url: str, timeout: float = 2.0) -> bool:
    """Whether the server, or the proxy on the way to it, accepts a TCP connection within `timeout` seconds.

    In a thread, because a resolver that does not answer knows no timeout.
    """
    parts, answered = urlsplit(url), threading.Event()
    if not urllib.request.proxy_bypass(parts.hostname or ""):  # clusters often let nothing out but through a proxy
        proxy = urllib.request.getproxies().get(parts.scheme, url)
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection(address, timeout=timeout).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True, name="uft-wandb-reachable")
    thread.start()
    thread.join(timeout)
    return answered.is_set()


# --- Upload runs that W&B lacks something of, from their metrics.jsonl and samples.jsonl, and know what arrived.
#
# The server tells which steps it has, and only later rows are sent. What arrived is noted in `run.json`, so that a
# second call has nothing to do; an upload that broke off goes on where the server's rows end.


UPLOAD_TIMEOUT = 900.0  # seconds after which the upload of a run is given up
EXIT_CODES = {"finished": GOOD, "stopped": STOPPED}


def upload_state(run: Run) -> str:
    """running, untracked, arrived, or due: W&B may lack something of it. Nothing is touched."""
    if run.status == "running":
        return "running"
    if run.info().get("wandb", {}).get("mode", "disabled") == "disabled":
        return "untracked"
    return "due" if unsent(run) else "arrived"


def upload(run: Run) -> tuple[int, str]:
    """Upload a run: (how many steps the server lacked, why not everything arrived or "")."""
    with tempfile.TemporaryDirectory(prefix="uft-sync-", ignore_cleanup_errors=True) as folder:
        try:
            status = run.status
            place = Path(folder)
            tracker = Wandb(run, run.config(), lambda line: None, finish_timeout=UPLOAD_TIMEOUT, folder=place)
            tracker.connect()
            summary = {**run.result().get("final", {}), "steps": run.steps}
            tracker.finish(status, EXIT_CODES.get(status, FAILED), summary)
            return len(tracker.sent), tracker.failure
        except UftError as error:
            return 0, "; ".join(f"{problem.what} {problem.why}" for problem in error.problems)
        except Exception as error:
            shut_down()
            return 0, first_line(error).rstrip(".")
