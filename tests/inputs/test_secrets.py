"""Secrets of the environment reach nothing that uft writes: no file of a run, W&B's among them, and no word said."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import program
import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "WANDB_API_KEY": "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567",
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlantedPlan",
    "MY_SERVICE_TOKEN": "planted-service-token-value",
    "DB_PASSWORD": "planted:pass/word+value",
    "SOME_KEY": "planted-key-value-0123",
    "OTHER_SECRET": "planted-secret-value-0123",
}
IN_A_URL = "planted-in-the-remote-0123456789"
SHORT = ("debug=fast", "eval.rows=4", "eval.generate_rows=2", "hardware=cpu")


def leaks(text: str | bytes) -> list[str]:
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return [value for value in (*SECRETS.values(), IN_A_URL) if value.encode() in raw]


def all_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder under git, as people work in one, with a token in the address of its remote and uncommitted changes."""
    folder = tmp_path_factory.mktemp("work")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    (folder / "notes.txt").write_text("nothing\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    remote = f"https://somebody:{IN_A_URL}@example.org/a/b.git"
    subprocess.run([*git, "remote", "add", "origin", remote], check=True)
    (folder / "notes.txt").write_text(f"export HF_TOKEN={SECRETS['HF_TOKEN']}\n")
    return folder


@pytest.fixture(scope="module")
def ran(place, tmp_path_factory):
    """A short run that W&B keeps offline, under a umask that forbids nothing: (folder, everything said, home)."""
    home = tmp_path_factory.mktemp("home")
    dropped = ("WANDB_", "HF_", "UFT_", "HYDRA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment = {
        **kept,
        **SECRETS,
        "HOME": str(home),
        "UFT_CACHE": str(home / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HTTPS_PROXY": f"http://me:{SECRETS['SOME_KEY']}@127.0.0.1:9",
    }
    words = ["train", *SHORT, "tracking.mode=offline", "run.dir=a-run", "objective=sft", "model.trust_remote_code=true"]
    done = program.run(
        [sys.executable, "-m", "uft", *words],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        umask=0,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return place / "a-run", done.stdout + done.stderr, home, environment


def test_a_run_writes_and_says_no_secret(ran):
    folder, said, home, _ = ran
    names = {path.name for path in all_files(folder)}
    assert {"config.yaml", "run.json", "result.json", "metrics.jsonl", "console.log"} <= names
    assert json.loads((folder / "run.json").read_text())["wandb"]["id"], "W&B was asked for"
    assert leaks(said) == []
    found = {str(path): leaks(path.read_bytes()) for path in [*all_files(folder), *all_files(home)]}
    assert {path: what for path, what in found.items() if what} == {}


def test_nothing_in_a_run_can_be_written_by_everybody(ran):
    folder, _, home, _ = ran
    paths = [folder, *folder.rglob("*"), *home.rglob("*")]
    loose = [str(p) for p in paths if not p.is_symlink() and p.stat().st_mode & stat.S_IWOTH]
    assert loose == []
    assert folder.stat().st_mode & stat.S_IRWXU == stat.S_IRWXU


def test_a_model_s_own_code_that_is_allowed_stands_on_record(ran):
    folder, said, _, _ = ran
    for text in ((folder / "check.json").read_text(), (folder / "console.log").read_text(), said):
        assert "model.trust_remote_code is on" in text


def test_reports_say_no_secret(ran, place):
    folder, _, _, environment = ran
    command = [sys.executable, "-m", "uft", "compare", str(folder), "--out", str(place / "report")]
    done = program.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert leaks(done.stdout + done.stderr) == []
    written = [path for path in all_files(place) if path.suffix in (".html", ".json")]
    assert any(path.suffix == ".html" for path in written)
    assert [str(path) for path in written if leaks(path.read_bytes())] == []


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """In this process, with the secrets in its environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UFT_CONF", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WRONG = {
    "a reference": ["tracking.project=${oc.env:HF_TOKEN}"],
    "a value": ["tracking.project=planted-service-token-value"],
    "part of a path": ["data=files", "+data.sources.mine.path=/data/planted-service-token-value/rows.jsonl"],
    "a list": ["tracking.tags=[a,planted-key-value-0123]"],
    "a password in a URL": ["tracking.entity='https://me:planted-key-value-0123@host/x'"],
    "a stage": ["experiment=sft_then_dpo", "stages.sft.set={tracking.project: planted-secret-value-0123}"],
    "a key that is not there": ["tracking.api_key=planted-service-token-value"],
    "a word that cannot be read": ["planted-service-token-value"],
    "a name": ["run.name=planted-service-token-value"],
    "another verb's": ["--planted-service-token-value"],
}


def test_a_folder_that_names_a_run_by_a_short_secret_is_refused(alone, capsys, monkeypatch):
    """Within another text it may be chance; as the run's name it is written down."""
    from uft.cli import main

    monkeypatch.setenv("DB_PASSWORD", "twelve-chars")
    for folder in ("outputs/twelve-chars", "twelve-chars/run"):
        assert main(["train", f"run.dir={folder}"]) == 2
        printed = capsys.readouterr()
        assert "holds the value of the environment variable DB_PASSWORD" in printed.err
    assert list(alone.iterdir()) == []


FAST = ("a value", "a list", "a stage", "a key that is not there")


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=what, marks=() if what in FAST else pytest.mark.slow) for what, words in WRONG.items()],
)
@pytest.mark.parametrize("mode", [[], pytest.param(["--cfg", "job"], marks=pytest.mark.slow)])
def test_a_setting_that_holds_a_secret_is_refused_without_saying_it(alone, capsys, words, mode):
    from uft.cli import main

    assert main(["train", *words, *mode]) == 2
    printed = capsys.readouterr()
    assert leaks(printed.out + printed.err) == []
    assert list(alone.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_and_a_file_likewise(alone, capsys):
    from uft.cli import main

    assert main(["train", "-m", "seed=1,2", "tracking.project=planted-service-token-value"]) == 2
    (alone / "conf-user" / "tracking").mkdir(parents=True)
    (alone / "conf-user" / "tracking" / "mine.yaml").write_text("# mine\nproject: ${oc.env:SOME_KEY}\n")
    assert main(["train", "tracking=mine"]) == 2
    printed = capsys.readouterr()
    assert "SOME_KEY" in printed.err
    assert "conf-user/tracking/mine.yaml:2" in printed.err
    assert leaks(printed.out + printed.err) == []
    assert not (alone / "outputs").exists()


def test_data_and_templates_that_hold_one_are_quoted_without_it(alone, program):
    (alone / "rows.jsonl").write_text(
        json.dumps({"prompt": "q", "completion": "a", "label": SECRETS["MY_SERVICE_TOKEN"]}), encoding="utf-8"
    )
    done = program("train", "data=files", "+data.sources.mine.path=rows.jsonl", cwd=alone, env=SECRETS)
    assert done.returncode == 2
    assert "rows.jsonl:1" in done.stderr
    assert leaks(done.stdout + done.stderr) == []


@pytest.mark.parametrize("trace", ["", "--trace"])
def test_a_fault_in_uft_itself_tells_none(trace):
    """Whatever an exception says, with or without its traceback."""
    secret = SECRETS["MY_SERVICE_TOKEN"]
    code = (
        "import sys, os, uft.cli as cli\n"
        "def broken(arguments): raise RuntimeError('cannot reach ' + os.environ['MY_SERVICE_TOKEN'])\n"
        "cli.dispatch = broken\n"
        f"sys.exit(cli.main(['train', {trace!r}]))\n"
    )
    environment = {**os.environ, **SECRETS, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "RuntimeError: cannot reach ***" in done.stderr
    assert secret not in done.stdout + done.stderr
    assert ("Traceback" in done.stderr) == bool(trace)


@pytest.mark.slow
def test_a_crash_in_the_middle_of_a_run_is_recorded_without_it(alone, monkeypatch, capfd):
    from uft.config.compose import compose
    from uft.config.frozen import to_builtins, to_config
    from uft.runs import create_run
    from uft.training import session
    from uft.training.liveness import Stop

    def crash(*_):
        raise RuntimeError(f"no way to https://me:pw-of-mine@host with {SECRETS['OTHER_SECRET']}")

    monkeypatch.setattr(session, "prepare_stage", crash)
    settings = to_builtins(compose(["debug=fast", "tracking=none"]))
    run = create_run(alone / "run", "x: 1\n", [])
    assert session.train(run, to_config(settings), Stop()) == 1
    printed = capfd.readouterr()
    written = "".join(path.read_text(encoding="utf-8") for path in all_files(run.path))
    assert "no way to" in run.result()["error"]
    assert "Traceback" in printed.err
    for text in (printed.out, printed.err, written):
        assert leaks(text) == []
        assert "pw-of-mine" not in text
