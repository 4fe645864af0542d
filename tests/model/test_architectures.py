"""Every causal architecture of transformers, tiny and random: right in every layout and in generation, or one line."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

from uft.config.schema import Model
from uft.data.batch import TokenSequence, sequence_batch
from uft.errors import UftError
from uft.model import layout, load
from uft.model.layout import settle_layout
from uft.sampling.generate import Sampling, complete

VOCABULARY, MOST_WEIGHTS = 61, 30_000_000
SIZES: dict[int | float, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim lru_width",
    48: "intermediate_size ffn_dim n_inner d_ff",
    24: "moe_intermediate_size shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_key_value_heads expand "
    "num_experts_per_tok linear_num_key_heads linear_num_value_heads moe_topk eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "n_routed_experts num_local_experts qk_rope_head_dim qk_nope_head_dim state_size ssm_state_size mamba_d_state "
    "time_step_rank mamba_dt_rank rotary_dim",
    8: "head_dim kv_lora_rank q_lora_rank v_head_dim qk_head_dim mamba_n_heads mamba_d_head mamba_num_heads "
    "mamba_head_dim linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input",
    64: "max_position_embeddings n_positions n_ctx max_seq_len sliding_window mamba_d_ssm",
    1: "n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id",
}
LATENT = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash youtu minicpm3"
HYBRID = "qwen3_next qwen3_5_text qwen3_5_moe_text qwen4_exp_text kimi_linear bailing_hybrid lfm3 zamba zamba2"
SPECIAL: dict[str, dict[str, Any]] = {
    **{kind: {"num_key_value_heads": 4, "head_dim": 4} for kind in LATENT.split()},
    **{kind: {"num_hidden_layers": 4} for kind in HYBRID.split()},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "mamba2": {"num_heads": 8},
    "roberta": {"is_decoder": True, "pad_token_id": 1},
    "electra": {"is_decoder": True},
}


def tiny(kind: str) -> Any:
    """A random model; what cannot be made so small raises."""
    kinds, wanted = CONFIG_MAPPING[kind], {name: size for size, names in SIZES.items() for name in names.split()}
    plain = kinds()
    fixed = {name for name in dir(kinds) if isinstance(getattr(kinds, name, None), property)}
    numbers = {n: size for n, size in wanted.items() if isinstance(getattr(plain, n, None), int) and n not in fixed}
    numbers |= {name: 0.0 for name, value in vars(plain).items() if "drop" in name and isinstance(value, float)}
    config = kinds(**numbers | SPECIAL.get(kind, {}))
    inner = getattr(config, "text_config", None)
    for name, size in wanted.items() if inner is not None else ():
        with contextlib.suppress(Exception):
            if isinstance(getattr(inner, name, None), int):
                setattr(inner, name, size)
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) < MOST_WEIGHTS, "too large"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def rows() -> list[TokenSequence]:
    draw = np.random.default_rng(3)
    shapes = ((9, 4), (20, 6), (13, 12), (30, 9))
    return [(draw.integers(3, VOCABULARY, length), np.arange(length) >= prompt) for length, prompt in shapes]


def alone(model: Any, ids: np.ndarray, supervised: np.ndarray) -> torch.Tensor:
    """Log-probs of a row by plain transformers."""
    logits = model(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0].float().log_softmax(-1)
    places = torch.as_tensor(supervised).nonzero().squeeze(1)
    return logits[places - 1, torch.as_tensor(ids)[places]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"kimi_linear"}))  # its forward pass takes minutes on a CPU
@torch.no_grad()
def test_right_or_refused_in_a_line(kind: str, monkeypatch: pytest.MonkeyPatch):
    try:
        model = tiny(kind)
    except Exception as error:
        pytest.skip(f"no tiny model of this kind: {error}")
    monkeypatch.setattr(layout, "SMALL_MODEL", 0)
    monkeypatch.setattr(load, "load_base", lambda *_: model)
    try:
        policy = load.load_policy(Model(path="tiny"), torch.device("cpu"), 0).eval()
        settle_layout(policy, "padded", 30)
    except UftError as refused:
        (problem,) = refused.problems
        assert "\n" not in problem.why
        return
    expected = torch.cat([alone(model, *row) for row in rows()])
    for packing in ("padded", "auto"):
        settle_layout(policy, packing, 30)
        found = policy(sequence_batch(rows(), 0, policy.layout)).log_probs
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    prompts, settings = [[5, 9, 11], [7, 8, 9, 10, 12, 13], [20]], {"seed": 0, "stop_ids": (1,), "pad_id": 0}
    together = complete(policy, prompts, Sampling(max_new_tokens=5), batch_size=3, **settings)
    for prompt, reply in zip(prompts, together, strict=True):
        line = np.array([*prompt, *reply.ids])
        logits = model(input_ids=torch.as_tensor(line)[None], use_cache=False).logits[0]
        likely = logits.topk(2).values[len(prompt) - 1 : -1].diff().abs().flatten() > 1e-3
        assert torch.equal(logits.argmax(-1)[len(prompt) - 1 : -1][likely], torch.tensor(reply.ids)[likely]), kind
