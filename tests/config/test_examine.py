"""Mistakes in a request: all of them, in one message, with what was meant."""

import importlib.util
import json

import pytest

from uft.config.compose import compose, examine, footer
from uft.config.files import Request, overruled
from uft.config.messages import TRL_KEYS, as_typed, conf_dir
from uft.config.schema import Config, kind_at
from uft.errors import Problem, UftError, render


def problems(*overrides):
    """By what was written: (why, where, advice as one text)."""
    return {p.what: (p.why, p.where, "\n".join(p.advice)) for p in examine(Request(overrides)).problems}


def test_the_message_of_the_product_page():
    with pytest.raises(UftError) as caught:
        compose(["objective=dpo", "objective.bta=0.2", "data=mixx"])
    choices = f"choices: {', '.join(path.stem for path in sorted((conf_dir() / 'data').glob('*.yaml')))}"
    assert render(caught.value) == (
        "uft: 2 problems in this request\n"
        "\n"
        "  data=mixx          no such file in conf/data         (command line)\n"
        f"      did you mean  data=mix ?         {choices}\n"
        "\n"
        "  objective.bta=0.2  no such key in objective=dpo      (command line)\n"
        "      did you mean  objective.beta ?   keys: reduction, beta, label_smoothing, sft_weight\n"
        "\n"
        "Nothing was started.  See what would run:  uft config objective=dpo data=mix\n"
    )
    assert caught.value.code == 2


UNKNOWN = {
    "train.stps": ("no such key in train", "train.steps ?"),
    "model.lora.rnk": ("no such key in model.lora", "model.lora.rank ?"),
    "lr": ("no such key", "optim.lr ?"),
    "max_len": ("no such key", "train.max_length ?"),
    "batch_size": ("no such key", "train.batch_size ?"),
    "objective.lamb": ("no such key in objective=ift", "objective.lam ?"),
    "data.sources.pairs.shar": ("no such key in data.sources.pairs", "data.sources.pairs.share ?"),
    "train.steps.more": ("train.steps is a value and has no keys of its own", ""),
    "nonsense_key": ("no such key", "groups and keys: seed"),
}


def test_unknown_keys_are_refused_with_any_prefix():
    for plus in ("", "+", "++"):
        found = problems(*(f"{plus}{key}=1" for key in UNKNOWN))
        assert set(found) == {f"{plus}{key}=1" for key in UNKNOWN}
        for key, (why, meant) in UNKNOWN.items():
            assert found[f"{plus}{key}=1"][:2] == (why, "command line")
            assert meant in found[f"{plus}{key}=1"][2]
            assert ("groups and keys" in found[f"{plus}{key}=1"][2]) is (key == "nonsense_key")


def test_a_folder_without_its_key_is_meant_as_rows_or_as_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    assert "did you mean  data=rows ?" in problems("rows")["rows"][2]
    assert "did you mean  model.path=llama ?" in problems("llama")["llama"][2]


def test_a_key_of_other_objectives_says_so():
    why, _, advice = problems("objective=sft", "objective.beta=0.1")["objective.beta=0.1"]
    assert why == "no such key in objective=sft"
    assert "beta is a key of:  aot, aot_unpaired, apo_down, apo_zero, asft, bco_pair and 26 more" in advice
    assert "beta is a key of:  aot" in problems("objective=sft", "beta=0.1")["beta=0.1"][2]


def test_a_misspelt_group_names_the_group():
    assert "did you mean  data=pairs ?" in problems("dta=pairs")["dta=pairs"][2]


def test_keys_of_trl_and_transformers_are_told_as_ours():
    typed = {name: [f"{group}{name}=1" for group in ("", "train.")[: 1 if "." in name else 2]] for name in TRL_KEYS}
    found = problems(*dict.fromkeys(word for words in typed.values() for word in words))
    for name, ours in TRL_KEYS.items():
        key, _, note = ours.partition(": ")
        assert kind_at(tuple(key.split(".")), Config) is not None, key
        for _, _, advice in (found[word] for word in typed[name]):
            assert (f"{key}: {note}" if note else f"did you mean  {key} ?") in advice


