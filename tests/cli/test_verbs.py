"""What each verb does, with a worker that takes milliseconds."""

import json
import re

import pytest

from uft.cli import VERBS, main
from uft.cli.app import describe
from uft.cli.verbs import PAGES, with_model
from uft.runs import find_runs


def only_run(folder):
    (run,) = find_runs(folder / "outputs")
    return run


@pytest.fixture
def trained(worker, capfd):
    assert main(["train", "objective=sft", "tracking=none", "run.name=x"]) == 0
    capfd.readouterr()
    return only_run(worker)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(worker, capsys, verb):
    try:
        code = main([verb, "--help"])
    except SystemExit as leave:
        code = leave.code
    out = capsys.readouterr().out
    assert code == 0
    assert f"uft {verb}" in out
    assert list(worker.iterdir()) == []


def test_help_lists_the_choices_on_disk(worker, capsys):
    (worker / "conf-user" / "objective").mkdir(parents=True)
    (worker / "conf-user" / "objective" / "mine.yaml").write_text("# My own method. Second sentence.\nname: mine\n")
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\n  mine +My own method\n", out)
    assert re.search(r"\n  dft +Discriminative Fine-Tuning", out)
    assert "model.adapter     train all weights or a low-rank adapter (none, lora)  [none]" in out
    assert "schema" not in out


def test_describe_knows_nested_keys():
    assert describe("model.lora.rank") == "rank of the adapter  [16]"


def test_every_key_in_the_help_exists():
    assert all(describe(key) for page in PAGES.values() for key in page.keys)


def test_config_shows_values_and_origins(worker, capsys):
    assert main(["config", "objective=dpo", "seed=3"]) == 0
    out = capsys.readouterr().out
    assert "beta: 0.1 " in out
    assert "# conf/objective/dpo.yaml:" in out
    assert "# command line" in out


def test_config_diff(trained, capfd):
    assert main(["config", "objective=sft", "tracking=none", "--diff", str(trained.path)]) == 0
    assert capfd.readouterr().out == "run.name  x -> null   (may change within a run)\n"
    assert main(["config", f"--diff={trained.path}", "objective=dpo"]) == 0
    out = capfd.readouterr().out
    assert "objective.name" in out
    assert "sft -> dpo" in out
    trained.config_file.write_text(
        trained.config_file.read_text().replace("  steps:", "  from_the_future: 1\n  steps:")
    )
    assert main(["config", "objective=sft", "tracking=none", "--diff", str(trained.path)]) == 0
    assert "train.from_the_future  1 -> (absent)" in capfd.readouterr().out, "a run of another version"
    assert main(["config", "--diff", "nowhere"]) == 2


def test_check_and_data_run_a_job_and_leave_nothing(worker, capfd):
    for verb in ("check", "data"):
        assert main([verb, "model.path=org/name"]) == 0
        assert f"worker {verb}" in capfd.readouterr().out
    assert list(worker.iterdir()) == []


def test_generate_from_any_model(worker, capfd):
    assert main(["generate", "model.path=org/name", "generate.out=a.jsonl"]) == 0
    assert "org/name a.jsonl" in capfd.readouterr().out


def test_annotate_takes_its_column_first(worker, capfd):
    assert main(["annotate", "soft_label", "data=scored", "annotate.temperature=0.2"]) == 0
    assert "worker annotate ok" in capfd.readouterr().out
    assert main(["annotate", "annotate.column=soft_label", "data=scored"]) == 0
    capfd.readouterr()
    assert main(["annotate", "data=scored"]) == 2
    assert "columns: baseline_logp, soft_label" in capfd.readouterr().err
    assert main(["annotate", "softlabel", "data=scored"]) == 2
    assert "did you mean  annotate.column=soft_label ?" in capfd.readouterr().err


def test_generate_from_a_run_takes_its_model_and_configuration(trained, capfd):
    assert main(["generate", str(trained.path)]) == 2
    assert "train.save_model=false" in capfd.readouterr().err
    trained.model_dir.mkdir()
    assert main(["generate", str(trained.path), "generate.seeds=[1,2]"]) == 0
    out = capfd.readouterr().out
    assert f"{trained.model_dir.resolve()} {trained.path}/generated.jsonl" in out
    assert main(["generate", str(trained.path), "generate.sedes=[1]", "data=mixx"]) == 2
    err = capfd.readouterr().err
    assert "did you mean  generate.seeds ?" in err
    assert "did you mean  data=mix ?" in err
    assert main(["generate", "nowhere"]) == 2


