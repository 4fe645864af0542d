"""Received folders: planted code is not run, and nothing is written outside of its place."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import Planted

from uft.cli import main
from uft.config.compose import compose
from uft.config.frozen import frozen
from uft.config.schema import Data, Model, Source
from uft.data.sources import load_sources
from uft.errors import UftError
from uft.model.load import load_model, load_tokenizer, model_config
from uft.runs import create_run, write_json

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("debug=fast", "objective=sft", "tracking=none")


@pytest.fixture
def trace(tmp_path):
    """The file that is left behind by whatever runs; it must not be there at the end."""
    trace = tmp_path / "this-was-run"
    yield trace
    assert not trace.exists(), "planted code was run"


@pytest.fixture
def evil(tmp_path, playground, trace, monkeypatch):
    """evil(file, **keys): the embedded model with these keys in one of its JSON files, and with code beside it."""
    monkeypatch.syspath_prepend(str(tmp_path / "evil"))

    def make(file: str, **keys) -> Path:
        folder = tmp_path / "evil"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(playground, folder)
        found = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        (folder / file).write_text(json.dumps(found | keys))
        code = f"import pathlib; pathlib.Path({str(trace)!r}).touch()\nclass Evil: pass\n"
        for name in ("evil_code.py", "modeling_evil.py", "custom_generate/generate.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code)
        return folder

    return make


MAPS = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"), "evil_code.Evil")
NESTED = {"trust_remote_code": True, "auto_map": MAPS, "model_type": "llama", "_name_or_path": "someone/repo"}
PLANTED = [
    ("config.json", {"auto_map": MAPS, "trust_remote_code": True}),
    ("config.json", {"auto_map": MAPS, "model_type": "evil", "trust_remote_code": True}),
    ("config.json", {"auto_map": {name: f"someone/repo--{code}" for name, code in MAPS.items()}}),
    ("config.json", {"text_config": NESTED, "vision_config": NESTED, "quantization_config": {"quant_method": "evil"}}),
    ("config.json", {"attn_implementation": "someone/repo"}),
    ("config.json", {"_attn_implementation": "kernels-community/flash-mla"}),
    ("config.json", {"_attn_implementation_internal": "someone/repo", "_experts_implementation_internal": "a/b"}),
    ("config.json", {"experts_implementation": {"": "someone/repo"}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil_code.Evil", None]}, "trust_remote_code": True}),
    ("tokenizer_config.json", {"tokenizer_class": "evil_code.Evil", "auto_map": {"AutoTokenizer": "evil_code.Evil"}}),
    ("processor_config.json", {"auto_map": {"AutoProcessor": "evil_code.Evil"}, "processor_class": "Evil"}),
    ("generation_config.json", {"custom_generate": "someone/repo", "trust_remote_code": True}),
]


def test_a_model_folder_runs_nothing(evil, monkeypatch, tmp_path, trace):
    """Its configurations may name code of their own, of a repository and of the hub's kernels: it is loaded without
    them, or refused in one line, and the hub is not asked for them."""
    asked = []
    monkeypatch.setitem(
        sys.modules, "kernels", type("Kernels", (), {"get_kernel": lambda *words, **_: asked.append(words)})
    )
    monkeypatch.setattr("socket.socket.connect", lambda *words: asked.append(words))
    refused = []
    for file, keys in PLANTED:
        model = Model(name="m", path=str(evil(file, **keys)))
        if error := refusal(model):
            assert len(error.splitlines()) < 8
            refused.append(next(iter(keys)))
        assert asked == [], keys
    assert refused.count("attn_implementation") == refused.count("_attn_implementation") == 1
    assert "experts_implementation" in refused
    assert not trace.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trusted = Model(name="m", path=str(evil("config.json", **PLANTED[1][1])), trust_remote_code=True)
    with suppress(Exception):
        model_config(trusted)
    assert trace.exists(), "the plant works"
    trace.unlink()


def refusal(model: Model) -> str:
    """Why a model was not loaded; empty where it was."""
    try:
        load_tokenizer(model)
        model_config(model)
        load_model(model, torch.device("cpu"), 0)
    except UftError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "place",
    [
        "model.path",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("reference.path", "annotate.models", "a run")),
    ],
)
def test_a_model_folder_runs_nothing_wherever_it_is_named(evil, tmp_path, uft, place):
    code = {"auto_map": MAPS, "trust_remote_code": True, "_attn_implementation": "someone/repo"}
    folder = evil("config.json", **code)
    if place == "annotate.models":
        words = ["annotate", "baseline_logp", "data=instruct", f"annotate.models=[{folder}]", "annotate.out=out.jsonl"]
    elif place == "a run":
        uft("train", *SMALL, "run.dir=run")
        shutil.rmtree(tmp_path / "run" / "model")
        shutil.copytree(folder, tmp_path / "run" / "model")
        words = ["generate", "run", "generate.out=out.jsonl"]
    else:
        objective = "objective=dpo" if place == "reference.path" else "objective=ift"
        words = ["train", "debug=fast", objective, "data=pairs", "tracking=none", f"{place}={folder}"]
    err = uft(*words, code=2).stderr
    assert "names code of the hub to run, _attn_implementation=someone/repo" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_templates_are_not_written_outside_of_the_model_s_folder(evil, tmp_path, uft):
    template = (evil("config.json") / "chat_template.jinja").read_text()
    for name in ("../../x", "..", "/tmp/x", "a/b"):
        named = [{"name": "default", "template": template}, {"name": name, "template": template}]
        folder = evil("tokenizer_config.json", chat_template=named)
        (folder / "chat_template.jinja").unlink()
        before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
        err = uft("train", *SMALL, f"model.path={folder}", "run.dir=run", code=2).stderr
        assert f"a chat template is named '{name}'" in err
        assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not Path("/tmp/x.jinja").exists()


@pytest.mark.slow
def test_pickles_in_a_run_folder_and_in_the_caches_are_not_loaded(tmp_path, trace, uft):
    """Beside a checkpoint, a model and cached rows, under the names that other programs load."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Planted(trace)], dtype=object), allow_pickle=True)
    content = pickle.dumps(Planted(trace))
    words = (*SMALL, "train.steps=4", "train.checkpoint_every=2", "run.dir=run", "reference.mode=cached")
    uft("train", *words)
    run = tmp_path / "run"
    folders = [
        run,
        run / "model",
        *run.glob("checkpoints/*"),
        *(path for path in (tmp_path / "cache").rglob("*") if path.is_dir()),
    ]
    assert len(folders) > 6
    names = (
        "rng_state.pth",
        "train_state.pt",
        "optimizer.pt",
        "scheduler.pt",
        "training_args.bin",
        "pytorch_model.bin",
    )
    for folder in folders:
        for name in (*names, "state.pkl", ".metadata", "tokens.pkl"):
            (folder / name).write_bytes(content)
        for name in ("rows.npy", "logps.npy"):
            (folder / name).write_bytes(buffer.getvalue())
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    for command in (
        ["resume", "run"],
        ["train", *words, "run.dir=again"],
        ["generate", "run", "generate.limit=4", "generate.max_new_tokens=8"],
        ["compare", "run"],
        ["ls"],
    ):
        uft(*command)
        assert not trace.exists(), command