WRONG_TYPES = {
    "train.steps=1e3": ("must be a whole number or null", "write 1000"),
    "train.log_every=ten": ("must be a whole number", ""),
    "optim.lr=abc": ("must be a number", ""),
    "optim.betas=3": ("must be a list of numbers, like [0.9,0.95]", ""),
    "model.master_weights=maybe": ("must be true or false", ""),
    "train=quick": ("must be a group of keys", "its keys: steps, epochs"),
    "data.sources.pairs.share=much": ("must be a number or null", ""),
}


def test_wrong_types():
    found = problems(*WRONG_TYPES)
    assert set(found) == set(WRONG_TYPES)
    for override, (why, advice) in WRONG_TYPES.items():
        assert found[override][0] == why
        assert advice in found[override][2]


def test_every_mistake_at_once_and_the_right_words_kept():
    wrong = {"objective=dpoo", "train.stps=3", "train.steps=1e3", "optim.warmup=-1", "foo", "seed=1,2"}
    examined = examine(Request((*sorted(wrong), "data=mix", "seed=7")))
    assert {p.what.replace("-1.0", "-1") for p in examined.problems} == wrong
    assert footer(examined).endswith("uft config data=mix objective=dpo seed=7")


def test_an_unknown_objective_does_not_accuse_the_keys_given_for_it():
    assert list(problems("objective=reward_model", "objective.clip=0.2")) == ["objective=reward_model"]


def test_ambiguous_names_are_explained_not_guessed():
    meant = ("objective=rdpo_length", "objective=robust_dpo")
    for name, says in {"rft": ("two methods", "2405.17888", "2505.16984"), "rdpo": meant}.items():
        why, _, advice = problems(f"objective={name}")[f"objective={name}"]
        assert why == "no such file in conf/objective"
        assert all(word in advice for word in (*says, "choices: anchored_sft"))
        assert "did you mean" not in advice


@pytest.mark.parametrize("typed", ["hardware=ray", "hydra/launcher=ray"])
@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None, reason="it is installed")
def test_a_plugin_that_is_not_installed_names_what_installs_it(typed):
    ((_, (why, _, advice)),) = problems(typed).items()
    assert "not installed" in why
    assert "pip install 'uft-lm[ray]'" in advice


def test_several_values_need_multirun():
    why, _, advice = problems("seed=1,2")["seed=1,2"]
    assert why == "several values need -m"
    assert "uft train -m seed=1,2" in advice


def test_words_that_cannot_be_read():
    found = problems("model.path=a=b", "train.steps")
    assert "'model.path=\"a=b\"'" in found["model.path=a=b"][2]
    assert "write  train.steps=VALUE" in found["train.steps"][2]


def test_plus_where_there_is_something_already():
    found = problems("+data=mix", "+train.batch_size=3")
    assert "without the +:  data=mix" in found["+data=mix"][2]
    assert "without the +:  train.batch_size=3" in found["+train.batch_size=3"][2]


def test_named_sources_are_added_with_plus_and_checked():
    cfg = compose(["data=files", "+data.sources.mine.path=x.jsonl", "+data.sources.mine.columns.prompt=question"])
    mine = cfg["data"]["sources"]["mine"]
    assert (mine["path"], mine["columns"], mine["split"]) == ("x.jsonl", {"prompt": "question"}, "train")
    cfg = compose(["data=files", "+data.sources.mine={path: x.jsonl, kind: binary}"])
    assert cfg["data"]["sources"]["mine"]["kind"] == "binary"
    found = problems("data=files", "data.sources.mine.path=x.jsonl", "+data.sources.other.pth=x")
    assert found["data.sources.mine.path=x.jsonl"][2] == "to add it:  +data.sources.mine.path=x.jsonl"
    assert found["+data.sources.other.pth=x"][0] == "no such key in data.sources.other"
    assert "data.sources.other.path" in found


def test_sources_can_be_removed_and_nothing_else():
    assert "pairs" not in compose(["~data.sources.pairs"])["data"]["sources"]
    assert problems("~train.steps")["~train.steps"][0] == "only named sources, stages and free keys can be removed"


def test_references_to_nowhere():
    assert problems("data.ratio=${nowhere}")["data.ratio"][0] == "refers to something that has no value: ${nowhere}"


def test_what_must_be_given_is_asked_for():
    why, _, advice = problems("model=custom")["model.path"]
    assert (why, advice) == ("has no value", "give it:  model.path=...")
    why, _, advice = problems("experiment=paper_uft_rl")["data.sources.countdown.path"]
    assert (why, advice) == ("has no value", "give it:  data.sources.countdown.path=...")