def test_generate_finds_the_files_of_a_run_from_another_folder(worker, monkeypatch):
    (worker / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 2)
    words = ["data=files", "+data.sources.mine.path=rows.jsonl", "data.holdout=0", "run.name=x", "tracking=none"]
    assert main(["train", "objective=sft", *words, "+data.sources.other.path=builtin:playground/pairs"]) == 0
    (run,) = find_runs(worker / "outputs")
    (worker / "auto").mkdir()
    (worker / "elsewhere").mkdir()
    monkeypatch.chdir(worker / "elsewhere")
    data = with_model(run)["data"]
    assert data["sources"]["mine"]["path"] == str(worker / "rows.jsonl")
    assert data["sources"]["other"]["path"] == "builtin:playground/pairs"
    assert data["template"] == "auto"


def test_resume_goes_on_with_a_run(worker, capfd):
    assert main(["train", "objective=sft", "run.name=x", "generate.system=fail", "tracking=none"]) == 1
    run = only_run(worker)
    assert main(["resume", str(run.path), "train.batch_size=3"]) == 2
    assert "32 -> 3" in capfd.readouterr().err
    assert main(["resume", str(run.path), "generate.system=ok", "tracking=offline"]) == 0
    assert run.status == "finished"
    assert run.config()["tracking"]["mode"] == "offline"
    assert main(["resume", str(run.path)]) == 0
    assert "nothing to do" in capfd.readouterr().out
    assert (run.path / "sittings").read_text() == "fail\nok\n"


def test_resume_works_from_another_folder_after_a_move(worker, monkeypatch, capfd):
    assert main(["train", "objective=sft", "run.name=x", "generate.system=fail", "tracking=none"]) == 1
    elsewhere = worker / "elsewhere"
    only_run(worker).path.rename(elsewhere)
    (worker / "sub").mkdir()
    monkeypatch.chdir(worker / "sub")
    capfd.readouterr()
    assert main(["resume", "../elsewhere", "generate.system=ok"]) == 0
    assert f"cwd={worker}\n" in capfd.readouterr().out, "relative paths of its data start where it was started"


def test_ls(worker, capsys):
    assert main(["ls"]) == 0
    assert "No runs in outputs/  Make one:" in capsys.readouterr().out
    assert main(["ls", "nowhere"]) == 2
    for name, script in (("a", "ok"), ("b", "fail")):
        main(["train", "train.steps=200", "tracking=none", f"run.name={name}", f"generate.system={script}"])
    (worker / "outputs" / "broken").mkdir()
    (worker / "outputs" / "broken" / "config.yaml").write_text("a: [")
    (worker / "outputs" / "broken" / "run.json").write_text("{}")
    capsys.readouterr()
    assert main(["ls"]) == 0
    out = capsys.readouterr().out
    assert "finished" in out
    assert "2/200" in out
    assert "1.5" in out
    assert "b: ValueError: it broke" in out
    assert "unreadable" in out
    assert main(["ls", "--json", "outputs"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["a"]["eval/nll"] == 1.5
    assert rows["b"]["status"] == "failed"


def test_doctor_says_what_there_is_and_no_secrets(program, tmp_path):
    secret = "0123456789abcdef0123456789abcdef01234567"
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = program("doctor", cwd=tmp_path, env={"WANDB_API_KEY": secret, "HF_TOKEN": f"hf_{secret}", **nowhere})
    assert done.returncode == 0, done.stderr
    assert secret not in done.stdout + done.stderr
    assert "W&B key    yes" in done.stdout
    assert "127.0.0.1 does not answer" in done.stdout
    assert "threads used by torch" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [[], ["-m", "seed=1,2"]], ids=["a run", "a sweep"])
def test_wrong_settings_do_not_hide_bad_rows(worker, capfd, more):
    (worker / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\nnot json\n')
    words = ["data=files", "+data.sources.mine.path=rows.jsonl", "+data.sources.hub.path=org/unreachable"]
    wrong = ["train.stps=3", "data.sources.hub.limit=0", "data.sources.mine.holdout=0.99"]
    assert main(["train", *more, "objective=sft", *words, *wrong]) == 2
    err = capfd.readouterr().err
    for said in ("train.stps=3", "hub.limit=0", "rows.jsonl:2", "rows.jsonl:3", "leaves no row to train on"):
        assert said in err
    assert not (worker / "outputs").exists()
