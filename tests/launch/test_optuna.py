"""A search: the space from the grammar, trials through a launcher that answers at once, and the real program once."""

import json
import sys
from pathlib import Path

import optuna
import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from standin import KEY, Standin

from hydra_plugins.uft_sweeper import UftOptunaConf
from uft.cli import main
from uft.config.compose import examine
from uft.config.files import Request, make_loader
from uft.errors import UftError
from uft.launch.launcher import JobFailed
from uft.launch.optuna import DATABASE, parse_space, search, value_text
from uft.launch.sweep import Sweep
from uft.runs import Run, create_run, write_json

FIXED = ("objective=uft", "tracking=none", "train.steps=3")
BETA = "objective.beta=interval(0.1,2)"


@pytest.fixture(scope="module")
def loader():
    return make_loader(Request())


class Answers:
    """A launcher whose runs end at once: `answer(values)` gives a result's metrics, or an error to fail with."""

    def __init__(self, answer):
        self.answer = answer
        self.batches = []

    def launch(self, job_overrides, initial_job_idx):
        self.batches.append([dict(word.partition("=")[::2] for word in job) for job in job_overrides])
        return [self.run(job) for job in self.batches[-1]]

    def run(self, job):
        told = self.answer(job)
        if isinstance(told, Exception):
            return JobReturn(status=JobStatus.FAILED, _return_value=told)
        run = create_run(Path(job["++run.dir"].strip("'")), "{}\n", [])
        write_json(run.path / "result.json", {"status": "finished", "steps": 3, **told})
        return JobReturn(status=JobStatus.COMPLETED, _return_value=None)


