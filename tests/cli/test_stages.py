"""What verbs make of a run of several stages."""

from pathlib import Path

from uft.cli.manage import describe
from uft.cli.verbs import with_model
from uft.config.compose import compose
from uft.config.frozen import frozen
from uft.runs import Run, create_run, write_json


def staged(folder: Path) -> Run:
    """A run that two stages have begun: one has made rows, the second is on its way."""
    run = create_run(folder, frozen(compose(["experiment=poft"])), [], total_steps=329)
    for name in ("1-baseline", "2-poft/checkpoints/step-000200"):
        (run.path / "stages" / name).mkdir(parents=True)
    (run.path / "stages/1-baseline/rows.jsonl").write_text("{}\n")
    write_json(run.path / "stages/1-baseline/result.json", {"status": "finished"})
    return run


def test_generation_finds_the_rows_that_a_stage_made(tmp_path):
    settings = with_model(staged(tmp_path / "run"))
    assert "stages" not in settings
    sources = settings["data"]["sources"]
    assert sources["instruct"]["path"] == str(tmp_path / "run/stages/1-baseline/rows.jsonl")
    assert sources["pairs"]["path"] == "builtin:playground/pairs"
    assert settings["model"]["path"] == str(tmp_path / "run/model")


def test_steps_of_all_stages_are_counted(tmp_path):
    run = staged(tmp_path / "run")
    row = describe(run)
    assert (row["status"], row["steps"], row["total_steps"]) == ("interrupted", 200, 329)
    write_json(run.path / "stages/1-baseline/result.json", {"status": "finished", "steps": 100})
    assert describe(run)["steps"] == 300
    assert [stage.name for stage in run.stages] == ["1-baseline", "2-poft"]
