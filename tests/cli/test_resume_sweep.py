"""`uft resume SWEEP` and `uft ls` know jobs that never started."""

import json
import shutil

import pytest

from uft.cli import main
from uft.runs import Run


@pytest.fixture
def sweep(worker, capfd):
    """Three jobs: one finished, one failed, one whose folder is gone. The sweep was moved after that."""
    words = ["sweep.name=A", "tracking=none", "generate.system=ok,fail,die"]
    assert main(["train", "-m", *words]) == 1
    (there,) = worker.glob("outputs/*/A")
    assert main(["resume"]) == 2
    line = f"its sweep, with jobs that never started:  uft resume {there.relative_to(worker)}\n"
    assert line in capfd.readouterr().err
    folder = worker / "elsewhere"
    there.rename(folder)
    shutil.rmtree(folder / "systemdie")
    capfd.readouterr()
    return folder


def sittings(folder):
    return {path.parent.name: path.read_text().split() for path in folder.glob("*/sittings")}


@pytest.mark.slow
def test_all_jobs_of_a_sweep_go_on_the_way_they_were_asked_for(sweep, capfd):
    assert main(["ls", str(sweep), "--json"]) == 0
    listed = {row["name"]: row["status"] for row in json.loads(capfd.readouterr().out)}
    assert listed == {"systemok": "finished", "systemfail": "failed", "systemdie": "waiting"}
    assert main(["ls", str(sweep)]) == 0
    assert "waiting" in capfd.readouterr().out

    assert main(["resume", str(sweep), "seed=3", "generate.system=ok"]) == 2
    err = capfd.readouterr().err
    assert "uft: 2 problems" in err
    assert "would make other runs" in err
    assert main(["resume", str(sweep / "nowhere")]) == 2

    assert main(["resume", str(sweep), "train.log_every=3"]) == 1
    assert sittings(sweep) == {"systemok": ["ok"], "systemfail": ["fail", "fail"], "systemdie": ["die"]}
    assert Run(sweep / "systemfail").config()["train"]["log_every"] == 3
    assert len(json.loads((sweep / "sweep.json").read_text())["commands"]) == 1
    assert "2 of 3 jobs failed" in capfd.readouterr().err

    (sweep / "sweep.json").write_text("{}")  # runs that no command planned go on one by one
    shutil.rmtree(sweep / "systemdie")
    assert main(["resume", str(sweep)]) == 1
    assert sittings(sweep) == {"systemok": ["ok"], "systemfail": ["fail"] * 3}
    assert "1 of 1 runs failed" in capfd.readouterr().err
