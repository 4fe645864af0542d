"""Names of runs, jobs and sweeps."""

from datetime import datetime
from pathlib import Path

from uft.launch.names import axis_labels, job_name, run_name, single_run_dir, slug, sweep_dir, sweep_name
from uft.launch.sweep_jobs import unique_names

NOW = datetime(2026, 11, 21, 9, 8, 7)
CFG = {
    "run": {"name": None, "dir": None},
    "objective": {"name": "ift"},
    "data": {"name": "mix"},
    "model": {"name": "play/ground"},
    "seed": 3,
}


def test_run_name():
    assert run_name(CFG, NOW) == "ift-mix-play-ground-seed3-090807"
    assert run_name({**CFG, "run": {"name": "mine"}}, NOW) == "mine"
    staged = {**CFG, "stages": {"sft": {}, "dpo": {}}}
    assert run_name(staged, NOW) == "sft-then-dpo-play-ground-seed3-090807"


def test_single_run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = single_run_dir(CFG, NOW)
    assert folder == Path("outputs/2026-11-21/ift-mix-play-ground-seed3-090807")
    folder.mkdir(parents=True)
    assert single_run_dir(CFG, NOW).name == f"{folder.name}-2"
    chosen = {**CFG, "run": {"name": folder.name, "dir": None}}
    assert single_run_dir(chosen, NOW) == folder, "a name that was chosen is continued"
    assert single_run_dir({**CFG, "run": {"name": None, "dir": "a/b"}}, NOW) == Path("a/b")


def test_job_name_is_the_axes_that_vary():
    axes = ["objective", "objective.beta", "data.ratio", "seed"]
    job = ["model=playground", "objective=ift", "objective.beta=0.1", "data.ratio=0.5", "seed=1", "train.steps=3"]
    assert job_name(job, axes) == "ift-beta0.1-ratio0.5-seed1"
    assert job_name(["+objective.beta=0.1"], ["+objective.beta"]) == "beta0.1"
    assert job_name(["seed=1"], []) == "run"


def test_labels_are_longer_where_one_part_is_not_enough():
    assert axis_labels(["optim.lr", "model.lr", "data.ratio"]) == {
        "optim.lr": "optim.lr",
        "model.lr": "model.lr",
        "data.ratio": "ratio",
    }


def test_names_hold_nothing_that_hydra_or_a_shell_would_trip_over():
    name = job_name(["optim.betas=[0.9,0.95]", "model.path=a/b=c"], ["optim.betas", "model.path"])
    assert not set(name) & set("=,[]/ ")
    assert name.startswith("betas0.9-0.95-")


def test_values_that_look_alike_have_different_names():
    one, two = (job_name([f"model.path={path}"], ["model.path"]) for path in ("a/b", "a-b"))
    assert one != two
    names = unique_names([["data.x=1"], ["data.x=1"]], ["data.x"], None)
    assert names[0].startswith("x1-")


def test_a_job_keeps_its_name_when_the_grid_grows():
    small = unique_names([["seed=1"], ["seed=2"]], ["seed"], None)
    large = unique_names([["seed=1"], ["seed=2"], ["seed=3"]], ["seed"], None)
    assert large[:2] == small == ["seed1", "seed2"]


def test_a_long_name_is_cut_and_stays_unique():
    axes = [f"data.sources.s{n}.share" for n in range(40)]
    one = job_name([f"{axis}=0.25" for axis in axes], axes)
    two = job_name([f"{axis}=0.25" for axis in axes[:-1]] + [f"{axes[-1]}=0.5"], axes)
    assert len(one) < 140
    assert one != two


def test_sweep_name_depends_on_what_is_fixed_and_matters():
    name = sweep_name(["objective.beta", "seed"], ["data=mix"])
    assert name.startswith("beta-seed-")
    assert name == sweep_name(["objective.beta", "seed"], ["data=mix", "tracking.mode=offline", "train.log_every=5"])
    assert name != sweep_name(["objective.beta", "seed"], ["data=pairs"])


def test_a_sweep_of_an_earlier_day_is_completed_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep_dir("A", NOW) == Path("outputs/2026-11-21/A")
    Path("outputs/2026-11-19/A").mkdir(parents=True)
    assert sweep_dir("A", NOW) == Path("outputs/2026-11-19/A")


def test_slug():
    assert slug("a b/c=d,e") == "a-b-c-d-e"
    assert slug("///") == "none"
