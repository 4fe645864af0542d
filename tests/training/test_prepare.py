"""What is said before the first step, and what the order of preparing may not show."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from dying import StopAt
from transformers import LlamaConfig, LlamaForCausalLM
from watched import trained

from uft.config.schema import Hardware
from uft.errors import FAILED, UftError
from uft.model.export import plain_model
from uft.model.policy import Policy
from uft.runs import create_run
from uft.training.card import stage_card
from uft.training.setup import (
    ONE_ROW,
    Stopped,
    Work,
    check_start,
    choose_device,
    prepare,
    resume,
    saved_progress,
)
from uft.training.trainer import CPU_PASS, PASS, Progress, tokens_per_pass


@pytest.mark.parametrize("mode", ["copy", "cached"])
def test_the_generator_starts_the_same_whatever_was_done_before(build, mode):
    draws = []
    for number in range(2):  # the second time everything is found in caches
        torch.rand(number)
        build("dpo", f"reference.mode={mode}", run=f"run-{number}")
        draws.append(torch.rand(3).tolist())
    build("dpo", "reference.mode=adapter_off", "model.adapter=lora", run="lora")
    draws.append(torch.rand(3).tolist())
    assert draws == [draws[0]] * 3
    build("dpo", "seeds.sampling=1", run="other")
    assert torch.rand(3).tolist() != draws[0]


def test_a_stop_is_seen_between_the_stages(configure, tmp_path):
    config = configure("dpo", "reference.mode=cached", f"data.cache={tmp_path / 'cache'}")
    run = create_run(tmp_path / "run", "{}\n", [])
    looks = 0
    while True:
        stop = StopAt(looks)
        try:
            prepare(run, Work(config, stop=stop))
        except Stopped:
            looks += 1
            continue
        break
    assert looks > 3  # after the data, the model, within the reference, before the end
    assert saved_progress(run) == Progress()


# --- step 0


def test_a_step_of_one_row_has_no_baseline_and_that_is_said(build):
    said = {size: build("kto", f"train.batch_size={size}", run=f"run-{size}").cautions for size in (1, 4)}
    assert (ONE_ROW in said[1], ONE_ROW in said[4]) == (True, False)


@pytest.mark.parametrize(
    ("objective", "mode"), [("uft", "cached"), ("una", "copy"), ("dft", "cached"), ("dpo", "copy")]
)
def test_policy_and_reference_are_equal_before_the_first_step(build, objective, mode):
    prepared = build(objective, f"reference.mode={mode}")
    before = torch.get_rng_state()
    state = {name: tensor.clone() for name, tensor in prepared.trainer.objective.state.items()}
    check_start(prepared.trainer, prepared.reference)
    assert torch.equal(torch.get_rng_state(), before)
    assert prepared.trainer.policy.module.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in prepared.trainer.objective.state.items())


def test_a_policy_that_is_not_the_reference_is_noticed(build):
    prepared = build("dpo", "reference.mode=copy")
    with torch.no_grad():
        next(iter(prepared.trainer.parameters.values())).add_(0.1)
    with pytest.raises(UftError) as error:
        check_start(prepared.trainer, prepared.reference)
    assert error.value.code == FAILED
    assert error.value.problems[0].what == "step 0"


def test_another_model_as_reference_may_differ(build, model_folder):
    prepared = build("dpo", f"reference.path={model_folder}", "reference.mode=copy")
    with torch.no_grad():
        next(iter(prepared.trainer.parameters.values())).add_(0.1)
    check_start(prepared.trainer, prepared.reference)


def test_a_teacher_is_learnt_from_and_the_evaluation_compares_with_the_initial_policy(build, model_folder):
    prepared = build("distill", f"teacher.path={model_folder}", "data.holdout=2")
    assert prepared.reference.mode == "copy"
    assert prepared.eval_reference.mode == "cached"
    assert prepared.memory["reference"] == prepared.memory["weights"]
    card = dict(stage_card(prepared))
    assert str(model_folder) in card["teacher"]
    assert "reference" not in card
    with torch.no_grad():
        next(iter(prepared.trainer.parameters.values())).add_(0.1)
    assert check_start(prepared.trainer, prepared.reference) == {}, "it may differ"
    idle = build("sft", f"teacher.path={model_folder}", run="idle")
    assert any("has no part in objective=sft" in caution for caution in idle.cautions)


def test_a_reference_moves_every_so_many_steps_and_the_evaluation_s_stays(build):
    """reference <- mix policy + (1 - mix) reference, after every second step; none of an objective without one."""
    prepared = build("dpo", "reference.sync_every=2", "reference.sync_mix=0.25", "data.holdout=2", "train.steps=5")
    trainer = prepared.trainer
    assert prepared.eval_reference.mode == "cached"
    expected = {name: weight.clone() for name, weight in trainer.synced_reference.items()}
    assert expected.keys() == trainer.parameters.keys()

    class Follow:
        def __call__(self, trainer, step):
            if trainer.progress.step % 2 == 0:
                for name, weight in trainer.parameters.items():
                    expected[name] = 0.25 * weight.detach() + 0.75 * expected[name]
            for name, weight in trainer.synced_reference.items():
                torch.testing.assert_close(weight.detach(), expected[name])

    before = {name: weight.clone() for name, weight in expected.items()}
    trainer.hooks = (Follow(),)
    trainer.fit()
    assert any(not torch.equal(before[name], weight) for name, weight in trainer.synced_reference.items())
    idle = build("sft", "reference.sync_every=2", run="idle")
    assert any("reference.sync_every has no part" in caution for caution in idle.cautions)


def test_a_key_that_does_nothing_beside_another_is_told(build):
    words = ("model.lora.rank=8", "optim.decay=0.5", "optim.alpha=0.9", "rollout.engine=transformers")
    assert build("sft", *words).cautions == [
        "model.lora.rank=8 does nothing: model.adapter=none",
        "optim.decay=0.5 does nothing: optim.schedule=cosine",
        "rollout.engine=transformers does nothing: rollout.completions=0",
        "optim.alpha=0.9 does nothing: optim.name=adamw",
    ]
    heeded = ("model.adapter=lora", "model.lora.rank=8", "optim.schedule=wsd", "optim.decay=0.5")
    assert build("sft", *heeded, run="heeded").cautions == []


def test_rows_longer_than_the_models_positions_are_refused(build, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "w3", "completion": "' + "w4 " * 80 + '"}\n')
    with pytest.raises(UftError, match="64 positions") as error:
        build("sft", sources={"mine": long})
    assert error.value.problems[0].what == "data.sources.mine"


def test_replies_under_other_prompts_longer_than_the_models_positions_are_refused(build, tmp_path):
    rows = tmp_path / "rows.jsonl"
    sides = [("w3 " * 40, "w4 w5"), ("w6 w7", "w8 " * 40)]
    rows.write_text("".join(f'{{"prompt": "{p}", "completion": "{c}", "label": true}}\n' for p, c in sides))
    with pytest.raises(UftError, match="under other rows' prompts have up to 82 tokens, the model has 64") as error:
        build("kto", sources={"mine": rows})
    assert "train.max_length=64" in error.value.problems[0].advice[0]
    assert build("kto", "train.max_length=64", sources={"mine": rows}, run="cut").trainer.steps == 4


def test_a_reference_that_cannot_stand_beside_the_policy_is_refused(build, model_folder, tmp_path):
    """Fewer positions than a row has tokens, or a padded vocabulary where whole distributions are compared."""

    def other(**changes):
        folder = tmp_path / "-".join(changes)
        shutil.copytree(model_folder, folder)
        config = LlamaConfig.from_pretrained(model_folder)
        LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict() | changes)).save_pretrained(folder)
        return folder

    short, padded = other(max_position_embeddings=8), other(vocab_size=64)
    for mode in ("copy", "cached"):
        with pytest.raises(UftError, match="has 8 positions, and sequences of this run have up to"):
            build("dpo", f"reference.path={short}", f"reference.mode={mode}", run=mode)
    with pytest.raises(UftError, match="has a vocabulary of 64 tokens, the policy of 61"):
        build("anchored_sft", f"reference.path={padded}", run="whole")
    build("dpo", f"reference.path={padded}", run="targets")


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        assert choose_device(Hardware(device="cuda")).type == "cuda"
    else:
        with pytest.raises(UftError, match="there is: cpu"):
            choose_device(Hardware(device="cuda"))
    assert choose_device(Hardware(device="cpu")).type == "cpu"


@pytest.mark.parametrize(
    ("device", "there", "asked", "expected"),
    [("cpu", True, None, CPU_PASS), ("auto", True, None, PASS), ("auto", False, None, CPU_PASS), ("auto", True, 5, 5)],
)
def test_passes_suit_the_device_unless_asked_otherwise(configure, monkeypatch, device, there, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    words = (f"hardware.device={device}", f"train.micro_batch_tokens={'null' if asked is None else asked}")
    assert tokens_per_pass(configure("sft", *words)) == expected


# --- standing and resuming


def test_a_run_without_checkpoints_begins_at_the_beginning(build):
    assert resume(build("sft").trainer) == -1


def test_a_run_stands_where_its_newest_checkpoint_does(build):
    trainer = build("sft", "train.keep_last=1").trainer
    for step in (2, 3):
        trainer.progress.step = step
        trainer.save_checkpoint()
    assert saved_progress(trainer.run) == trainer.progress
    again = build("sft").trainer
    assert resume(again) == 3
    assert again.progress == trainer.progress


def test_without_held_out_rows_and_reference_there_is_nothing_to_compare_with(build):
    assert build("sft").eval_reference is None
    assert build("sft", "data.holdout=0.2", run="held").eval_reference is not None
    assert build("dpo", run="pair").eval_reference is not None


# --- dropout of the model's own configuration; weights that do not move


@pytest.fixture
def dropping(model_folder, tmp_path):
    """dropping("gpt2"): a folder of a tiny model whose own dropout is 0.1."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
        "opt": {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"word_embed_proj_dim": 16, "max_position_embeddings": 64},
    }

    def make(kind: str) -> Path:
        folder = tmp_path / kind
        config = AutoConfig.for_model(
            kind, vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes[kind]
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(("kind", "key"), [("gpt2", "attn_pdrop"), ("opt", "dropout")])
def test_a_models_own_dropout_is_off_unless_asked_for_and_never_beside_a_reference(kind, key, build, dropping):
    path = f"model.path={dropping(kind)}"
    prepared = build("dpo", path, "train.packing=padded", "train.steps=1")
    check_start(prepared.trainer, prepared.reference)  # as in training
    assert trained(prepared).values == pytest.approx([math.log(2)], abs=1e-5)
    card = str(stage_card(prepared))
    assert "is off (on, where nothing is compared: model.dropout=true): " in card
    assert f"{key} 0.1" in card
    with pytest.raises(UftError, match="objective=dpo compares the policy with its reference"):
        build("dpo", path, "model.dropout=true", run="refused")
    policies = {}
    for asked in ("true", "false"):
        prepared = build("sft", path, f"model.dropout={asked}", run=asked)
        trainer = prepared.trainer
        batch = trainer.collator(trainer.sampler.take(2)).micro_batches[0]
        trainer.policy.train()
        with torch.no_grad():
            policies[asked] = [trainer.policy(batch).log_probs for _ in range(2)]
        saved = plain_model(trainer.policy, torch.float32, trainer.policy.base.state_dict()).config
        assert getattr(saved, key) == 0.1
        assert not hasattr(saved, "own_dropout")
    assert "acts in training" in str(stage_card(build("sft", path, "model.dropout=true", run="told")))
    assert torch.equal(*policies["false"])
    assert not torch.equal(*policies["true"])


def test_positions_that_transformers_numbers_otherwise_when_it_generates_are_told(build, model_folder, tmp_path):
    from transformers import AutoTokenizer, RobertaConfig, RobertaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"max_position_embeddings": 70, "initializer_range": 0.3}
    RobertaForCausalLM(RobertaConfig(vocab_size=61, pad_token_id=1, is_decoder=True, **sizes)).save_pretrained(
        tmp_path / "roberta"
    )
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "roberta")
    path = f"model.path={tmp_path / 'roberta'}"
    with pytest.raises(UftError, match=r"(?s)positions from 2 in a forward pass, but from 0.*train\.save_model=false"):
        build("sft", path, "train.check_model=true", run="refused")
    kept = ("train.check_model=true", "train.save_model=false")
    assert build("sft", path, *kept, run="kept").trainer.policy.first_position == 2


def test_embeddings_that_a_model_takes_none_of_are_told_before_the_start(build, monkeypatch):
    monkeypatch.setattr(Policy, "check_rows", lambda self, what: setattr(self, "takes_embeddings", False))
    with pytest.raises(UftError, match=r"objective=ift +LlamaForCausalLM takes no embeddings in place of tokens"):
        build("ift", run="refused")
    for settings in (("sft",), ("ift", "objective.lam=0", "objective.embed_grad=true")):
        assert build(*settings, run="-".join(settings)).trainer


def test_weights_that_a_step_is_too_small_for_are_told(build):
    narrow = ("model.dtype=bfloat16", "model.master_weights=false")
    told = build("sft", *narrow, "optim.lr=1e-5").cautions
    assert any("of the trained weights are too large for steps of 1e-05" in caution for caution in told)
    assert build("sft", *narrow, "optim.lr=0.1", run="large").cautions == []
    assert build("sft", "model.dtype=bfloat16", "optim.lr=1e-5", run="wide").cautions == []
