"""Runs of several stages, in this process: what they write, and that no death and no stop changes any of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dying import Death, StopAt, lines

from uft.config.freeze import plain
from uft.config.schema import Config
from uft.config.stages import differing
from uft.errors import BAD_REQUEST, FAILED, GOOD, STOPPED, UftError
from uft.evaluation.battery import Battery
from uft.runs import Run, create_run, summary
from uft.training import session, stages, stages_ground, stages_jobs, stages_make
from uft.training.signals import Stop

CLOCKS = ("seconds", "tokens_per_second", "wall_seconds", "peak_memory_bytes")
UNEVEN = (
    "train.batch_size=5",
    "train.micro_batch_tokens=80",
    "train.log_every=2",
    "train.checkpoint_every=3",
    "train.eval_every=4",
    "train.keep_last=1",
    "data.holdout=0.2",
    "eval.rows=4",
    "eval.samples=1",
    "eval.max_new_tokens=3",
    "optim.lr=0.02",
)
"""Lines, batteries, checkpoints and the end of a stage all fall on different steps."""
LORA = ("model.adapter=lora", "model.lora.rank=2", "model.lora.dropout=0.2")
SFT, DPO = 4, 5  # steps of the two stages
Nodes = Mapping[str, Any]


@pytest.fixture
def chain(configure: Callable[..., Config], files: dict[str, Path]) -> Callable[..., Config]:
    """chain({"sft": ("sft", "demonstration", "train.steps=4"), ...}): a run of these stages.

    A stage is (objective, kind of its rows, settings); the objective of one that does not train is what it does.
    """

    def make(parts: Mapping[str, tuple[str, ...]], *settings: str, reference: str = "start") -> Config:
        whole = {}
        for name, (does, kind, *own) in parts.items():
            objective = "sft" if does in stages_make.MAKERS else does
            source = {kind: files[kind]} if kind in files else {"made": Path(kind)}
            whole[name] = configure(objective, *UNEVEN, *settings, *own, sources=source)
        run = whole[[name for name, part in parts.items() if part[0] not in stages_make.MAKERS][-1]]
        top = plain(asdict(run))
        nodes: dict[str, Any] = {}
        for name, (does, *_) in parts.items():
            trains = does not in stages_make.MAKERS
            what = {"do": "fit", "reference": reference} if trains else {"do": does}
            nodes[name] = {**what, "config": differing(plain(asdict(whole[name])), top)}
        return replace(run, stages=nodes)

    return make


@pytest.fixture
def two(chain: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """two(folder, *settings): SFT, then DPO, with caches of the folder's own."""

    def make(folder: str, *settings: str, **options: Any) -> Config:
        parts = {
            "sft": ("sft", "demonstration", f"train.steps={SFT}"),
            "dpo": ("dpo", "preference", f"train.steps={DPO}"),
        }
        return chain(parts, f"data.cache={tmp_path / folder}-cache", *settings, **options)

    return make


@pytest.fixture
def death(monkeypatch: pytest.MonkeyPatch) -> Death:
    return Death(monkeypatch, session, stages, stages_ground)


def sit(folder: Path, config: Config, stop: Stop | None = None) -> int:
    if not folder.exists():
        create_run(folder, "{}\n", [])
    return stages.train(Run(folder), config, stop or Stop())


def survive(folder: Path, config: Config, death: Death, *deaths: int) -> None:
    """Die at each of these moments in turn, then go on to the end."""
    create_run(folder, "{}\n", [])
    for moment in deaths:
        with death.after(moment):
            sit(folder, config)
    with death.after(None):
        assert sit(folder, config) == GOOD


