"""The exported folder is the policy: experts, tied heads, template, ends and precision; what differs is never kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dying import LORA
from stage_runs import sit

from uft.config.schema import Lora
from uft.data.chat import Tokens
from uft.errors import FAILED, GOOD, UftError
from uft.model import export as exporting
from uft.model import reload
from uft.model.export import export
from uft.model.policy import Policy, add_lora
from uft.runs import Run

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {"n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "first_k_dense_replace": 1}
DEEPSEEK |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, **EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": DEEPSEEK | EXPERTS,
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # its routers are linear layers that return tuples
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},  # PEFT refuses its out_proj
    "jamba": {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
}
ROWS = [
    Tokens(np.arange(3, 15, dtype=np.int32), np.arange(12) >= 5, 5),
    Tokens(np.arange(20, 30, dtype=np.int32), np.arange(10) >= 3, 3),
]


def adapted(kind: str, folder: Path, targets: list[str]) -> Policy:
    """A random model of this kind under an adapter that is far from zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | MODELS[kind])).save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder)
        policy = Policy(add_lora(base, Lora(rank=2, alpha=4, targets=targets), 0, float32=True)).eval()
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.3)
    return policy


@pytest.fixture
def tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


CASES = [(kind, ["all-linear"]) for kind in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "phimoe", "mamba2")]


@pytest.mark.parametrize(("kind", "targets"), [*CASES, ("llama", ["lm_head"]), ("gpt2", ["lm_head", "c_attn"])])
def test_experts_and_tied_heads_are_merged_and_the_adapter_lies_beside(kind, targets, tokenizer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy, looked = adapted(kind, tmp_path / "base", targets), []

    def problem(folder: Path) -> str:
        looked.append(reload.compare(policy, folder, ROWS, 0))
        return looked[0][0]

    folder = export(policy, tokenizer, tmp_path / "model", stop_ids=(7, 2), problem=problem)
    assert looked == [("", "")]
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = policy.base(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-4, rtol=1e-4)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder / "adapter")
        torch.testing.assert_close(again.eval()(ids).logits, expected)
    assert plain.generation_config.eos_token_id == [2, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]


def test_a_folder_that_is_another_model_is_not_kept_but_its_adapter_is(tokenizer, tmp_path):
    """Jamba multiplies by the weight of dt_proj itself: merged, its adapter would act for the first time."""
    policy = adapted("jamba", tmp_path / "base", ["all-linear"])
    with pytest.raises(UftError) as error:
        export(policy, tokenizer, tmp_path / "model", problem=lambda f: reload.compare(policy, f, ROWS, 0)[0])
    (problem,) = error.value.problems
    assert "is not the policy that was trained: log-probs of row 1 of 2 differ" in problem.why
    assert "does not call layers that have an adapter: model.layers.0.mamba.dt_proj" in problem.why
    assert "the adapter alone is in" in problem.advice[0]
    assert error.value.code == FAILED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model-adapter"]
    assert (tmp_path / "model-adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_through_many_layers_is_no_difference_and_another_weight_is(dtype, tokenizer, tmp_path):
    """In bfloat16 the log-probs of this model are up to a third off, far above the rounding of a shallow one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    deep = SMALL | {"num_hidden_layers": 24, "initializer_range": 0.5}
    policy = Policy(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **deep)), "bfloat16").eval()
    policy.cast_once()
    folder, name = export(policy, tokenizer, tmp_path / "model", dtype), str(dtype).removeprefix("torch.")
    assert reload.compare(policy, folder, ROWS, 0, dtype=name) == ("", "")
    assert (policy.dtype, policy.head.dtype) == ("bfloat16", torch.bfloat16)
    with torch.no_grad():  # what only a comparison without rounding sees; and two layers that were exchanged
        weight, other = (policy.base.model.layers[layer].mlp.down_proj.weight for layer in (11, 12))
        changed = other.clone() if dtype == torch.bfloat16 else weight * 1.01
        weight.copy_(changed)
    why, _ = reload.compare(policy, folder, ROWS, 0, dtype=name)
    assert "of 2 differ by up to" in why


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same_or_why_it_cannot(tokenizer, tmp_path, monkeypatch):
    policy = adapted("llama", tmp_path / "base", ["q_proj"])
    monkeypatch.setattr(reload, "OWN_PROCESS", 0)
    folder = export(policy, tokenizer, tmp_path / "model")
    assert reload.compare(policy, folder, ROWS, 0) == ("", "")
    policy.base.generation_config.update(
        repetition_penalty=1.8, no_repeat_ngram_size=1, suppress_tokens=[*range(3, 60)]
    )
    folder = export(policy, tokenizer, tmp_path / "model")
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.8
    assert reload.compare(policy, folder, ROWS, 0) == ("", "")
    policy.base.generation_config.num_return_sequences = 3  # which transformers does not write
    written = json.loads((export(policy, tokenizer, folder) / "generation_config.json").read_text())
    assert (written["eos_token_id"], "num_return_sequences" in written) == (2, False)
    (folder / "config.json").write_text("{}")
    assert "transformers cannot load it: " in reload.compare(policy, folder, ROWS, 0)[0]


CHECKED = ("train.check_model=true", "train.steps=2", "train.log_every=1")


def test_a_run_whose_folder_differs_fails_and_can_be_resumed(configure, tmp_path, monkeypatch):
    run, config = Run(tmp_path / "run"), configure("sft", *CHECKED, *LORA)
    real: Callable[..., Any] = exporting._delta
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_delta", lambda *arguments: 30 * real(*arguments))
        assert sit(run.path, config) == FAILED
    assert "is not the policy that was trained" in run.result()["error"]
    assert not run.model_dir.exists()
    assert (run.path / "model-adapter").is_dir()
    assert sit(run.path, config) == GOOD
    assert (run.model_dir / "adapter").is_dir()
    assert not (run.path / "model-adapter").exists()


def test_the_folder_has_the_template_the_ends_and_the_precision_of_the_run(configure, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}w59 {{ m.content }} </s> {% endfor %}")
    config = configure("sft", *CHECKED, "train.save_dtype=bfloat16", f"data.template={own}")
    assert sit(tmp_path / "run", config) == GOOD
    folder = tmp_path / "run/model"
    assert AutoTokenizer.from_pretrained(folder).chat_template == own.read_text()
    assert GenerationConfig.from_pretrained(folder).eos_token_id in (2, [2])
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert sit(tmp_path / "plain", configure("sft", *CHECKED, "data.template=plain")) == GOOD
    assert AutoTokenizer.from_pretrained(tmp_path / "plain/model").chat_template is None