ODD = ("/x", "../x", "con", "n" * 300, "a\nb", "\x1b[2J\x1b]0;owned\x07", "\u202egnp")


@pytest.mark.slow
def test_names_in_a_received_folder_move_no_cursor_and_lead_nowhere(tmp_path, uft):
    """Of runs, metrics, folders to start from, errors, states and swept keys: shown as text, and nothing else."""
    config, sweep = frozen(compose(list(SMALL))), tmp_path / "outputs" / "day" / "sweep"
    for number, odd in enumerate(ODD):
        name = odd if "/" not in odd and len(odd) < 200 else f"run{number}"
        run = create_run(sweep / name, config, [odd], cwd=odd, sweep=odd, wandb={"mode": "offline", "project": odd})
        metrics = {f"eval/{odd}/nll": 1.0, odd: 2.0, "eval/nll": 0.5}
        result = {"status": "failed" if number % 2 else "finished", "error": odd, "steps": 1}
        write_json(run.path / "result.json", {**result, "final": metrics, "best": metrics})
        run.metrics_file.write_text(json.dumps({"step": 1, **metrics}) + "\n")
        run.samples_file.write_text(json.dumps({"step": 1, "source": odd, "reply": odd, "prompt": odd}) + "\n")
    write_json(run.path / "result.json", {"status": ODD[5], "error": ODD[5]})
    command = {"words": ["-m", *ODD], "cwd": "n" * 300}
    write_json(
        sweep / "sweep.json", {"jobs": [{"name": ODD[5]}], "commands": [command], "axes": {odd: [odd] for odd in ODD}}
    )
    before = sorted(path for path in tmp_path.rglob("*"))
    for words in (
        ["ls"],
        ["ls", "--json"],
        ["compare", "outputs/day/sweep"],
        ["sync", "--dry-run"],
        ["resume", "outputs"],
    ):
        done = uft(*words, code=None)
        assert not set(done.stdout + done.stderr) & set("\x1b\x07\u202e"), words
        assert "Traceback" not in done.stderr
        assert "a fault in uft" not in done.stderr
    own = {path for path in tmp_path.rglob("*") if path.is_relative_to(sweep) or "cache" in path.parts}
    assert [path for path in set(tmp_path.rglob("*")) - own if path not in before] == []
    assert not Path("/x").exists()