def written(folder: Path) -> dict[str, Any]:
    """Everything a finished run says but the time it took, names in the order in which they were written."""
    run = Run(folder)
    result = json.loads(json.dumps(run.result()), object_hook=lambda o: {k: v for k, v in o.items() if k not in CLOCKS})
    below = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    names = [str(path.relative_to(folder)) for path in below]
    curve = [[(k, v) for k, v in line.items() if k not in CLOCKS] for line in lines(run.metrics_file)]
    same = ("check.json", "model.safetensors", "tensors.safetensors", "samples.jsonl", "rows.jsonl")
    content = {str(p.relative_to(folder)): p.read_bytes() for p in below if p.name in same}
    data = [json.loads(path.read_text())["run_digest"] for path in sorted(folder.glob("stages/*/data.json"))]
    return {"curve": curve, "result": result, "files": names, "data": data, **content}


# --- what is written


def test_steps_and_counters_run_on_and_every_line_names_its_stage(two: Callable[..., Config], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert sit(folder, two("run")) == GOOD
    found = lines(folder / "metrics.jsonl")
    trained = {line["step"]: line for line in found if "loss" in line}
    measured = [(line["step"], line["stage"]) for line in found if "eval/nll" in line]
    assert list(trained) == [1, 2, 4, 5, 6, 8, 9]
    assert [trained[step]["stage"] for step in trained] == ["sft"] * 3 + ["dpo"] * 4
    assert [line["rows"] for line in trained.values()] == [5 * step for step in trained]
    for name in ("tokens", "supervised_tokens", "seconds"):
        values = [line[name] for line in trained.values()]
        assert values == sorted(values)
        assert len(set(values)) == len(values)
    # before the first step, every 4 steps of a stage, after each stage: the end of one is the start of the next
    assert measured == [(0, "sft"), (4, "sft"), (8, "dpo"), (9, "dpo")]
    assert trained[5]["lr"] == trained[1]["lr"]  # the schedule starts afresh
    assert [line["stage"] for line in lines(folder / "samples.jsonl")] == ["sft"] * 4 + ["dpo"] * 4
    assert "evaluation at step 9" in (folder / "console.log").read_text()
    assert "after sft (4)" in (folder / "console.log").read_text()


def test_results_of_the_run_and_of_its_stages(two: Callable[..., Config], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert sit(folder, two("run")) == GOOD
    whole, found = Run(folder).result(), lines(folder / "metrics.jsonl")
    parts = {name: json.loads((folder / f"stages/{name}/result.json").read_text()) for name in ("1-sft", "2-dpo")}
    assert whole["stages"] == {"sft": parts["1-sft"], "dpo": parts["2-dpo"]}
    assert (whole["steps"], parts["1-sft"]["steps"], parts["2-dpo"]["steps"]) == (SFT + DPO, SFT, DPO)
    for name in ("rows", "tokens", "supervised_tokens"):
        assert whole[name] == sum(part[name] for part in parts.values()) == [x for x in found if "loss" in x][-1][name]
    end_of_sft = next(line for line in found if line["step"] == SFT and "eval/nll" in line)
    assert parts["1-sft"]["final"]["eval/nll"] == end_of_sft["eval/nll"]
    assert whole["final"]["eval/nll"] == parts["2-dpo"]["final"]["eval/nll"] == found[-1]["eval/nll"]
    assert whole["best_checkpoint"].startswith("stages/2-dpo/checkpoints/step-")
    assert (folder / whole["best_checkpoint"]).is_dir()
    assert whole["best_step"] == SFT + parts["2-dpo"]["best_step"]
    info = Run(folder).info()
    assert info["total_steps"] == SFT + DPO
    assert summary(Run(folder))["steps"] == SFT + DPO
    assert not (folder / "stages/2-dpo/model").exists()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tuning", [(), LORA], ids=["full", "lora"])
def test_a_stage_starts_from_the_model_before_it_and_its_reference_is_that(
    tuning: tuple[str, ...], two: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = stages.prepare

    def prepare(*arguments: Any) -> Any:
        prepared = real(*arguments)
        made.append({name: p.detach().clone() for name, p in prepared.trainer.policy.base.state_dict().items()})
        return prepared

    monkeypatch.setattr(stages, "prepare", prepare)
    folder = tmp_path / "run"
    assert sit(folder, two("run", *tuning)) == GOOD
    left = weights(folder / "stages/1-sft/model")
    started = {name.replace(".base_layer", ""): tensor for name, tensor in made[1].items() if "lora_" not in name}
    assert all(torch.equal(started[name], tensor) for name, tensor in left.items())
    assert any(not torch.equal(left[name], tensor) for name, tensor in weights(folder / "model").items())
    first = next(line for line in lines(folder / "metrics.jsonl") if line["step"] == SFT + 1)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy = reference
    check = json.loads((folder / "stages/2-dpo/check.json").read_text())
    assert check["policy_against_reference"]["largest_difference"] < 1e-4


def test_the_reference_may_be_the_model_that_the_run_started_from(two: Callable[..., Config], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert sit(folder, two("run", reference="initial")) == GOOD
    first = next(line for line in lines(folder / "metrics.jsonl") if line["step"] == SFT + 1)
    assert abs(first["loss"] - math.log(2)) > 1e-3
    assert json.loads((folder / "stages/2-dpo/check.json").read_text())["policy_against_reference"] == {}


def test_the_battery_is_one_for_all_stages(two: Callable[..., Config], tmp_path: Path) -> None:
    """The same names in every line, over the rows of both stages, against the model that the run started from."""
    folder = tmp_path / "run"
    assert sit(folder, two("run")) == GOOD
    measured = [line for line in lines(folder / "metrics.jsonl") if "eval/nll" in line]
    names = [{name for name in line if name.startswith("eval/")} for line in measured]
    assert all(own == names[0] for own in names)
    assert {"eval/demonstration/nll", "eval/preference/margin"} <= names[0]
    assert measured[0]["eval/kl"] == pytest.approx(0, abs=1e-9)
    # at the boundary the divergence from the start of the run goes on, where one from the stage's start would be 0
    assert measured[1]["eval/kl"] > 1e-4
    assert measured[2]["eval/kl"] > 1e-4


def test_a_stage_is_what_a_run_of_its_own_would_be(two: Callable[..., Config], tmp_path: Path) -> None:
    """Two runs by hand, the second from the first one's model, give the same training to the last bit."""
    folder, config = tmp_path / "run", two("run")
    assert sit(folder, config) == GOOD
    first, second = (stage.config for stage in stages.stages_of(config))
    assert session.train(create_run(tmp_path / "first", "{}\n", []), first, Stop()) == GOOD
    started = replace(second, model=replace(second.model, path=str(tmp_path / "first" / "model")))
    assert session.train(create_run(tmp_path / "second", "{}\n", []), started, Stop()) == GOOD
    for name, tensor in weights(folder / "model").items():
        assert torch.equal(weights(tmp_path / "second" / "model")[name], tensor), name
    alone = [line["loss"] for line in lines(tmp_path / "second/metrics.jsonl") if "loss" in line]
    assert [x["loss"] for x in lines(folder / "metrics.jsonl") if "loss" in x and x["stage"] == "dpo"] == alone


# --- rows that a stage makes


def test_rows_are_made_and_trained_on(chain: Callable[..., Config], files: dict[str, Path], tmp_path: Path) -> None:
    parts = {
        "sft": ("sft", "demonstration", "train.steps=2"),
        "say": ("generate", "demonstration", "generate.max_new_tokens=4", "generate.seeds=[0,1]"),
        "dpo": ("dpo", "stage:say", "train.epochs=1", "train.steps=null"),
    }
    config = chain(parts)
    folder = tmp_path / "run"
    assert sit(folder, config) == GOOD
    made = lines(folder / "stages/2-say/rows.jsonl")
    assert made
    assert all(len(line["negatives"]) <= 2 and line["sampled_by"] == "stage:sft" for line in made)
    data = json.loads((folder / "stages/3-dpo/data.json").read_text())
    assert data["sources"]["made"]["rows"] == len(made)
    assert data["sources"]["made"]["held_out"] == 0  # what the generating stage holds out is measured
    result = Run(folder).result()
    assert result["stages"]["say"]["rows"] == len(made)
    assert result["steps"] == Run(folder).info()["total_steps"] == 2 + math.ceil(len(made) / 5)
    named = {
        name for line in lines(folder / "metrics.jsonl") for name in line if name.startswith("eval/demonstration/")
    }
    assert "eval/demonstration/nll" in named


def test_what_an_annotating_stage_holds_out_is_measured_and_never_trained_on(
    chain: Callable[..., Config], model_folder: Path, tmp_path: Path
) -> None:
    """The file that it leaves has the held-out rows too; stopped again and again, it goes on."""
    asked = ("annotate.column=baseline_logp", f"annotate.models=[{model_folder}]")
    config = chain({"ask": ("annotate", "demonstration", *asked), "poft": ("poft", "stage:ask", "train.steps=2")})
    folder = tmp_path / "run"
    for looks in range(1, 40, 6):
        if sit(folder, config, StopAt(looks)) == GOOD:
            break
    assert sit(folder, config) == GOOD
    rows = lines(folder / "stages/1-ask/rows.jsonl")
    assert len(rows) == 12
    assert all(row["baseline_logp"] < 0 for row in rows)
    data = json.loads((folder / "stages/2-poft/data.json").read_text())["sources"]["made"]
    assert (data["rows"], data["held_out"]) == (10, 0)  # data.holdout=0.2 of twelve is two
    first = next(line for line in lines(folder / "metrics.jsonl") if line["step"] == 1 and "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the model is its own baseline
    assert any("eval/demonstration/nll" in line for line in lines(folder / "metrics.jsonl"))


# --- dying and stopping


@pytest.mark.parametrize("tuning", [("reference.mode=cached",), pytest.param(LORA, marks=pytest.mark.slow)])
def test_death_at_any_moment_changes_nothing(
    tuning: tuple[str, ...], two: Callable[..., Config], death: Death, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    survive(whole, two("whole", *tuning), death)
    expected, moments = written(whole), list(death.moments)
    assert len(moments) > 150
    boundary = [n for n, name in enumerate(moments) if name in ("before export", "after export")]
    boundary += [n for n, name in enumerate(moments[:-2]) if name.endswith("write_json") and n > boundary[0]][:4]
    for moment in sorted({*range(0, len(moments), 61), *boundary[:2]}):
        survive(tmp_path / f"died-{moment}", two(f"died-{moment}", *tuning), death, moment)
        assert written(tmp_path / f"died-{moment}") == expected, (moment, moments[moment])


@pytest.mark.slow
def test_death_at_every_single_moment_changes_nothing(two: Callable[..., Config], death: Death, tmp_path: Path) -> None:
    survive(tmp_path / "whole", two("whole"), death)
    expected = written(tmp_path / "whole")
    for moment in range(len(death.moments)):
        survive(tmp_path / f"died-{moment}", two(f"died-{moment}"), death, moment)
        assert written(tmp_path / f"died-{moment}") == expected, moment


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stop_at_any_safe_point_changes_nothing(stride: int, two: Callable[..., Config], tmp_path: Path) -> None:
    whole, watch = tmp_path / "whole", StopAt()
    assert sit(whole, two("whole"), watch) == GOOD
    expected = written(whole)
    assert watch.looks > 50
    for number in range(0, watch.looks - 1, stride):
        folder, config = tmp_path / f"stopped-{number}", two(f"stopped-{number}")
        assert sit(folder, config, StopAt(number)) == STOPPED, number
        result = Run(folder).result()
        assert result["status"] == "stopped"
        assert result["steps"] == on_disk(folder)
        assert sit(folder, config) == GOOD
        assert written(folder) == expected, number


def on_disk(folder: Path) -> int:
    """Steps of finished stages and of the newest checkpoint of the one after them."""
    steps = 0
    for name in ("1-sft", "2-dpo"):
        stage = Run(folder / "stages" / name)
        done = stage.result().get("steps")
        steps += max((step for step, _ in stage.checkpoints()), default=0) if done is None else done
        if done is None:
            break
    return steps


def test_a_finished_stage_is_never_run_again(two: Callable[..., Config], tmp_path: Path) -> None:
    folder, config = tmp_path / "run", two("run")
    assert sit(folder, config) == GOOD
    before = written(folder)
    stamp = (folder / "stages/1-sft/model/model.safetensors").stat().st_mtime_ns
    (folder / "result.json").unlink()
    assert sit(folder, config) == GOOD  # killed right before the last word
    assert written(folder) == before
    assert (folder / "stages/1-sft/model/model.safetensors").stat().st_mtime_ns == stamp


def test_a_failure_in_a_later_stage_keeps_what_the_earlier_ones_did(
    two: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "run", two("run")
    real = session.battery

    def failing(*arguments: Any, **keywords: Any) -> Battery:
        if (folder / "stages/1-sft/result.json").exists():
            raise RuntimeError("no more")
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(session, "battery", failing)
        assert sit(folder, config) == FAILED
    result = Run(folder).result()
    assert (result["status"], result["error"]) == ("failed", "RuntimeError: no more")
    assert list(result["stages"]) == ["sft"]
    assert sit(folder, config) == GOOD


# --- looking before


def test_check_and_data_look_at_every_stage(chain: Callable[..., Config], capsys: pytest.CaptureFixture[str]) -> None:
    parts = {
        "sft": ("sft", "demonstration", "train.steps=2"),
        "say": ("generate", "demonstration"),
        "dft": ("dft", "stage:say", "train.steps=2"),
        "dpo": ("dpo", "preference", "train.steps=3", "objective.beta=0.3"),
    }
    config = chain(parts)
    assert stages_jobs.check(config) == GOOD
    said = capsys.readouterr().out
    for words in ("stage 1 of 4: sft (fit)", "demonstration: 10 rows", stages_jobs.NOT_THERE, "dpo  beta=0.3"):
        assert words in said
    assert said.count("largest step") == 2
    assert "All is well" in said
    assert stages_jobs.data(config) == GOOD
    shown = capsys.readouterr().out
    places = [shown.index(words) for words in ("stage 1 of 4", "  demonstration:", "stage 4 of 4", "  preference:")]
    assert places == sorted(places)


# --- what is refused


def test_data_of_any_stage_that_changed_is_refused(
    two: Callable[..., Config], files: dict[str, Path], tmp_path: Path
) -> None:
    folder, config = tmp_path / "run", two("run")
    assert sit(folder, config, StopAt(40)) == STOPPED
    own = Path(shutil.copy(files["preference"], tmp_path / "other.jsonl"))
    own.write_text("".join(reversed(own.read_text().splitlines(keepends=True))))
    stage = config.stages["dpo"]["config"]
    data = replace(config.data, sources={"preference": replace(config.data.sources["preference"], path=str(own))})
    assert "data" not in stage
    with pytest.raises(UftError, match="its rows changed since the run began"):
        sit(folder, replace(config, data=data))
    assert sit(folder, config) == GOOD


def test_bad_rows_of_a_later_stage_are_told_before_the_first_step(
    chain: Callable[..., Config], files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text(files["preference"].read_text() + '{"prompt": "w3"}\n')
    parts = {
        "sft": ("sft", "demonstration", "train.steps=2"),
        "dpo": ("dpo", str(tmp_path / "bad.jsonl"), "train.steps=2"),
    }
    with pytest.raises(UftError, match=r"bad.jsonl:13") as caught:
        sit(tmp_path / "run", chain(parts))
    assert caught.value.code == BAD_REQUEST
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_one_name_for_two_sets_of_held_out_rows_is_refused(
    chain: Callable[..., Config], files: dict[str, Path], tmp_path: Path
) -> None:
    parts = {
        "one": ("sft", str(files["demonstration"]), "train.steps=2"),
        "two": ("sft", str(files["preference"]), "train.steps=2"),
    }
    with pytest.raises(UftError, match="holds out other rows in stage two"):
        sit(tmp_path / "run", chain(parts))
