"""Runs of several stages, in this process: what they write, train on, tell beforehand and refuse."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dying import LORA, StopAt, lines
from stage_runs import CLOCKS, DPO, SFT, sit

from uft.errors import BAD_REQUEST, GOOD, STOPPED, UftError
from uft.runs import Run, create_run, summary
from uft.training import jobs, session
from uft.training.liveness import Stop

# --- what is written


def test_steps_and_counters_run_on_and_every_line_names_its_stage(finished):
    folder, _ = finished
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


def test_results_of_the_run_and_of_its_stages(finished):
    folder, _ = finished
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
def test_a_stage_starts_from_the_model_before_it_and_its_reference_is_that(tuning, two, tmp_path, monkeypatch):
    made = []
    real = session.prepare_stage

    def prepare(*arguments: Any) -> Any:
        prepared = real(*arguments)
        made.append({name: p.detach().clone() for name, p in prepared.trainer.policy.base.state_dict().items()})
        return prepared

    monkeypatch.setattr(session, "prepare_stage", prepare)
    folder = tmp_path / "run"
    assert sit(folder, two(*tuning)) == GOOD
    left = weights(folder / "stages/1-sft/model")
    started = {name.replace(".base_layer", ""): tensor for name, tensor in made[1].items() if "lora_" not in name}
    assert all(torch.equal(started[name], tensor) for name, tensor in left.items())
    assert any(not torch.equal(left[name], tensor) for name, tensor in weights(folder / "model").items())
    first = next(line for line in lines(folder / "metrics.jsonl") if line["step"] == SFT + 1)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy = reference
    check = json.loads((folder / "stages/2-dpo/check.json").read_text())
    assert check["policy_against_reference"]["largest_difference"] < 1e-4


def test_the_reference_may_be_the_model_that_the_run_started_from(two, tmp_path):
    folder = tmp_path / "run"
    assert sit(folder, two(reference="initial")) == GOOD
    first = next(line for line in lines(folder / "metrics.jsonl") if line["step"] == SFT + 1)
    assert abs(first["loss"] - math.log(2)) > 1e-3
    assert json.loads((folder / "stages/2-dpo/check.json").read_text())["policy_against_reference"] == {}


def test_the_evaluation_is_one_for_all_stages(finished):
    """The same names in every line, over the rows of both stages, against the model that the run started from."""
    folder, _ = finished
    measured = [line for line in lines(folder / "metrics.jsonl") if "eval/nll" in line]
    names = [{name for name in line if name.startswith("eval/")} for line in measured]
    assert all(own == names[0] for own in names)
    assert {"eval/demonstration/nll", "eval/preference/margin"} <= names[0]
    assert measured[0]["eval/log_ratio"] == pytest.approx(0, abs=1e-6)
    # at the boundary the distance from the start of the run goes on, where one from the stage's start would be 0
    assert abs(measured[1]["eval/log_ratio"]) > 1e-4
    assert abs(measured[2]["eval/log_ratio"]) > 1e-4


def test_a_stage_is_what_a_run_of_its_own_would_be(finished, two, tmp_path):
    """Two runs by hand, the second from the first one's model, give the same training to the last bit."""
    (folder, _), config = finished, two()
    first, second = (stage.config for stage in session.stages_of(config))
    assert session.train(create_run(tmp_path / "first", "{}\n", []), first, Stop()) == GOOD
    started = replace(second, model=replace(second.model, path=str(tmp_path / "first" / "model")))
    assert session.train(create_run(tmp_path / "second", "{}\n", []), started, Stop()) == GOOD
    for name, tensor in weights(folder / "model").items():
        assert torch.equal(weights(tmp_path / "second" / "model")[name], tensor), name
    alone = [line["loss"] for line in lines(tmp_path / "second/metrics.jsonl") if "loss" in line]
    assert [x["loss"] for x in lines(folder / "metrics.jsonl") if "loss" in x and x["stage"] == "dpo"] == alone


