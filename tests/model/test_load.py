from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from uft.config.schema import Lora, Model
from uft.errors import UftError
from uft.model.load import check_vocabulary, load_model, load_policy, load_tokenizer, pad_id

CPU = torch.device("cpu")


def settings(folder: Path | str, **changes: Any) -> Model:
    return Model(name="tiny", path=str(folder), **changes)


def failure(model: Model) -> UftError:
    try:
        load_tokenizer(model)
        load_model(model, CPU, 0)
    except UftError as error:
        return error
    pytest.fail("it was loaded")


def message(model: Model) -> str:
    return str(failure(model))


def test_weights_are_stored_as_their_use_wants(model_folder: Path):
    """Trained ones in float32 unless `master_weights` is off, frozen ones under an adapter in the forward's dtype."""

    def dtypes(trained: bool = True, **changes: Any) -> set[torch.dtype]:
        parameters = load_model(settings(model_folder, **changes), CPU, 0).parameters()
        return {p.dtype for p in parameters if p.requires_grad == trained}

    assert dtypes(dtype="float32") == dtypes(dtype="bfloat16") == {torch.float32}
    assert dtypes(False) == set()
    assert dtypes(dtype="bfloat16", master_weights=False) == {torch.bfloat16}
    assert dtypes(adapter="lora", dtype="bfloat16") == {torch.float32}
    assert dtypes(False, adapter="lora", dtype="bfloat16") == {torch.bfloat16}


