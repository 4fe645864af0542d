"""The shipped sweeps: every job can be run, and the files say what they are."""

import json
import re

import pytest
import yaml

from uft.config.compose import examine
from uft.config.files import Request, make_loader
from uft.config.messages import conf_dir, groups
from uft.data.rows import Kind
from uft.launch.launcher import row_problems
from uft.launch.sweep import expand
from uft.objectives import make
from uft.runs import find_runs

FILES = groups([conf_dir()])["sweep"]
PAPERS = {name for name in FILES if name.startswith("paper_")}
KINDS_OF_MIX = (Kind.DEMONSTRATION, Kind.PREFERENCE, Kind.BINARY, Kind.SCORED)


def sweep(name):
    return yaml.safe_load(FILES[name].read_text())


def jobs_of(name, loader):
    sweeper = sweep(name)["hydra"]["sweeper"]
    lines = [f"{key}={value}" for key, value in sweeper["params"].items()]
    return expand([*lines, f"sweep={name}"], loader, sweeper.get("arms", {}))


@pytest.fixture(scope="module")
def loader():
    return make_loader(Request())


@pytest.mark.parametrize("most", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_the_jobs_of_a_file_can_be_run(most, loader):
    """Of several seeds the first; of the playground's arms, which other tests compose, every twelfth. Those of papers
    have rows on the hub: `end_to_end/test_papers.py`."""
    for name in sorted(set(FILES) - {"objectives"} - PAPERS):
        jobs, axes = jobs_of(name, loader)
        sweeper = sweep(name)["hydra"]["sweeper"]
        several = {key for key, value in sweeper["params"].items() if "," in value}
        assert set(axes) == several | ({"arm"} if "arms" in sweeper else set())
        first = [job for job in jobs if "seed=1" in job or "seed" not in axes]
        runnable(first[:: 12 if name.startswith("playground") else 1][:most])


def runnable(jobs):
    examined = [examine(Request(tuple(job))) for job in jobs]
    assert [problem for one in examined for problem in one.problems] == []
    assert row_problems(examined, refused=False) == ([], "")
    return examined


def test_a_file_is_a_sweep_without_m_and_says_what_it_asks_and_what_it_costs():
    assert set(FILES) == {
        *("active_dpo", "beta_ratio", "claims", "objectives", "pds", "playground", "playground_search", "pref_recipe"),
        *("rounds", "seeds", *PAPERS),
    }
    for name, file in ((name, file) for name, file in FILES.items() if name not in PAPERS):
        assert sweep(name)["hydra"]["mode"] == "MULTIRUN"
        comment = "".join(line for line in file.read_text().splitlines(True) if line.startswith("#"))
        assert "?" in comment.split("\n")[1], "of its first sentence"
        assert f"uft train sweep={name}" in comment
        assert re.search(r"[Cc]osts", comment)


@pytest.mark.slow
def test_every_objective_that_the_mixture_suffices_for_is_compared(loader):
    """One that needs a teacher, numbers beside the completions, or a kind of rows that the mixture lacks, is left out
    by name."""
    jobs, axes = jobs_of("objectives", loader)
    left_out = sorted(set(groups([conf_dir()])["objective"]) - set(axes["objective"]))
    assert len(jobs) == 3 * len(axes["objective"])
    assert f"{len(axes['objective'])} objectives x 3 seeds" in FILES["objectives"].read_text()
    assert all(usable(one) for one in runnable([job for job in jobs if "seed=1" in job]))
    others = [examine(Request(("sweep=objectives", f"objective={name}"))) for name in left_out]
    assert not any(usable(one) for one in others)


def usable(one):
    objective = make(one.settings["objective"])
    takes = any(kind in objective.views and not objective.annotations(kind) for kind in KINDS_OF_MIX)
    return takes and not (objective.needs.rollouts or objective.needs.teacher)


def test_reuse_is_what_the_comment_says():
    """Passes over the pairs at a fixed number of steps."""
    config = examine(Request(("sweep=pref_recipe",))).settings
    rows = config["train"]["steps"] * config["train"]["batch_size"]
    limits = [
        int(limit)
        for limit in sweep("pref_recipe")["hydra"]["sweeper"]["params"]["data.sources.pairs.limit"].split(",")
    ]
    passes = ", ".join(str(rows // limit) for limit in limits[:-1]) + f" or {rows // limits[-1]} passes"
    assert passes in " ".join(FILES["pref_recipe"].read_text().split("\n# "))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arms"),
    [
        ("active_dpo", ["active_dpo", "random", "random_pairs"]),
        ("pds", ["pds", "random_half", "all", "trusted"]),
        ("rounds", ["spin", "irft", "sft", "sft_tuned"]),
    ],
)
def test_every_arm_of_a_sweep_over_recipes_runs_and_is_a_configuration_of_its_own(program, tmp_path, name, arms):
    """Two steps a stage on some rows, under one seed."""
    short = ["debug=fast", "generate.limit=700", "select.steps=1", "hydra.sweeper.params.seed=1"]
    done = program("train", f"sweep={name}", f"sweep.name={name}", *short, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sorted(run.name for run in find_runs(tmp_path / "outputs")) == sorted(arms)
    assert {run.status for run in find_runs(tmp_path / "outputs")} == {"finished"}
    shown = program("compare", name, "--json", cwd=tmp_path)
    assert sorted(group["name"] for group in json.loads(shown.stdout)["groups"]) == sorted(arms)