# --- rows that a stage makes


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in CLOCKS}


@pytest.mark.slow
def test_rows_are_made_and_trained_on(chain, files, tmp_path):
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
    assert result["making_seconds"] == result["stages"]["say"]["wall_seconds"] > 0
    assert "of stages that make rows" in (folder / "console.log").read_text()
    assert result["stages"]["say"]["completions"] == sum(len(line["negatives"]) for line in made)
    for name in ("result.json", "stages/2-say/result.json"):  # the stage had just given the rows their name
        (folder / name).unlink()
    assert sit(folder, config) == GOOD
    again = Run(folder).result()["stages"]["say"]
    assert timeless(again) == timeless(result["stages"]["say"])
    assert result["steps"] == Run(folder).info()["total_steps"] == 2 + math.ceil(len(made) / 5)
    named = {
        name for line in lines(folder / "metrics.jsonl") for name in line if name.startswith("eval/demonstration/")
    }
    assert "eval/demonstration/nll" in named


@pytest.mark.slow
def test_what_an_annotating_stage_holds_out_is_measured_and_never_trained_on(chain, model_folder, tmp_path):
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


# --- looking before


def test_check_and_data_look_at_every_stage(chain, capsys):
    parts = {
        "sft": ("sft", "demonstration", "train.steps=2"),
        "say": ("generate", "demonstration"),
        "dft": ("dft", "stage:say", "train.steps=2"),
        "dpo": ("dpo", "preference", "train.steps=3", "objective.beta=0.3"),
    }
    config = chain(parts)
    assert jobs.check(config) == GOOD
    said = capsys.readouterr().out
    for words in ("stage 1 of 4: sft (fit)", "demonstration: 10 rows", jobs.NOT_THERE, "dpo  beta=0.3"):
        assert words in said
    assert said.count("largest step") == 2
    assert said.count("evaluation ") == 1, "all stages are measured on the same rows"
    assert "All is well" in said
    assert jobs.show_data(config) == GOOD
    shown = capsys.readouterr().out
    places = [shown.index(words) for words in ("stage 1 of 4", "  demonstration:", "stage 4 of 4", "  preference:")]
    assert places == sorted(places)


# --- what is refused


def test_data_of_any_stage_that_changed_is_refused(two, files, tmp_path):
    folder, config = tmp_path / "run", two()
    assert sit(folder, config, StopAt(40)) == STOPPED
    own = Path(shutil.copy(files["preference"], tmp_path / "other.jsonl"))
    own.write_text("".join(reversed(own.read_text().splitlines(keepends=True))))
    stage = config.stages["dpo"]["config"]
    data = replace(config.data, sources={"preference": replace(config.data.sources["preference"], path=str(own))})
    assert "data" not in stage
    with pytest.raises(UftError, match="its rows changed since the run began"):
        sit(folder, replace(config, data=data))
    assert sit(folder, config) == GOOD


def test_bad_rows_of_a_later_stage_are_told_before_the_first_step(chain, files, tmp_path):
    (tmp_path / "bad.jsonl").write_text(files["preference"].read_text() + '{"prompt": "w3"}\n')
    parts = {
        "sft": ("sft", "demonstration", "train.steps=2"),
        "dpo": ("dpo", str(tmp_path / "bad.jsonl"), "train.steps=2"),
    }
    with pytest.raises(UftError, match=r"bad.jsonl:13") as caught:
        sit(tmp_path / "run", chain(parts))
    assert caught.value.code == BAD_REQUEST
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_one_name_for_two_sets_of_held_out_rows_is_refused(chain, files, tmp_path):
    parts = {
        "one": ("sft", str(files["demonstration"]), "train.steps=2"),
        "two": ("sft", str(files["preference"]), "train.steps=2"),
    }
    with pytest.raises(UftError, match="holds out other rows in stage two"):
        sit(tmp_path / "run", chain(parts))