@pytest.fixture
def look_for(tmp_path, monkeypatch, loader):
    """look_for(answer, *words, **settings): a search in a folder of its own; (the launcher, the study)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["uft train", "-m"])

    def go(answer, *words, verb="train", **settings):
        hydra = {"overrides": {"hydra": []}, "job": {"config_name": "config", "name": verb}, "sweep": {"dir": "S"}}
        launcher = Answers(answer)
        sweep = Sweep(OmegaConf.create({"hydra": hydra}), (*FIXED, *words), {}, launcher)
        search(vars(UftOptunaConf(**settings)), sweep, sweep.typed, loader)
        return launcher, study() if settings.get("storage") is None else None

    return go


def study(path="S"):
    return optuna.load_study(study_name=None, storage=f"sqlite:///{path}/{DATABASE}")


def bowl(job):
    """Lowest at beta = 0.7."""
    return {"best": {"eval/nll": (float(job["objective.beta"]) - 0.7) ** 2}, "final": {"eval/nll": 9.0}}


# the space


def test_axes_of_the_grammar(loader):
    words = ("objective=uft,dpo", BETA, "optim.lr=tag(log,interval(1e-5,1e-3))", "train.batch_size=range(8,33,8)")
    space = parse_space([*words, "data=glob(mi*)", "seed=choice(1)", "train.steps=3"], loader)
    assert space.distributions == {
        "objective": CategoricalDistribution(("uft", "dpo")),
        "objective.beta": FloatDistribution(0.1, 2.0),
        "optim.lr": FloatDistribution(1e-5, 1e-3, log=True),
        "train.batch_size": FloatDistribution(8.0, 32.0, step=8.0),
        "data": CategoricalDistribution(("mix",)),
        "seed": CategoricalDistribution(("1",)),
    }
    assert space.fixed == ("train.steps=3",)
    assert space.written["optim.lr"] == ["tag(log,interval(1e-5,1e-3))"]


def test_every_end_and_option_is_in_a_corner(loader):
    space = parse_space(["objective=uft,dpo", BETA, "data.ratio=0.5"], loader)
    assert space.corners() == [
        ["data.ratio=0.5", "objective=uft", "objective.beta=0.1"],
        ["data.ratio=0.5", "objective=dpo", "objective.beta=0.1"],
        ["data.ratio=0.5", "objective=uft", "objective.beta=2"],
    ]


def test_the_type_of_a_key_says_whether_its_numbers_are_whole(loader):
    words = ["train.batch_size=interval(8,64)", "data.ratio=interval(0,1)", "train.steps=range(1,10,2)"]
    space = parse_space(words, loader)
    space = space.with_integers(examine(Request(tuple(space.corners()[0]))).settings)
    assert space.distributions == {
        "train.batch_size": IntDistribution(8, 64),
        "data.ratio": FloatDistribution(0.0, 1.0),
        "train.steps": IntDistribution(1, 9, step=2),
    }
    drawn = {"train.batch_size": 9, "data.ratio": 1 / 3, "train.steps": 3}
    assert space.job(drawn) == ["train.batch_size=9", "data.ratio=0.333333", "train.steps=3"]


def test_numbers_are_written_as_one_would_type_them():
    assert [value_text(value) for value in (0.1, 2.0, 1e-05, 0.1 + 0.2, 0)] == ["0.1", "2", "1e-05", "0.3", "0"]


WRONG = {
    ("seed=1",): "no key says what to search",
    ("optim.lr=tag(log,interval(0,1))",): "begins above 0",
    ("data.ratio=interval(0.5,1.5)",): "must be at most 1",
    ("objective.bta=interval(0,1)",): "did you mean  objective.beta ?",
    ("objective=uft,sft", BETA): "no such key in objective=sft",
    ("data=mix,mixx", BETA): "no such file in conf/data",
}


@pytest.mark.slow
def test_a_space_that_cannot_be_run_is_told_before_anything_starts(look_for, tmp_path):
    for words, says in WRONG.items():
        with pytest.raises(UftError) as caught:
            look_for(bowl, *words)
        assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_are_told_together_and_how_to_get_optuna(look_for, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UftError) as caught:
        look_for(bowl, BETA, sampler="tpee", direction="down", n_trials=0, verb="check")
    for part in (
        "sampler=tpee",
        "direction=down",
        "n_trials=0",
        "nothing to optimise in  uft check",
        "pip install 'uft-lm[optuna]'",
    ):
        assert part in str(caught.value)


# the search


@pytest.mark.slow
def test_trials_are_told_and_the_best_one_has_its_command(look_for, capsys):
    launcher, found = look_for(bowl, BETA, "sweep.name=mine", n_trials=4, batch=2)
    assert [len(batch) for batch in launcher.batches] == [2, 2]
    jobs = [job for batch in launcher.batches for job in batch]
    assert [trial.value for trial in found.trials] == pytest.approx([bowl(job)["best"]["eval/nll"] for job in jobs])
    assert found.direction == optuna.study.StudyDirection.MINIMIZE
    out = capsys.readouterr().out
    assert "4 trials, 4 of them with a value of eval/nll" in out
    beta = found.best_trial.user_attrs["overrides"][-1]
    assert f"the best one alone:  uft train objective=uft tracking=none train.steps=3 {beta}\n" in out
    assert Path(found.best_trial.user_attrs["run"]).name == f"uft-beta{beta.partition('=')[2]}"
    sweep = json.loads(Path("S/sweep.json").read_text())
    assert sweep["axes"] == {"objective.beta": ["interval(0.1,2)"]}
    assert len(sweep["jobs"]) == 4


@pytest.mark.slow
def test_metric_direction_and_database_can_be_others(look_for, tmp_path):
    def rising(job):
        return {"final": {"eval/instruct/exact_match": float(job["objective.beta"]), "eval/nll": 1.0}}

    storage = f"sqlite:///{tmp_path}/other.db"
    other = {"metric": "eval/instruct/exact_match", "direction": "max", "storage": storage, "study": "shared"}
    look_for(rising, BETA, n_trials=3, sampler="random", **other)
    found = optuna.load_study(study_name="shared", storage=storage)
    assert found.best_value == max(trial.value for trial in found.trials)
    assert found.best_value == pytest.approx(found.best_params["objective.beta"], rel=1e-5)
    assert not Path("S", DATABASE).exists()


@pytest.mark.slow
def test_the_same_command_again_adds_trials_and_draws_new_values(look_for, capsys):
    look_for(bowl, BETA, n_trials=1, sampler="random")
    for batches in ([1], []):
        launcher, found = look_for(bowl, BETA, n_trials=2, sampler="random")
        assert [len(batch) for batch in launcher.batches] == batches
        assert len({trial.params["objective.beta"] for trial in found.trials}) == 2
    assert "2 are there" in capsys.readouterr().out


@pytest.mark.slow
def test_failed_trials_are_told_as_failed_and_the_search_goes_on(look_for, capsys):
    number_of = iter(range(10))
    answers = {
        0: JobFailed(1, "ValueError: it broke"),
        1: {"best": {"eval/nll": "nan"}},
        2: {"final": {"loss": 1.0}},
    }
    with pytest.raises(SystemExit) as leave:
        look_for(lambda job: answers.get(next(number_of), bowl(job)), BETA, n_trials=4)
    assert leave.value.code == 1
    found = study()
    assert [trial.state for trial in found.trials] == [TrialState.FAIL] * 3 + [TrialState.COMPLETE]
    errors = [trial.user_attrs["error"] for trial in found.trials[:3]]
    assert errors == ["ValueError: it broke", "eval/nll is nan", "no eval/nll in its result.json"]
    out, err = capsys.readouterr()
    assert "4 trials, 1 of them with a value" in out
    assert "1 of 4 jobs failed" in err
    assert "ValueError: it broke" in err


@pytest.mark.slow
def test_a_stopped_trial_is_gone_on_with_first(look_for):
    stopped = iter([False, True])
    with pytest.raises(SystemExit) as leave:
        look_for(lambda job: JobFailed(75, "stopped") if next(stopped) else bowl(job), BETA, n_trials=3)
    assert leave.value.code == 75
    before = study().trials
    assert [trial.state for trial in before] == [TrialState.COMPLETE, TrialState.RUNNING]
    launcher, found = look_for(bowl, BETA, n_trials=3)
    assert f"objective.beta={launcher.batches[0][0]['objective.beta']}" == before[1].user_attrs["overrides"][-1]
    assert len(launcher.batches) == 2
    assert [trial.state for trial in found.trials] == [TrialState.COMPLETE] * 3


@pytest.mark.slow
def test_values_that_do_not_go_together_fail_as_a_trial(look_for, capsys):
    """Each is right with the other's first: 3 steps with a warm-up of 4 are not."""
    words = ("train.steps=9,3", "optim.warmup=0.1,4.0", BETA)
    _, found = look_for(bowl, *words, n_trials=2, sampler="random", seed=4)
    drawn = [(trial.params["train.steps"], trial.params["optim.warmup"]) for trial in found.trials]
    assert drawn == [("9", "0.1"), ("3", "4.0")]
    assert [trial.state for trial in found.trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert "leaves no step after the warm-up" in capsys.readouterr().err


# the program


def test_the_command_line(worker, capfd):
    words = ["train", "-m", "hydra/sweeper=uft_optuna", "tracking=none", "objective=uft", "sweep.name=A", BETA]
    assert main([*words, "hydra.sweeper.n_trials=1"]) == 0
    out = capfd.readouterr().out
    assert "1 trials, 1 of them with a value of eval/nll" in out
    (folder,) = worker.glob("outputs/*/A")
    assert len(list(folder.glob("uft-beta*/sittings"))) == 1
    assert main(["resume", str(folder)]) == 0
    assert "1 are there" in capfd.readouterr().out


@pytest.mark.slow
def test_a_real_search_and_what_wandb_is_told_of_it(tmp_path, monkeypatch, uft):
    """Every run of a sweep is in one W&B group, with the swept keys in its config."""
    words = ["objective=uft", "debug=fast", "hydra/sweeper=uft_optuna", "hydra.sweeper.n_trials=1", "sweep.name=real"]
    out = uft("train", "-m", *words, "tracking.mode=offline", "optim.lr=tag(log,interval(1e-5,1e-2))").stdout
    (folder,) = tmp_path.glob("outputs/*/real")
    (trial,) = study(folder).trials
    run = Run(tmp_path / trial.user_attrs["run"])
    assert trial.value == run.result()["best"]["eval/nll"]
    assert f"{trial.value:.4f}" in out
    server = Standin()
    uft("sync", run.path, env={"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"})
    run_id = run.info()["id"]
    sent, history = server.runs[run_id], server.history[run_id]
    server.close()
    assert sent["groupName"].startswith("real 20"), "with the minute it was made, since other sweeps have its name"
    assert sent["displayName"] == run.name
    assert json.loads(sent["config"])["optim"]["value"]["lr"] == pytest.approx(trial.params["optim.lr"], rel=1e-5)
    assert trial.value in [row.get("eval/nll") for row in history]