FILES = {
    "experiment/mine.yaml": "# @package _global_\n# mine\ntrain:\n  stepps: 3\n  batch_size: many\n"
    "optim:\n  betas: [0.9, 1.5]\n",
    "experiment/lost.yaml": "# @package _global_\ndefaults:\n  - override /objective: dpoo\n",
    "data/bad.yaml": "name: x\nsources: [\n",
}


def test_mistakes_in_files_name_file_and_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        file = tmp_path / "conf-user" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    where = "conf-user/experiment/mine.yaml"
    assert {what: p[:2] for what, p in problems("experiment=mine").items()} == {
        "train.stepps": ("no such key in train", f"{where}:4"),
        "train.batch_size=many": ("must be a whole number", f"{where}:5"),
        "optim.betas=[0.9,1.5]": ("must be two numbers, at least 0 and below 1", f"{where}:7"),
    }
    ((what, (why, _, _)),) = problems("data=bad").items()
    assert what.startswith("conf-user/data/bad.yaml:")
    assert "YAML" in why
    ((what, (_, _, advice)),) = problems("experiment=lost").items()
    assert what == "objective/dpoo"
    assert "did you mean  objective=dpo ?" in advice


def test_origins():
    examined = examine(Request(("objective=dpo", "optim.lr=1e-4")))
    assert examined.origins["optim.lr"] == "command line"
    assert examined.origins["objective.beta"].startswith("conf/objective/dpo.yaml:")
    assert examined.origins["train.steps"].startswith("conf/config.yaml:")
    assert "train.save_model" not in examined.origins


def weighing(folder, *shape):
    """A folder with the header of a tensor of this shape, as safetensors has it."""
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return str(folder)


@pytest.mark.slow
def test_a_model_given_by_its_path_alone_has_its_own_name_and_learning_rate(tmp_path):
    small, large = weighing(tmp_path / "tiny" / "model", 600, 500), weighing(tmp_path / "big", 40_000, 10_000)
    lora = "model.adapter=lora"
    for words, name, rate in (
        ([f"model.path={small}"], "tiny", 1e-3),
        ([f"model.path={large}"], "big", 1e-5),
        ([f"model.path={large}", lora], "big", 1e-4),
        (["model.path=org/SmolLM2-135M"], "SmolLM2-135M", 2e-5),
        (["model.path=org/SmolLM2-135M", lora], "SmolLM2-135M", 2e-4),
        (["model.path=org/Qwen2.5-7B-Instruct"], "Qwen2.5-7B-Instruct", 1e-5),
        (["model.path=org/name", "model.name=mine"], "mine", 1e-5),
        (["model.path=org/name", "model.lr=3e-4"], "name", 3e-4),
        (["model.path=org/name", "optim.lr=3e-4"], "name", 3e-4),
        (["model=custom", "model.path=org/name"], "name", 1e-5),
        (["model=playground", "model.path=org/name"], "playground", 1e-3),  # as it was asked for
        (["experiment=sft_then_dpo", "model.path=org/name"], "name", 1e-5),
    ):
        examined = examine(Request(tuple(words)))
        assert not examined.problems, words
        settings = examined.settings
        assert (settings["model"]["name"], settings["optim"]["lr"]) == (name, rate), words
    assert examine(Request((f"model.path={large}",))).origins["model.lr"] == "by size and adapter"


def test_the_rate_of_an_experiment_is_for_its_own_model_and_adapter():
    for words, rate in (
        (["experiment=poft"], 3e-4),
        (["experiment=poft", "model=playground"], 3e-4),
        (["experiment=poft", "model=smollm2_135m"], 2e-5),
        (["experiment=poft", "model.path=org/name"], 1e-5),
        (["experiment=poft", "model.path=org/name", "model.adapter=lora"], 1e-4),
        (["experiment=poft", "model.path=org/name", "optim.lr=5e-4"], 5e-4),
        (["experiment=poft", "model.adapter=lora"], 1e-3),
    ):
        assert examine(Request(tuple(words))).settings["optim"]["lr"] == rate, words
    examined = examine(Request(("experiment=poft", "model.path=org/name")))
    assert examined.origins["optim.lr"].startswith("model.lr: the one in conf/experiment/poft.yaml:")
    stages = examine(Request(("experiment=sft_then_dpo", "model.path=org/name"))).settings["stages"]
    assert {stage["config"].get("optim", {}).get("lr", 1e-5) for stage in stages.values()} == {1e-5}