ENDLESS = ("[" * 100_000, "[" * 50_000 + "]" * 50_000, "9" * 100_000)


def test_brackets_and_digits_without_end_are_refused_at_once(playground, tmp_path, monkeypatch, capsys):
    """As a word, in the commands of a sweep, in the files of a run, of rows and of a model."""
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    sweep, run, model = tmp_path / "sweep", tmp_path / "run", tmp_path / "evil"
    for folder in (sweep, run):
        folder.mkdir()
    shutil.copytree(playground, model)
    (run / "config.yaml").write_text("seed: 0\n")
    for text in ENDLESS:
        commands = [{"words": ["-m", "seed=1,2", f"optim.lr={text}"], "cwd": str(tmp_path)}]
        (sweep / "sweep.json").write_text(json.dumps({"commands": commands}))
        for words in (["train", f"optim.lr={text}"], ["resume", "sweep"]):
            assert main(words) == 2
            assert "is nested too deeply, or has a number of more than 4,300 digits" in capsys.readouterr().err
        for file in (run / "run.json", sweep / "sweep.json"):
            file.write_text('{"id": ' + text + "}")
            assert main(["resume", str(file.parent)]) == 1
            assert "is damaged" in capsys.readouterr().err
        (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a", "score": ' + text + "}\n")
        with pytest.raises(UftError, match="broken JSON"):
            load_sources(Data(name="d", sources={"mine": Source(path=str(tmp_path / "rows.jsonl"))}))
        (model / "config.json").write_text('{"model_type": ' + text + "}")
        with pytest.raises(UftError, match=r"config\.json is damaged"):
            load_tokenizer(Model(name="m", path=str(model)))
    assert time.process_time() - began < 60


SITE = """
import os, sys
if "STAND_IN" in os.environ:
    from uft.launch import process
    process.COMMAND = (sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
"""


@pytest.mark.slow
def test_pickles_of_submitit_in_a_received_sweep_folder_are_not_loaded(tmp_path, trace):
    """A job that is killed leaves no answer: an answer that was there before is not taken for it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="extra [slurm] is not installed")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    for number in range(os.getpid(), os.getpid() + 4000):  # ids of jobs on this machine are those of processes
        folder = tmp_path / "received" / ".submitit" / str(number)
        folder.mkdir(parents=True)
        for name in ("0_result", "submitted"):
            (folder / f"{number}_{name}.pkl").write_bytes(pickle.dumps(Planted(trace)))
    words = ["train", "-m", *SMALL, "hydra/launcher=submitit_local", "seed=1", "hydra.sweep.dir=received"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", "STAND_IN": "1"}
    command = [sys.executable, "-m", "uft", *words, "hydra.launcher.timeout_min=5"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(list((tmp_path / "received" / ".submitit").glob("*/*/*_submitted.pkl"))) == 1