def test_the_adapter_depends_on_its_seed_alone_and_leaves_other_generators_be(model_folder: Path):
    model = settings(model_folder, adapter="lora")

    def adapter(seed: int) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in load_policy(model, CPU, seed).trainable().items()}

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = adapter(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = adapter(1), adapter(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(not value.any() for name, value in first.items() if "lora_B" in name)


def test_all_linear_layers_but_the_head_or_those_named_are_adapted(model_folder: Path):
    def adapted(**changes: Any) -> set[str]:
        names = load_policy(settings(model_folder, adapter="lora", **changes), CPU, 0).trainable()
        return {name.split(".lora_")[0].split(".")[-1] for name in names}

    assert adapted() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted(lora=Lora(targets=["q_proj", "self_attn.v_proj"])) == {"q_proj", "v_proj"}


def test_unknown_targets_are_all_named_with_the_layers_there_are(model_folder: Path):
    text = message(settings(model_folder, adapter="lora", lora=Lora(targets=["q_porj", "c_attn", "v_proj"])))
    assert "2 problems" in text
    assert "did you mean  q_proj ?" in text
    assert "linear layers: q_proj, k_proj, v_proj" in text
    assert "targets=[]" in message(settings(model_folder, adapter="lora", lora=Lora(targets=[])))


def test_a_loaded_policy_runs_as_it_was_asked_to(model_folder: Path):
    policy = load_policy(settings(model_folder), CPU, 0)
    assert policy.module.training
    assert policy.head is not None
    assert policy.notes == []
    assert policy.attention == "sdpa"
    assert not policy.recomputes
    for adapter in ("none", "lora"):
        changes = {"adapter": adapter, "gradient_checkpointing": True, "attention": "eager"}
        policy = load_policy(settings(model_folder, **changes), CPU, 0)
        assert policy.recomputes
        assert policy.attention == "eager"


def test_weights_that_are_missing_are_never_made_up(model_folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = message(settings(folder))
    assert "1 of its weights" in text
    assert "model.layers.1.mlp.up_proj.weight" in text


def test_every_failure_to_load_is_one_line_that_names_the_file(model_folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    weights, config = load_file(model_folder / "model.safetensors"), (model_folder / "config.json").read_text()
    whole, pointer = (
        (model_folder / "model.safetensors").read_bytes(),
        b"version https://git-lfs.github.com/spec/v1\noid",
    )
    index = {"weight_map": dict.fromkeys(weights, "model-00002-of-00002.safetensors")}
    newer = json.loads((model_folder / "tokenizer.json").read_text()) | {"model": {"type": "FutureModel"}}
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file(weights | {scale: torch.ones(1)}, tmp_path / "fp8", metadata={"format": "pt"})
    broken = weights | {"model.norm.weight": weights["model.norm.weight"] * float("nan")}
    save_file(broken, tmp_path / "nan", metadata={"format": "pt"})
    save_file({name: one.to(torch.int8) for name, one in weights.items()}, tmp_path / "int8", metadata={"format": "pt"})
    narrow = json.loads(config) | {"num_attention_heads": 3}
    rows, width = weights["model.embed_tokens.weight"].shape
    larger = json.loads(config) | {"vocab_size": rows + 7}
    cases: dict[str, dict[str, Any]] = {
        "model.safetensors is a pointer of Git LFS": {"model.safetensors": pointer},
        "model.safetensors is damaged or cut off": {"model.safetensors": whole[:-100]},
        "config.json is damaged or cut off": {"config.json": config[:-20]},
        "model-00002-of-00002.safetensors is not there": {
            "model.safetensors": None,
            "model.safetensors.index.json": json.dumps(index),
        },
        "tokenizer.json is of a newer version": {"tokenizer.json": json.dumps(newer)},
        "adapter_config.json lies beside the model": {"adapter_config.json": "{}"},
        "its files are quantised": {"model.safetensors": (tmp_path / "fp8").read_bytes()},
        "the model cannot be loaded: ": {"model.safetensors": None},
        "name two sets of weights": {"model.safetensors.index.json": json.dumps(index)},
        "model.safetensors.index.json is not there": {
            "model.safetensors": None,
            "model-00001-of-00002.safetensors": whole,
        },
        "hold NaN or infinity": {"model.safetensors": (tmp_path / "nan").read_bytes()},
        "is I8": {"model.safetensors": (tmp_path / "int8").read_bytes()},
        f"[{rows}, {width}] in its files, [{rows + 7}, {width}] by config.json": {"config.json": json.dumps(larger)},
        "cannot be loaded": {"config.json": json.dumps(narrow)},
        "no_such_type": {"config.json": json.dumps({"model_type": "no_such_type"})},
    }
    for number, (words, files) in enumerate(cases.items()):
        folder = shutil.copytree(model_folder, tmp_path / str(number))
        for name, content in files.items():
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        (problem,) = failure(settings(folder)).problems
        assert problem.what == f"model.path={folder}"
        assert words in " ".join([problem.why, *problem.advice]), (words, problem)
        assert "\n" not in problem.why


def test_a_template_or_generation_config_that_is_not_read_is_told(model_folder: Path, tmp_path: Path, caplog: Any):
    own = '{"chat_template": "{{ messages }}"}'
    cases = {
        "chat_template.jinja is read": {"chat_template.jinja": "{{ messages[0] }}", "tokenizer_config.json": own},
        "chat_template.json has another chat template": {"chat_template.json": own},
        "chat_template.jinja is empty": {"chat_template.jinja": " "},
        "generation_config.json is not used": {"generation_config.json": "{"},
    }
    for number, (words, files) in enumerate(cases.items()):
        folder = shutil.copytree(model_folder, tmp_path / str(number))
        for name, text in files.items():
            old = json.loads((folder / name).read_text()) if name == "tokenizer_config.json" else None
            (folder / name).write_text(text if old is None else json.dumps(old | json.loads(text)))
        caplog.clear()
        load_tokenizer(settings(folder))
        told = [caplog.text, *load_policy(settings(folder), CPU, 0).notes]
        assert sum(words in text for text in told) == 1, told


def test_weights_that_the_model_does_not_use_are_told(model_folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_folder, tmp_path / "model")
    more = {f"vision.{n}.weight": torch.ones(2) for n in range(5)} | {"model.rotary_emb.inv_freq": torch.ones(2)}
    more |= {"vision.logit_scale": torch.ones(1)}
    own = load_file(folder / "model.safetensors")
    own["model.embed_tokens.weight"][5:7] = float("nan")  # which no run without these words meets
    save_file(own | more, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_policy(settings(folder), CPU, 0).describe()
    unused = "not used, and not exported: vision.0.weight, vision.1.weight, vision.2.weight, ..."
    assert f"6 weights of its files are {unused}" in found
    assert "the embeddings of 2 of its tokens hold NaN or infinity" in found


def test_a_head_of_its_own_stays_one_where_the_configuration_ties_it(build: Any, tokenizer: Any, tmp_path: Path):
    from uft.model.export import plain_model

    folder = tmp_path / "model"
    build("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    policy = load_policy(Model(path=str(folder)), CPU, 0)
    assert any("its files have two" in note for note in policy.notes)
    plain = plain_model(policy, torch.float32, dict(policy.base.state_dict()))
    assert torch.equal(plain.lm_head.weight, policy.base.lm_head.weight)
    assert not plain.config.tie_word_embeddings


def test_code_of_a_model_runs_only_when_allowed(model_folder: Path, tmp_path: Path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    (folder / "own.py").write_text("raise RuntimeError('this code ran')\n")
    assert "model.trust_remote_code=true" in message(settings(folder))
    with pytest.raises(RuntimeError, match="this code ran"):
        load_model(settings(folder, trust_remote_code=True), CPU, 0)


def test_tokenizer_pads_on_the_right_and_needs_no_pad_token(model_folder: Path):
    tokenizer = load_tokenizer(settings(model_folder))
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token_id is None
    assert pad_id(tokenizer) == tokenizer.eos_token_id == 2
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0
    tokenizer.pad_token = "w5"
    assert pad_id(tokenizer) == 5


def test_a_tokenizer_larger_than_the_embedding_is_refused(model_folder: Path, tokenizer: Any, build: Any):
    check_vocabulary(build("llama"), tokenizer)
    with pytest.raises(UftError, match="up to 60"):
        check_vocabulary(build("llama", vocab_size=50), tokenizer)


def test_shipped_models_fit_the_schema():
    for file in Path("conf/model").glob("*.yaml"):
        model = Model(**yaml.safe_load(file.read_text()))
        assert model.name == file.stem
        assert model.lr > 0


LOADS = """
import sys
import torch
from transformers import utils
from uft.config.schema import Model
from uft.model.load import load_policy

there = utils.is_scipy_available()
load_policy(Model(name="playground", path="builtin:playground"), torch.device("cpu"), 0)
print(there, "scipy" in sys.modules, utils.is_scipy_available())
"""


@pytest.mark.slow
def test_a_model_is_loaded_without_scipy_which_stays_there_for_others():
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]
