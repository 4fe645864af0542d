"""Nothing that is read is ever run: no pickle is loaded, no configuration names code."""

import ast
import json
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from mutations import Planted

from uft.cli import main
from uft.config.schema import Data, Source
from uft.data.sources import load_sources
from uft.errors import UftError
from uft.launch.launcher import refuse_untrusted

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = sorted([*(ROOT / "uft").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")])
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.fixture
def planted(tmp_path):
    """(bytes that run code when unpickled, the file they would leave)."""
    trace = tmp_path / "this-was-run"
    content = pickle.dumps(Planted(trace))
    pickle.loads(content)
    assert trace.exists(), "the plant works"
    trace.unlink()
    return content, trace


def calls(tree):
    """Dotted names of everything that a module calls, with its keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}, node.lineno


def test_the_program_unpickles_and_evaluates_nothing():
    for path in PROGRAM:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        modules = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        modules |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not modules & UNPICKLING, path
        for name, words, line in calls(tree):
            place = f"{path}:{line}"
            assert name not in ("torch.load", "eval", "exec", "compile", "yaml.unsafe_load", "os.system"), place
            assert name != "yaml.load" or "yaml.SafeLoader" in text, place
            assert words.get("shell") != "True", place
            if name in ("np.load", "numpy.load"):
                assert words.get("allow_pickle") == "False", place
            if name.endswith("AutoModelForCausalLM.from_pretrained"):
                assert words.get("use_safetensors") == "True", place


def test_weights_in_a_pickle_are_not_loaded(planted, playground, tmp_path):
    import torch

    from uft.config.schema import Model
    from uft.model.load import load_model

    content, trace = planted
    folder = tmp_path / "model"
    shutil.copytree(playground, folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    for name in ("pytorch_model.bin", "model.pt", "pytorch_model.pt", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(content)
    with pytest.raises(UftError, match="safetensors") as error:
        load_model(Model(name="m", path=str(folder)), torch.device("cpu"), 0)
    assert "can run code" in str(error.value)
    assert not trace.exists()


def test_pickles_beside_the_weights_are_not_looked_at(planted, playground, tmp_path):
    import torch

    from uft.config.schema import Model
    from uft.model.load import load_model, load_tokenizer

    content, trace = planted
    folder = tmp_path / "model"
    shutil.copytree(playground, folder)
    for name in ("pytorch_model.bin", "optimizer.pt", "tokenizer.pkl", "vocab.pkl", "custom_generate.pt"):
        (folder / name).write_bytes(content)
    model = Model(name="m", path=str(folder))
    load_tokenizer(model)
    load_model(model, torch.device("cpu"), 0)
    assert not trace.exists()


def test_a_checkpoint_that_is_a_pickle_is_not_loaded(planted, tmp_path):
    from uft.model import checkpoint
    from uft.runs import Run

    content, trace = planted
    folder = Run(tmp_path).checkpoints_dir / "step-000010"
    folder.mkdir(parents=True)
    for name in (checkpoint.TENSORS, checkpoint.STATE, "state.pt", "optimizer.bin"):
        (folder / name).write_bytes(content)
    with pytest.raises(Exception, match=r".*"):
        checkpoint.load(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["rows.pkl", "rows.pt", "rows.npy", "rows.jsonl", "rows.parquet", "rows.arrow", "x.tar"]
)
@pytest.mark.parametrize("card", [False, True])
def test_rows_in_a_pickle_are_not_read(planted, tmp_path, monkeypatch, name, card):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content, trace = planted
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / name).write_bytes(content)
    if card:
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*'\n---\n")
        (folder / "rows.py").write_text(f"import pathlib; pathlib.Path({str(trace)!r}).touch()\n")
    for path in (folder, folder / name):
        with pytest.raises(UftError):
            load_sources(Data(name="d", sources={"mine": Source(path=str(path))}))
    assert not trace.exists()


def test_a_cache_that_is_a_pickle_or_another_table_is_made_again(planted, tmp_path):
    import pickle
    import zlib

    import pyarrow as pa

    from uft.data.table import Corrupt, open_table

    _content, trace = planted
    folder = tmp_path / "tokens"
    folder.mkdir()
    wanted = pa.schema([("row", pa.large_binary())])
    offsets = pa.py_buffer(b"".join(number.to_bytes(8, "little") for number in (0, 1 << 40, 1)))
    beyond = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 2, [None, offsets, pa.py_buffer(b"x")])
    plant = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Planted(trace)),
    }
    named = pa.schema([pa.field("row", pa.binary(), metadata=plant)])
    tables = [
        pa.record_batch({"row": beyond}),
        pa.record_batch({"rows": pa.array([b"x"], pa.large_binary())}),
        pa.record_batch([pa.array([b"x"])], schema=named),
    ]
    contents = [pickle.dumps(Planted(trace))]
    for batch in tables:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        contents.append(sink.getvalue().to_pybytes())
    for content in contents:
        (folder / "table.arrow").write_bytes(content)
        (folder / "about.json").write_text(json.dumps({"checksum": zlib.crc32(content), "notes": {}}))
        with pytest.raises(Corrupt):
            open_table(folder, wanted)
    assert not trace.exists()


# --- configurations

CALL = "evil_package.call"  # to import it leaves a trace
WORDS = [
    "+hydra.callbacks.mine._target_={call}",
    "hydra.sweeper._target_={call}",
    "++hydra.launcher._target_={call}",
    "+hydra.callbacks={{mine: {{_target_: {call}}}}}",
    "+objective._target_={call}",
    "+data.sources.x={{path: y, _target_: {call}}}",
    "hydra.searchpath=[pkg://evil_package]",
    "+hydra.job.env_set.PYTHONPATH=.",
    "+hydra.job_logging.handlers.x.class={call}",
    "hydra.hydra_logging={{version: 1, handlers: {{x: {{'()': {call}}}}}}}",
    "+hydra.launcher.x=[{{_target_: {call}}}]",
    "+hydra.launcher.x=[[1,{{a: {{_target_: builtins.exec, _args_: [1]}}}}]]",
    "+hydra.sweeper._partial_=true",
    "+hydra.launcher._args_=[1]",
    "+tracking.tags=[{{_target_: timeit.timeit}}]",
    "+hydra.launcher.x='${{oc.decode:\"{{_tar${{oc.env:NOTHING,}}get_: {call}}}\"}}'",
    "+hydra.launcher.x='${{oc.create:{{a: 1}}}}'",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with a package that leaves a trace when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UFT_CONF", raising=False)
    package = tmp_path / "evil_package"
    package.mkdir()
    (package / "__init__.py").write_text("import pathlib; pathlib.Path('this-was-run').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_words_that_name_code_are_refused(here, capsys):
    """Every word by `train`, one word by every verb and mode."""
    requests = [["train", word] for word in WORDS]
    requests += [[*verb, WORDS[0]] for verb in (["train", "-m"], ["train", "--cfg", "job"], ["config"], ["check"])]
    for verb, *words in requests:
        assert main([verb, *(word.format(call=CALL) for word in words)]) == 2
        assert "names code to run, and configurations cannot" in capsys.readouterr().err, words
    assert not (here / "this-was-run").exists()
    assert not (here / "outputs").exists()


FILES = {
    "a callback": ("debug/evil.yaml", "# @package _global_\nhydra:\n  callbacks:\n    mine:\n      _target_: {call}\n"),
    "a group of Hydra's": ("hydra/callbacks/evil.yaml", "# mine\nmine:\n  _target_: {call}\n"),
    "a launcher": ("hydra/launcher/evil.yaml", "# mine\n_target_: {call}\n"),
    "a logging handler": (
        "debug/evil.yaml",
        "# @package hydra.job_logging\nversion: 1\nhandlers:\n  x:\n    (): {call}\n",
    ),
    "the environment": ("debug/evil.yaml", "# @package hydra\njob:\n  env_set:\n    LD_PRELOAD: ./evil.so\n"),
    "an object of a setting": ("debug/evil.yaml", "# @package _global_\nmodel:\n  _target_: {call}\n"),
    "objects in a list": ("debug/evil.yaml", "# @package hydra.launcher\nx:\n- - a:\n      _target_: {call}\n"),
    "a list that is referred to": (
        "debug/evil.yaml",
        "# @package _global_\ntracking:\n  tags: [{{_target_: {call}}}]\n"
        "hydra:\n  launcher:\n    x: ${{tracking.tags}}\n",
    ),
    "text that becomes an object": (
        "debug/evil.yaml",
        "# @package hydra.launcher\nx: '${{oc.decode:\"{{_tar${{oc.env:NOTHING,}}get_: {call}}}\"}}'\n",
    ),
    "arguments": ("debug/evil.yaml", "# @package hydra.launcher\n_args_: [1]\n"),
    "jobs of a sweep": (
        "sweep/evil.yaml",
        "# @package hydra\nmode: MULTIRUN\nsweeper:\n  params:\n    +hydra.launcher.x: '[{{_target_: {call}}}]'\n",
    ),
}


FAST = ("a launcher", "an object of a setting", "text that becomes an object", "jobs of a sweep")


@pytest.mark.parametrize(
    ("name", "content"),
    [pytest.param(*file, id=what, marks=() if what in FAST else pytest.mark.slow) for what, file in FILES.items()],
)
def test_files_that_name_code_are_refused(here, capsys, name, content):
    file = here / "conf-user" / name
    file.parent.mkdir(parents=True)
    file.write_text(content.format(call=CALL))
    group, option = name.removesuffix(".yaml").rsplit("/", 1)
    for more in ([], ["seed=1,2", "-m"], ["--cfg", "all"]):
        assert main(["train", f"{group}={option}", *more]) == 2
        said = capsys.readouterr().err
        assert "names code to run, and configurations cannot" in said
        assert f"conf-user/{name}" in said
    if group == "debug":  # a file that a sweep chooses is looked at before anything starts
        assert main(["train", f"debug=fast,{option}", "-m"]) == 2
        assert "names code to run" in capsys.readouterr().err
    assert not (here / "this-was-run").exists()
    assert not (here / "outputs").exists()


@pytest.mark.parametrize("option", ["--config-path", "-cn"])
def test_a_package_is_no_folder_of_configurations(here, capsys, option):
    for more in ([], ["-m"], ["--cfg", "job"]):
        assert main(["train", option, "pkg://evil_package", *more]) == 2
        assert "names code to run" in capsys.readouterr().err
    assert not (here / "this-was-run").exists()


def test_a_pickled_job_is_not_run_again(planted, here, capsys):
    content, trace = planted
    (here / "config.pickle").write_bytes(content)
    for words in (["--experimental-rerun", "config.pickle"], ["--experimental-rerun=config.pickle"]):
        assert main(["train", *words]) == 2
        assert "no such option" in capsys.readouterr().err
    assert not trace.exists()


def test_a_package_is_not_searched_for_configurations(here, capsys):
    (here / "conf-user").mkdir()
    primary = "# mine\ndefaults:\n  - config\n  - _self_\nhydra:\n  searchpath: ['pkg://evil_package']\n"
    (here / "conf-user" / "mine.yaml").write_text(primary)
    assert main(["train", "-cn", "mine", "--cfg", "job"]) == 2
    assert "names code to run" in capsys.readouterr().err
    assert not (here / "this-was-run").exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:pathlib.Path.touch ['this-was-run']", "!!python/name:os.system"]
)
def test_yaml_makes_no_objects(here, capsys, tag):
    (here / "conf-user" / "debug").mkdir(parents=True)
    (here / "conf-user" / "debug" / "evil.yaml").write_text(f"# @package _global_\nseed: {tag}\n")
    assert main(["train", "debug=evil", "--cfg", "job"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (here / "this-was-run").exists()


def test_the_configuration_of_a_run_refers_to_nothing(tmp_path, monkeypatch):
    """A received run folder reads no environment variable when it is resumed."""
    from uft.config.compose import compose
    from uft.config.frozen import frozen, load_config

    monkeypatch.setenv("HOMEBREW_TOKEN", "a-secret-of-this-machine")
    file = tmp_path / "config.yaml"
    file.write_text(frozen(compose()).replace("project: uft", "project: ${oc.env:HOMEBREW_TOKEN}"))
    assert "oc.env" in file.read_text()
    with pytest.raises(UftError, match="refers to nothing") as error:
        load_config(file)
    assert "a-secret-of-this-machine" not in str(error.value)
    file.write_text(frozen(compose()).replace("seed: 0", "seed: !!python/object/apply:os.getpid []", 1))
    with pytest.raises(UftError):
        load_config(file)


OBJECTS = {
    "a node": ("model:\n", "model:\n  _target_: {call}\n"),
    "free keys": ("columns: {{}}", "columns:\n        _target_: {call}\n        _args_: '1'"),
    "a list": ("tags: []", "tags: [{{_target_: {call}}}]"),
    "Hydra's own": ("seed: 0\n", "seed: 0\nhydra:\n  callbacks:\n    x:\n      _target_: {call}\n"),
    "an objective": ("objective:\n", "objective:\n  _target_: {call}\n"),
    "stages": ("seed: 0\n", "seed: 0\nstages:\n  x:\n    do: fit\n    config: {{_target_: {call}}}\n"),
}


@pytest.mark.parametrize(("old", "new"), OBJECTS.values(), ids=OBJECTS)
def test_a_received_run_names_no_code(here, capsys, old, new):
    from uft.config.compose import change, compose
    from uft.config.frozen import frozen, load_config
    from uft.runs import Run

    run = Run(here / "outputs" / "sent")
    run.path.mkdir(parents=True)
    text, old = frozen(compose()), old.format()
    assert old in text
    run.config_file.write_text(text.replace(old, new.format(call=CALL), 1))
    for read in (lambda: load_config(run.config_file), lambda: change(run.config(), ["train.log_every=3"])):
        with suppress(UftError):
            read()
    assert main(["config", "--diff", str(run.path)]) in (0, 2)
    assert not (here / "this-was-run").exists()
    assert "evil_package" not in sys.modules


def test_commands_of_a_received_sweep_name_no_code(here, capsys):
    for word in (
        f"+hydra.launcher._target_={CALL}",
        "--experimental-rerun=x.pickle",
        "--config-path=pkg://evil_package",
    ):
        commands = [{"words": ["-m", "seed=1,2", word], "cwd": str(here)}]
        (here / "sweep.json").write_text(json.dumps({"commands": commands}))
        assert main(["resume", str(here)]) == 2
    assert not (here / "this-was-run").exists()


@pytest.mark.slow
def test_a_folder_from_elsewhere_runs_its_model_s_code_only_when_that_is_typed(tmp_path, uft, monkeypatch, capsys):
    """Of runs and sweeps with `model.trust_remote_code` on: one's own go on, copies ask for the key once."""
    monkeypatch.setenv("UFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    typed = "model.trust_remote_code=true"
    words = ["debug=fast", "objective=sft", "data=instruct", "tracking=none", "train.steps=1", "eval=none", typed]
    uft("train", "-m", *words, "seed=1", "sweep.name=both", env={"UFT_CACHE": str(tmp_path / "cache")})
    (sweep,) = tmp_path.glob("outputs/*/both")
    (run,) = (file.parent for file in sweep.glob("*/run.json"))
    assert main(["resume", str(run)]) == 0
    for number, folder in enumerate((run, sweep)):
        sent = tmp_path / "sent" / str(number)
        shutil.copytree(folder, sent)
        for verb in ("resume", "generate")[: 2 - number]:
            assert main([verb, str(sent)]) == 2
            refused = capsys.readouterr().err
            assert "runs code that comes with its model" in refused
            assert typed in refused
    assert main(["resume", str(tmp_path / "sent" / "0"), typed]) == main(["resume", str(tmp_path / "sent" / "0")]) == 0
    refuse_untrusted(sweep, True, [])
    refuse_untrusted(tmp_path / "sent" / "1", True, [typed])
    refuse_untrusted(tmp_path / "sent" / "1", True, [])


def test_plugins_that_are_installed_are_chosen_by_name(here, capsys):
    assert main(["train", "hydra/sweeper=basic", "hydra/launcher=basic", "--cfg", "job"]) == 0
    assert main(["train", "hydra.sweep.dir=x", "hydra.verbose=false", "--cfg", "job"]) == 0
    capsys.readouterr()
