"""The W&B workspace: what is sent to a stand-in for the server, and what is said without one."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from standin import KEY, Standin
from synthetic import make_run, make_sweep

from uft.cli import main
from uft.errors import UftError
from uft.report import workspace
from uft.report.compare import compare
from uft.report.runs import select
from uft.runs import Run


class Server(Standin):
    """A stand-in that takes saved views too; `views` are the variables of each, `refuse` answers with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.views: list[dict] = []
        self.refuse = False

    def on_GetDefaultEntity(self, v: dict) -> dict:
        return {"viewer": {"id": "u", "entity": "tester"}}

    def on_UpsertView2(self, v: dict) -> dict:
        if self.refuse:
            return {"upsertView": None}
        self.views.append(v)
        return {"upsertView": {"view": {"id": "v1", "name": v["name"]}, "inserted": True}}


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("home")
    for name in [
        name for name in os.environ if name.startswith(("WANDB_", "NETRC")) or name.lower().endswith("_proxy")
    ]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture
def server(monkeypatch):
    standin = Server()
    monkeypatch.setenv("WANDB_BASE_URL", standin.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield standin
    standin.close()


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    made = make_sweep(Path("outputs/2026-11-21/trial"), ("sft", "uft"), (0.1, 0.3), seeds=(1, 2), points=5)
    for path in made.iterdir():
        sent(path)
    return made


def sent(path: Path, mode: str = "offline", url: str | None = None) -> None:
    """Make it a run that W&B was told of."""
    name = f"wandb/{'offline-run' if mode == 'offline' else 'run'}-20261121-{path.name}"
    (path / name).mkdir(parents=True)
    (path / name / f"run-{path.name}.wandb").write_bytes(b"log")
    Run(path).update_info(wandb={"id": f"id-{path.name}", "mode": mode, "url": url, "dirs": [name]})


def test_the_workspace_that_is_saved(sweep, server, capsys):
    assert main(["compare", "--wandb"]) == 0
    out = capsys.readouterr().out
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("tester", "uft", "uft compare trial")
    assert view["type"] == "project-view"
    assert f"W&B workspace: {server.url}/tester/uft?nw=" in out
    assert "Upload 6 of 6 runs first:  uft sync outputs/2026-11-21/trial\n" in out
    section = json.loads(view["spec"])["section"]
    (runs,) = section["runSets"]
    assert runs["grouping"] == [
        {"section": "config", "name": "objective.value.name"},
        {"section": "config", "name": "objective.value.beta"},
    ]
    (rule,) = filters(runs["filters"])
    assert (rule["key"]["name"], rule["value"]) == ("group", "trial")
    panels = {bank["name"]: bank["panels"] for bank in section["panelBankConfig"]["sections"]}
    assert list(panels) == ["Evaluation", "Sweep", "Training", "Runs"]
    made = json.loads((sweep / "compare.json").read_text())
    lines = [panel["config"] for panel in panels["Evaluation"]]
    assert [line["metrics"] for line in lines] == [[head["metric"]] for head in made["headline"]]
    assert {line["xAxis"] for line in lines} == {"step"}
    assert [panel["viewType"] for panel in panels["Sweep"]] == [
        "Parallel Coordinates Plot",
        "Scatter Plot",
        "Parameter Importance",
    ]
    columns = [column["accessor"] for column in panels["Sweep"][0]["config"]["columns"]]
    assert columns[:2] == ["config:objective.value.name", "config:objective.value.beta"]
    assert columns[2] == "summary:eval/exact_match"
    assert [panel["config"]["metrics"] for panel in panels["Training"]] == [
        [f"train/{name}"] for name in ("loss", "nll", "lr", "grad_norm")
    ]
    assert [panel["viewType"] for panel in panels["Runs"]] == ["Run Comparer"]


def filters(found: dict) -> list[dict]:
    """The leaves of W&B's filter."""
    inner = found.get("filters")
    return [leaf for each in inner for leaf in filters(each)] if inner is not None else [found]


def test_any_title_and_any_group_make_a_workspace(sweep):
    """A group that W&B's filter language cannot hold is not put into one."""
    run, comparison = workspace.logged_run(next(sweep.iterdir())), compare(select([str(sweep)]))
    odd = ("a & b = <c> | d", "sweep \U0001f600 §", "x" * 300, "\u202e", "it's", 'q"')
    for text in odd:
        made = workspace.workspace({**comparison, "title": text}, [replace(run, group=f"{text}!")], "me", "uft")
        assert made.name.startswith("uft compare ")
        made._to_model().model_dump_json(by_alias=True, exclude_none=True)
        assert made.runset_settings.filters == f"Metric('ID') in ['{run.id}']"


def test_runs_of_no_common_group_are_filtered_one_by_one(sweep, server):
    make_run(Path("other"), "ift", points=5)
    sent(Path("other"))
    assert main(["compare", str(sweep), "other", "--wandb", "--out", "here"]) == 0
    (rule,) = filters(json.loads(server.views[0]["spec"])["section"]["runSets"][0]["filters"])
    assert rule["key"]["name"] == "name", "the id, as W&B calls it"
    assert sorted(rule["value"]) == sorted(f"id-{path.name}" for path in [*sweep.glob("*-seed*"), Path("other")])


def test_offline_it_says_what_it_would_do_and_how_to_do_it_later(sweep, capsys):
    assert main(["compare", "--wandb"]) == 0
    out = capsys.readouterr().out
    assert "W&B is offline (no API key): nothing was saved." in out
    grouped = "6 runs grouped by objective.name, objective.beta; Evaluation (5), Sweep (3)"
    assert f"'uft compare trial' in uft: {grouped}" in out
    assert "Upload 6 of 6 runs first:  uft sync outputs/2026-11-21/trial\n" in out
    assert "wandb login" in out


def test_a_server_that_refuses_and_one_that_does_not_answer(sweep, server, capsys):
    server.refuse = True
    assert main(["compare", "--wandb"]) == 1
    assert "W&B did not take the workspace" in capsys.readouterr().err
    assert (sweep / "compare.html").is_file(), "the page is there all the same"
    server.close()
    assert main(["compare", "--wandb"]) == 0
    assert "does not answer): nothing was saved" in capsys.readouterr().out


def test_runs_that_are_uploaded_need_no_upload_and_name_their_project(sweep, server, capsys):
    for path in sweep.glob("*-seed*"):
        sent(path, "online", f"{server.url}/team/work/runs/{path.name}")
    assert main(["compare", "--wandb"]) == 0
    assert (server.views[0]["entityName"], server.views[0]["projectName"]) == ("team", "work")
    assert "Upload" not in capsys.readouterr().out
    for log in sweep.rglob("offline-run*"):
        (log / "run.wandb.synced").write_text("")
    for path in sweep.glob("*-seed*"):
        log = f"wandb/offline-run-20261121-{path.name}"
        Run(path).update_info(wandb={"id": path.name, "mode": "offline", "url": None, "dirs": [log]})
    assert main(["compare", "--wandb"]) == 0
    assert "Upload" not in capsys.readouterr().out


def test_runs_that_wandb_never_saw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("a"), points=5)
    Run(Path("a")).update_info(wandb={"mode": "disabled"})
    assert main(["compare", "a", "--wandb"]) == 2
    assert "none of these runs was sent to W&B" in capsys.readouterr().err
    assert main(["compare", "a"]) == 0


def test_without_the_extra_it_is_said_before_anything_is_read(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UftError, match=r"wandb-workspaces is not installed"):
        workspace.require()
    assert main(["compare", "--wandb"]) == 2
    assert not (sweep / "compare.json").exists()


def test_a_run_that_does_not_say_where_it_went_is_left_out(tmp_path):
    run = make_run(tmp_path / "a", points=5)
    for damage in (b"", b"{", b'{"wandb": 3}', b'{"wandb": {"mode": "online"}}'):
        (run / "run.json").write_bytes(damage)
        assert workspace.logged_run(run) is None
