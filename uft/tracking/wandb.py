"""W&B mirrors metrics.jsonl and samples.jsonl of a run. Training neither waits for it nor fails with it.

Offline, nothing is sent: `uft sync` sends the files later. Online, the rows that the server lacks are sent when a
session starts, and further rows as they are logged. The run's id is in `run.json` and never changes, so that a resumed
run continues the same W&B run. In one process one W&B run is open at a time: a second first finishes the first.
"""

from __future__ import annotations

import netrc
import os
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from uft.config.schema import Tracking
from uft.errors import FAILED, GOOD, STOPPED, Problem, UftError
from uft.runs import Run, shown
from uft.tracking.metrics import read_metrics, read_samples

if TYPE_CHECKING:
    from uft.evaluation.evaluate import Sample

LONGEST_TAG = 64  # characters; W&B refuses more
AXES = ("step", "tokens", "rows")


@dataclass
class Wandb:
    """Sends what is logged to W&B. `config` is the run's resolved configuration.

    `folder` is where W&B keeps its own files (None: the run's folder). `uploads`: this process uploads a run that
    another process trained, and sends nothing about this machine.
    """

    run: Run
    config: Mapping[str, Any]
    say: Callable[[str], None] = print
    connect_timeout: float = 2.0
    init_timeout: float = 20.0  # wandb's own is 90 s
    finish_timeout: float = 60.0  # wandb's own is forever
    folder: Path | None = None
    uploads: bool = False
    mode: str = field(default="disabled", init=False)  # disabled, offline or online
    sent: set[int] = field(default_factory=set, init=False)  # steps
    failure: str = field(default="", init=False)  # why W&B did not take everything
    _handle: Any = field(default=None, init=False)  # wandb's run
    _known: int = field(default=-1, init=False)  # the last step that the server had when this session began
    _shift: int = field(default=0, init=False)  # W&B's `_step` minus the step

    def start(self) -> None:
        """Open the W&B run. Raises UftError if it is to be online and there is no key that W&B accepts."""
        asked, (variable, wish) = self.config["tracking"]["mode"], wished_mode()
        if asked == "auto" and wish:
            asked = wish
        elif wish not in ("", asked) and asked != "disabled" and not self.uploads:
            self.say(f"{variable}={os.environ[variable]} is not followed: tracking.mode={asked}")
        identity, tracking = self._identity(), self.config["tracking"]
        for key in ("project", "entity") if asked != "disabled" and not self.uploads else ():
            wanted, used = os.environ.get(f"WANDB_{key.upper()}"), identity.get(key) or tracking[key]
            if wanted and wanted != used:
                self.say(f"WANDB_{key.upper()}={wanted} is not followed: this run has tracking.{key}={used or 'null'}")
        choice = self._try_to_connect(asked) if asked in ("auto", "online") else Choice(asked)
        self.mode = choice.mode
        if self.mode == "disabled":
            self._note(mode="disabled")
        elif self.mode == "offline":
            self._note(**self._identity(), mode="offline", url=None, sent=None)
            if choice.why:
                self.say(f"W&B is offline: {choice.why}. Upload it later:  {self.sync_command}")

    def connect(self) -> None:
        """Open the W&B run online and send the rows that the server lacks. Raises any error of wandb's."""
        import wandb

        identity, tracking = self._identity(), self.config["tracking"]
        names = [self.config[group]["name"] for group in ("objective", "data", "model")]
        settings: dict[str, Any] = {"x_disable_stats": True, "x_disable_meta": True, "disable_git": True}
        handle = wandb.init(
            mode="online",
            id=identity["id"],
            resume="allow",
            reinit="finish_previous",  # else a second run of this process would log into the first
            name=self.run.name,
            project=identity.get("project") or tracking["project"],
            entity=identity.get("entity") or tracking["entity"],
            group=tracking["group"] or self.config["sweep"]["name"] or self.run.info().get("sweep"),
            job_type=tracking["job_type"],
            tags=list(dict.fromkeys(str(tag)[:LONGEST_TAG] for tag in (*names, *tracking["tags"]) if tag)),
            config=dict(self.config),
            dir=str(self.folder or self.run.path),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=self.init_timeout,
                finish_timeout=self.finish_timeout,
                finish_timeout_raises=True,
                **(settings if self.uploads else {}),
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
        rows, samples = {row["step"]: row for row in read_metrics(self.run)}, read_samples(self.run)
        for step in sorted(rows.keys() | samples.keys()):
            if step in rows:
                self.log(step, rows[step])
            if step in samples:
                self._send(step, partial(sample_columns, samples[step]))

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self._send(step, lambda: metrics)

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        named = {"step": step} if stage is None else {"step": step, "stage": stage}
        self._send(step, lambda: sample_columns([{**named, **asdict(sample)} for sample in samples]))

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
            self.failure = first_line(error)
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
        return f"uft sync {quote(shown(self.run.path))}"

    def _try_to_connect(self, asked: str) -> Choice:
        """Go online if it can be. A server that does not answer, or refuses, leaves the run offline."""
        try:
            choice = choose(asked, wandb_server(), self.connect_timeout)
            if choice.mode == "online":
                self.connect()
                return choice
        except UftError:
            raise
        except Exception as error:  # also that wandb is not installed
            self._handle = None
            if asked == "online" and type(error).__name__ == "AuthenticationError":
                raise UftError(no_key(first_line(error))) from error
            choice = Choice("offline", first_line(error))
        shut_down()
        return choice

    def _identity(self) -> dict[str, str]:
        """Id of the W&B run, and the project and entity that the environment names; noted by the first session.

        WANDB_PROJECT and WANDB_ENTITY count where the configuration leaves the default, or where a W&B sweep's agent
        set them. The id is an agent's alone: else every job of a sweep would have the same one.
        """
        info, tracking = self.run.info(), self.config["tracking"]
        noted = info.get("wandb", {})
        environment = {} if self.uploads or "id" in noted else os.environ
        agent = environment if environment.get("WANDB_SWEEP_ID") else {}
        found = {"id": noted.get("id") or agent.get("WANDB_RUN_ID") or info["id"]}
        for key in ("project", "entity"):
            counts = agent or tracking[key] == getattr(Tracking(), key)
            found[key] = noted.get(key) or (environment.get(f"WANDB_{key.upper()}") if counts else None)
        return {name: value for name, value in found.items() if value}

    def _note(self, **values: Any) -> None:
        """Keep facts about the W&B run in `run.json`."""
        self.run.update_info(wandb={**self.run.info().get("wandb", {}), **values})

    def _send(self, step: int, row: Callable[[], Mapping[str, Any]]) -> None:
        """Send a row of step `step` unless the server has it.

        W&B drops a row at a `_step` that it has seen. Steps trained again since the last checkpoint are left out. The
        last step on the server may lack its evaluation: its new values are sent, one `_step` further.
        """
        if self._handle is None or self.failure or step < self._known:
            return
        try:
            with _staging_in((self.folder or self.run.path) / "wandb"):
                values = row()
                if step == self._known:
                    values = {name: value for name, value in values.items() if not self._has(name, value)}
                if values:
                    self._handle.log({"step": step, **values}, step=step + self._shift)
                    self.sent.add(step)
        except Exception as error:
            self.failure = first_line(error)
            self.say(f"W&B stopped taking metrics ({self.failure}); metrics.jsonl has everything.")

    def _has(self, name: str, value: Any) -> bool:
        """Whether the last row on the server has this value. The file of a table is named after its `_step`."""
        last = self._handle.summary
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


def shut_down() -> None:
    """Stop wandb's service. After a failure it would keep the run's id as in use."""
    with suppress(Exception):  # the service may be what died
        import wandb

        wandb.teardown()


def first_line(error: Exception) -> str:
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


@dataclass(frozen=True)
class Choice:
    """The mode to use and, where it is not the one hoped for, why."""

    mode: str  # online or offline
    why: str = ""


def wished_mode() -> tuple[str, str]:
    """(variable, mode) that W&B's environment variables ask for; empty where they ask for none."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "WANDB_DISABLED", "disabled"
    wish = os.environ.get("WANDB_MODE", "")
    return ("WANDB_MODE", wish) if wish in ("online", "offline", "disabled") else ("", "")


def wandb_server() -> Server:
    """The server that wandb would use."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    return Server(settings.base_url, settings.api_key)


def choose(mode: str, server: Server, timeout: float = 2.0) -> Choice:
    """The mode that `tracking.mode` means here and now. `online` without a key is the user's mistake: a UftError."""
    if mode == "offline":
        return Choice("offline")
    if not has_key(server):
        if mode == "online":
            raise UftError(no_key(f"no W&B API key for {server.host}"))
        return Choice("offline", "no API key")
    if mode == "auto" and not reachable(server.url, timeout):
        return Choice("offline", f"{server.host} does not answer")
    return Choice("online")


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
# second
# call has nothing to do; an upload that broke off goes on where the server's rows end.


PATIENCE = 900.0  # seconds after which the upload of a run is given up
EXIT_CODES = {"finished": GOOD, "stopped": STOPPED}


@dataclass
class Upload:
    """What is to be done for a run, and how it went."""

    run: Run
    due: bool = False  # W&B may lack something of it
    arrived: bool = False  # everything is there
    why: str = ""  # it did not arrive, or is not tried
    steps: int = 0  # that the server lacked


def plan(run: Run) -> Upload:
    """What is to be done for a run. Nothing is touched."""
    if run.status == "running":
        return Upload(run, why="is running: upload it when it has ended")
    tracked = run.info().get("wandb", {}).get("mode", "disabled") != "disabled"
    due = tracked and unsent(run)
    return Upload(run, due, arrived=tracked and not due)


def send(uploads: Sequence[Upload], say: Callable[[str], None], patience: float = PATIENCE) -> None:
    """Upload these runs one after the other. Afterwards each has `arrived` or has its `why`."""
    for upload in uploads:
        run, status = upload.run, upload.run.status
        with tempfile.TemporaryDirectory(prefix="uft-sync-", ignore_cleanup_errors=True) as folder:
            try:
                tracker = Wandb(run, run.config(), lambda line: None, folder=Path(folder), uploads=True)
                tracker.finish_timeout = patience
                tracker.connect()
                summary = {**run.result().get("final", {}), "steps": run.steps}
                tracker.finish(status, EXIT_CODES.get(status, FAILED), summary)
                upload.steps, upload.why = len(tracker.sent), tracker.failure
            except UftError as error:
                upload.why = "; ".join(f"{problem.what} {problem.why}" for problem in error.problems)
            except Exception as error:
                upload.why = first_line(error)
                shut_down()
        upload.arrived = not upload.why
        if upload.arrived:
            say(f"  {run.name} arrived")