def test_the_rate_of_ones_own_experiment_is_for_whatever_model_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf-user" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\noptim:\n  lr: 3.0e-6\n")
    settings = examine(Request(("experiment=mine", "model.path=org/name"))).settings
    assert settings["optim"]["lr"] == 3e-6


@pytest.mark.parametrize(
    ("line", "what"), [("optim: {0.5: 1}", "optim.0.5"), ("7: 1", "7"), ("train: {on: 1}", "train.")]
)
def test_a_key_that_is_not_text_is_a_key_like_others(tmp_path, monkeypatch, line, what):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf-user" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# @package _global_\n{line}\n")
    (problem,) = examine(Request(("experiment=mine",))).problems
    assert (problem.what.startswith(what), problem.why[:11]) == (True, "no such key")


def test_a_rate_for_all_weights_is_not_kept_for_an_adapter():
    for model, adapter, rate in (
        ("smollm2_135m", "none", 2e-5),
        ("smollm2_135m", "lora", 2e-4),
        ("mistral_7b", "lora", 3e-5),
        ("mistral_7b", "none", 3e-6),
        ("playground", "lora", 1e-3),
    ):
        assert compose([f"model={model}", f"model.adapter={adapter}"])["optim"]["lr"] == rate
    assert compose(["model=smollm2_135m", "model.adapter=lora", "optim.lr=1e-6"])["optim"]["lr"] == 1e-6


TYPED = {
    "data=files +data.sources.rows.path=rows.jsonl objective=dpo": "data=rows.jsonl objective=dpo",
    "data=files +data.sources.a.path=x/a.csv +data.sources.b.path=b.jsonl.gz": "data=x/a.csv data=b.jsonl.gz",
    "data=files +data.sources.mine.path=rows.jsonl": "data=files +data.sources.mine.path=rows.jsonl",
    "data=files +data.sources.rows.path=rows.jsonl +data.sources.b.path=a.jsonl": (
        "data=rows.jsonl +data.sources.b.path=a.jsonl"
    ),
    "data=files +data.sources.mix.path=mix": "data=files +data.sources.mix.path=mix",  # data=mix is the playground's
    "data=mix +data.sources.rows.path=rows.jsonl": "data=mix +data.sources.rows.path=rows.jsonl",
    "++data.sources.a.columns.prompt=q model=custom model.path=m": "data.sources.a.columns.prompt=q model.path=m",
    "data=files +data.sources.rows.path=a.jsonl,b.jsonl": "data=files +data.sources.rows.path=a.jsonl,b.jsonl",
}


@pytest.mark.parametrize("long", TYPED)
def test_advised_commands_are_as_short_as_they_were_typed(long):
    assert as_typed(long.split()) == TYPED[long].split()


def test_the_same_fault_of_many_rows_is_told_once_with_their_places():
    same = [Problem(f"rows.jsonl:{line}", "label is 'up'", "", ("map it",)) for line in range(1, 8)]
    said = str(UftError(*same, Problem("rows.jsonl:9", "prompt is missing")))
    assert said.count("label is 'up'") == said.count("map it") == 1
    assert "8 problems" in said
    assert "and the same of 6 more: rows.jsonl:2, rows.jsonl:3, rows.jsonl:4, rows.jsonl:5 ..." in said
    assert "rows.jsonl:9  prompt is missing" in said


def test_what_is_switched_off_stays_so_in_a_short_run():
    evals = [compose(["objective=sft", *words, "debug=fast"])["eval"] for words in ((), ["eval=quick"], ["eval=none"])]
    assert [[one[key] for key in ("rows", "generate_rows", "samples")] for one in evals] == [
        [4, 4, 1],
        [4, 4, 1],
        [0, 0, 0],
    ]
    assert compose(["objective=sft", "eval=none", "debug=fast", "eval.rows=3"])["eval"]["rows"] == 3


def test_words_that_a_later_word_overrules_are_found():
    words = ["train.steps=3", "+data.sources.a.path=x", "seed=1", "seed=1", "train.steps=4", "data.sources.a.path=y"]
    later = {"train.steps=3": "train.steps=4", "+data.sources.a.path=x": "data.sources.a.path=y"}
    assert overruled([*words, "hydra.verbose=true", "hydra.verbose=false", "++run.dir=a", "run.dir=b"]) == later
