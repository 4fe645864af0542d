"""What each verb does, with a worker that takes milliseconds."""

import json
import re
import shlex
import shutil

import pytest

from uft.cli import VERBS, main, manage
from uft.cli.help import PAGES, describe
from uft.cli.verbs import as_found, with_sources
from uft.config.compose import compose
from uft.config.frozen import frozen
from uft.runs import Run, create_run, find_runs, find_weights, write_json


def only_run(folder):
    (run,) = find_runs(folder / "outputs")
    return run


@pytest.fixture
def trained(worker, capfd):
    assert main(["train", "objective=sft", "tracking=none", "run.name=x"]) == 0
    capfd.readouterr()
    return only_run(worker)


@pytest.mark.parametrize("columns", [80, 120])
def test_help_of_every_verb(worker, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in ([], *([verb] for verb in VERBS), ["train", "", "objective", "experiment", "data"]):
        try:
            code = main([*words[:1], "--help", *words[2:]])
        except SystemExit as leave:
            code = leave.code
        assert code == 0
        out = capsys.readouterr().out
        assert words[1:] or f"uft {''.join(words)}" in out
        assert [line for line in out.splitlines() if len(line) > columns] == []
    assert list(worker.iterdir()) == []
    assert describe("model.lora.rank") == "rank of the adapter  [16]"
    assert all(describe(key) for page in PAGES.values() for key in page.keys.split())


def test_help_lists_the_choices_on_disk(worker, capsys):
    (worker / "conf-user" / "objective").mkdir(parents=True)
    (worker / "conf-user" / "objective" / "mine.yaml").write_text("# My own method. Second sentence.\nname: mine\n")
    assert main(["train", "--help", "objective"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\n  mine +My own method\n", out)
    assert re.search(r"\n  dft +Discriminative Fine-Tuning", out)
    assert main(["train", "--help", "objectiv"]) == 2
    assert "did you mean  uft train --help objective ?" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r", kto, ld_dpo, .*\bmine\b", " ".join(out.split()))  # folded to the width of the terminal
    assert re.search(r"model.adapter +train all weights or a low-rank adapter \(none, lora\)\s+\[none\]", out)
    assert "\nschema=" not in out
    first, settings, choices = (
        out.index(text) for text in ("uft train objective=ift", "Common settings", "\nobjective=")
    )
    assert first < settings < choices, "what is needed first stands first"


def test_config_shows_values_and_origins(worker, capsys):
    assert main(["config", "objective=dpo", "seed=2", "seed=3"]) == 0
    out, said = capsys.readouterr()
    assert said == "uft: seed=2 is overruled by seed=3\n"
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
        trained.config_file.read_text().replace("  steps:", "  from_the_future: 1\n  steps:", 1)
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


def test_select_and_scored_samples_are_told_what_they_lack(worker, capfd):
    assert main(["select", "select.by=random", "data=instruct"]) == 0
    assert "worker select" in capfd.readouterr().out
    lacking = {
        ("select", "data=instruct"): ("how rows are chosen is not said", "select.by=random"),
        ("select", "select.by=pds", "data=instruct"): ("a source with share 0 (pairs)", "select.dev=NAME"),
        ("select", "select.by=pds", "select.dev=instruct", "data=instruct"): ("are no candidates", "instruct.share=0"),
        ("select", "select.by=pds", "select.dev=pairs", "data=instruct", "model.dtype=bfloat16"): (
            "takes differences that bfloat16 loses",
            "model.dtype=float32",
        ),
        ("generate", "generate.score=true", "data=instruct", "data.sources.instruct.checker=null"): (
            "data.sources.instruct.checker is not set",
            "data.sources.instruct.checker=exact",
        ),
    }
    for words, told in lacking.items():
        assert main(list(words)) == 2
        said = capfd.readouterr().err
        assert all(text in said for text in told)


def test_generate_from_a_run_takes_its_model_and_configuration(trained, capfd):
    assert main(["generate", str(trained.path)]) == 2
    assert "train.save_model=false" in capfd.readouterr().err
    trained.model_dir.mkdir()
    assert main(["generate", str(trained.path), "generate.seeds=[1,2]"]) == 0
    out = capfd.readouterr().out
    assert f"{trained.model_dir.resolve()} {trained.path}/generated.jsonl" in out
    assert "generate.limit" not in out
    assert main(["generate", str(trained.path)]) == 0  # a handful, and how to get all
    (everything,) = re.findall("all:  uft (generate .*)", capfd.readouterr().out)
    assert main(shlex.split(everything)) == 0
    assert "generate.limit" not in capfd.readouterr().out
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
    run.model_dir.mkdir()
    data = as_found(find_weights(str(run.path)), ())["data"]
    assert data["sources"]["mine"]["path"] == str(worker / "rows.jsonl")
    assert data["sources"]["other"]["path"] == "builtin:playground/pairs"
    assert data["template"] == "auto"


@pytest.mark.slow
def test_a_run_is_a_folder_a_name_or_last(worker, capfd):
    def train(*words):
        return main(["train", "objective=sft", "tracking=none", *words])

    assert main(["resume"]) == 2
    assert "no run in outputs is unfinished" in capfd.readouterr().err
    assert train("run.name=x", "generate.system=fail") == 1
    assert train("-m", "seed=1,2", "sweep.name=s") == 0
    x = next(run for run in find_runs(worker / "outputs") if run.name == "x")
    old = x.path.parent.with_name("2020-01-01")
    shutil.copytree(x.path, old / "x")
    capfd.readouterr()
    for words, code in ((["resume"], 2), (["resume", "train.log_every=7"], 2)):
        assert main(words) == code
        err = capfd.readouterr().err
        (command,) = re.findall(r"the newest unfinished one:  uft (.*?)   \(failed at step", err)
    assert command.endswith("/x train.log_every=7")
    for name, listed in (
        ("x", ["x"]),
        ("s", ["sft-seed1", "sft-seed2"]),
        ("s/sft-seed2", ["sft-seed2"]),
        (old.name, ["x"]),
    ):
        assert main(["ls", name, "--json"]) == 0
        assert [row["name"] for row in json.loads(capfd.readouterr().out)] == listed
    assert main(["sync", "x", "s", "last", "--dry-run"]) == 0
    assert main(["config", "objective=sft", "--diff", "x"]) == 0
    assert main(["generate", "x"]) == 2
    assert f"{x.path.relative_to(worker)}  has no weights" in capfd.readouterr().err, "the newest one of the name"
    assert main(["resume", *shlex.split(command)[1:-1], "generate.system=ok"]) == 0
    assert x.status == "finished"
    assert main(["resume", "last"]) == 0
    assert f"{x.path.relative_to(worker)} is finished already" in capfd.readouterr().out
    assert main(["compare", "last"]) == 0
    assert main(["resume", "y"]) == main(["ls", "y"]) == main(["sync", "y"]) == 2


def test_a_file_of_rows_is_short_for_a_source(worker, capfd):
    (worker / "my rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 2)
    (worker / "more").mkdir()
    more = (worker / "my rows.jsonl").rename(worker / "more" / "1.jsonl")
    shutil.copy(more, "my rows.jsonl")
    sources = {
        "data=more/1.jsonl": {"_1": "more/1.jsonl"},
        "data=my rows.jsonl": {"my_rows": "my rows.jsonl"},
        "data=more": {"more": "more"},
        "data=org/name": {"name": "org/name"},
    }
    for word, paths in sources.items():
        assert with_sources([word]) == with_sources(with_sources([word]))
        settings = compose(with_sources([word]))["data"]
        assert (settings["name"], {name: node["path"] for name, node in settings["sources"].items()}) == (
            "files",
            paths,
        )
    mixed = compose(with_sources(["data=mix", "more/1.jsonl", "my rows.jsonl"]))["data"]["sources"]
    assert {"pairs", "_1", "my_rows"} <= set(mixed)
    assert main(["train", "-m", "more/1.jsonl", "objective=sft", "seed=1,2", "data.holdout=0", "tracking=none"]) == 0
    for words in (["data", "more/1.jsonl"], ["generate", "my rows.jsonl"], ["annotate", "soft_label", "data=more"]):
        assert main(words) == 0
        assert f"worker {words[0]}" in capfd.readouterr().out
    both = compose(with_sources(["data=[more/1.jsonl,my rows.jsonl]"]))["data"]["sources"]
    assert [node["path"] for node in both.values()] == ["more/1.jsonl", "my rows.jsonl"]
    several = with_sources(["-m", "data=more/1.jsonl,b.jsonl", "seed=1,2"], None, True)
    assert several == ["-m", "data=files", "+data.sources.rows.path=more/1.jsonl,b.jsonl", "seed=1,2"]
    assert main(["train", "-m", "data=mix,b.jsonl"]) == 2
    assert "mix is not a file of rows, and a sweep takes mixtures or files" in capfd.readouterr().err
    assert main(["train", "-m", "gone.jsonl", "seed=1,2"]) == 2
    assert "gone.jsonl  no such file" in capfd.readouterr().err
    assert main(["train", "nonsense"]) == 2
    assert "cannot be read as key=value" in capfd.readouterr().err
    assert main(["train", "mine.yaml"]) == 2
    assert "conf-user/experiment/mine.yaml" in capfd.readouterr().err


def test_resume_goes_on_with_a_run_also_from_another_folder_after_a_move(worker, monkeypatch, capfd):
    assert main(["train", "objective=sft", "run.name=x", "generate.system=fail", "tracking=none"]) == 1
    run = only_run(worker)
    assert main(["resume", str(run.path), "train.batch_size=3"]) == 2
    assert "32 -> 3" in capfd.readouterr().err
    assert main(["resume", str(run.path), "data=files", "+data.sources.rows.path=rows.jsonl"]) == 2
    err = capfd.readouterr().err
    assert re.search(r"data\.sources\.rows\.path +\(absent\) -> rows\.jsonl", err)
    assert "rows.kind" not in err, "a source is told once"
    again = f"uft train init_from={run.path.relative_to(worker)} objective=sft generate.system=fail tracking=none"
    assert f"or start another run from its weights:  {again}\n" in err
    run = Run(run.path.rename(worker / "elsewhere"))
    (worker / "sub").mkdir()
    monkeypatch.chdir(worker / "sub")
    assert main(["resume", "../elsewhere", "generate.system=ok", "tracking=offline"]) == 0
    assert f"cwd={worker}\n" in capfd.readouterr().out, "relative paths of its data start where it was started"
    assert run.status == "finished"
    assert run.config()["tracking"]["mode"] == "offline"
    assert main(["resume", "../elsewhere"]) == 0
    assert "nothing to do" in capfd.readouterr().out
    assert (run.path / "sittings").read_text() == "fail\nok\n"


def test_ls(worker, capsys):
    assert main(["ls"]) == 0
    assert "No runs in outputs/  Make one:" in capsys.readouterr().out
    assert main(["sync"]) == 0
    assert "No runs in outputs/: nothing to upload." in capsys.readouterr().out
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


@pytest.mark.slow
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


def test_a_run_of_several_stages(tmp_path):
    """Two stages have begun: one has made rows, the second is on its way."""
    run = create_run(tmp_path / "run", frozen(compose(["experiment=poft"])), [], total_steps=329)
    for name in ("1-baseline", "2-poft/checkpoints/step-000200"):
        (run.path / "stages" / name).mkdir(parents=True)
    (run.path / "stages/1-baseline/rows.jsonl").write_text("{}\n")
    write_json(run.path / "stages/1-baseline/result.json", {"status": "finished"})
    row = manage.describe(run)
    assert (row["status"], row["steps"], row["total_steps"]) == ("interrupted", 200, 329)
    write_json(run.path / "stages/1-baseline/result.json", {"status": "finished", "steps": 100})
    assert manage.describe(run)["steps"] == 300
    assert [stage.name for stage in run.stages] == ["1-baseline", "2-poft"]
    run.model_dir.mkdir()
    write_json(run.path / "result.json", {"status": "finished"})
    settings = as_found(find_weights(str(run.path)), ())
    assert "stages" not in settings
    sources = settings["data"]["sources"]
    assert sources["instruct"]["path"] == str(tmp_path / "run/stages/1-baseline/rows.jsonl"), "rows that a stage made"
    assert sources["pairs"]["path"] == "builtin:playground/pairs"
    assert settings["model"]["path"] == str(tmp_path / "run/model")


def test_a_model_of_the_configuration_goes_by_its_name(worker, capfd):
    """Where runs and folders go by theirs: to look at an answer before anything was trained."""
    assert main(["generate", "playground", "sure the answer"]) == main(["eval", "playground", "eval.rows=4"]) == 0
    assert capfd.readouterr().out.count("builtin:playground") == 2
    assert main(["generate", "playgruond", "sure"]) == 2
