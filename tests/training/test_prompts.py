"""Prompts without any reply: read in every shape, trained under objectives that sample their own completions, refused
under the others with what to type, measured by their checker, and answered by `uft generate`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from dying import StopAt, lines
from small_rows import Rows, write_rows
from stage_runs import sit

from uft import rewards
from uft.data.records import write_rows as write
from uft.data.rows import Kind, Message, Role
from uft.data.sources import load_sources
from uft.errors import GOOD, UftError
from uft.runs import Run
from uft.training.dataset import StageData, read_train_data

OWN = ("rollout.completions=3", "rollout.max_new_tokens=5")


class Wanted(rewards.Checker):
    """The share of a reply's words that the row asks for in a column of its own."""

    figures = ("exact_match",)
    columns = ("wanted",)

    def judge(self, row, reply):
        words = reply.split()
        wanted = row.facts.get("wanted")
        if wanted is None:
            raise rewards.Unjudged("the row has no column wanted")
        return {"exact_match": sum(word in wanted for word in words) / max(1, len(words))}


@pytest.fixture(autouse=True)
def checker(monkeypatch):
    monkeypatch.setitem(rewards.checkers(), "exact", Wanted)
    rewards._made.cache_clear()
    yield
    rewards._made.cache_clear()


def records(count=12):
    rows = Rows(7)
    return [{"prompt": rows.text(), "wanted": ["w5", "w6"], "origin": "there"} for _ in range(count)]


@pytest.fixture
def prompts(configure, files, tmp_path):
    """prompts("grpo", ...): a configuration over prompts alone, and sources beside them that are not sampled."""
    path = write_rows(tmp_path / "asked.jsonl", records())

    def make(objective, *settings, more=(), **of_source):
        sources = {"asked": path, **{kind: files[kind] for kind in more}}
        config = configure(objective, *settings, sources=sources)
        asked = replace(config.data.sources["asked"], **{"checker": "exact", **of_source})
        others = {kind: replace(config.data.sources[kind], rollout=False) for kind in more}
        return replace(config, data=replace(config.data, sources={"asked": asked, **others}))

    return make


def loaded(prompts, content, **of_source):
    config = prompts("sft", **of_source)
    config.data.sources["asked"].path = str(content)
    return load_sources(config.data)[0]


def test_prompts_are_read_in_every_shape_and_come_back_from_a_file(prompts, tmp_path):
    user = Message("user", "w3 w4")
    turn = {"role": "user", "content": "w3 w4"}
    shapes = {
        "text": ({"prompt": "w3 w4"}, (user,)),
        "turns": ({"prompt": [turn]}, (user,)),
        "messages": ({"messages": [turn]}, (user,)),
        "sharegpt": ({"conversations": [{"from": "human", "value": "w3 w4"}]}, (user,)),
        "question": ({"question": "w3 w4", "system": "w9"}, (Message("system", "w9"), user)),
        "instruction": ({"instruction": "w3", "input": "w4"}, (Message("user", "w3\n\nw4"),)),
        "dialogue": (
            {"messages": [turn, {"role": "assistant", "content": "w8"}, {"role": "user", "content": "w7"}]},
            (user, Message("assistant", "w8"), Message("user", "w7")),
        ),
        "answer": ({"messages": [turn], "answer": "w5"}, (user,)),
    }
    for name, (record, turns) in shapes.items():
        source = loaded(prompts, write_rows(tmp_path / f"{name}.jsonl", [record | {"wanted": ["w5"]}]))
        (row,) = source.rows
        assert (row.prompt, row.completions, row.kind) == (turns, (), Kind.PROMPT), name
        assert row.facts == {"wanted": ["w5"]}
        assert row.answer == record.get("answer")
        write(tmp_path / f"again-{name}.jsonl", [row])
        assert loaded(prompts, tmp_path / f"again-{name}.jsonl").digest == source.digest, name
    both = write_rows(tmp_path / "both.jsonl", [{"prompt": "w3", "answer": "w5", "wanted": ["w5"]}])
    assert loaded(prompts, both).rows[0].kind is Kind.DEMONSTRATION
    assert loaded(prompts, both, kind="prompt").rows[0].answer == "w5"
    assert loaded(prompts, both, kind="prompt").rows[0].kind is Kind.PROMPT


def test_a_conversation_that_marks_turns_to_be_learned_and_ends_before_a_reply_is_no_prompt(prompts, tmp_path):
    turns = [("user", "w3"), ("assistant", "w4"), ("user", "w5")]
    marked = [{"role": role, "content": text} | ({"weight": 1} if role == "assistant" else {}) for role, text in turns]
    file = write_rows(tmp_path / "marked.jsonl", [{"messages": marked, "wanted": ["w5"]}])
    with pytest.raises(UftError, match="must end with an assistant turn"):
        loaded(prompts, file)


ALIKE = ("kto", "rwr", "sft", "chord_mu")


@pytest.mark.parametrize(
    "objective", ["grpo", "uft_rl", "dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE)]
)
def test_objectives_that_sample_their_own_completions_train_on_prompts(objective, prompts, tmp_path):
    hints = ("rollout.hint.schedule=uniform", "rollout.hint.cut=token") if objective == "uft_rl" else ()
    more = ("demonstration",) if hints or objective == "chord_mu" else ()
    config = prompts(objective, *OWN, *hints, "train.steps=3", "train.log_every=1", "data.holdout=3", more=more)
    if hints:  # beside rows that have demonstrations to show
        shown = replace(config.data.sources["demonstration"], rollout=True, checker="final_number")
        shown = replace(
            shown,
            path=str(
                write_rows(
                    tmp_path / "shown.jsonl", [{**row, "completion": "w3 w4 7", "answer": "7"} for row in records()]
                )
            ),
            checker="exact",
        )
        config = replace(config, data=replace(config.data, sources={**config.data.sources, "demonstration": shown}))
    assert sit(tmp_path / "run", config) == GOOD
    run = Run(tmp_path / "run")
    assert any("rollout/reward" in line for line in lines(run.metrics_file))
    data = json.loads((run.path / "data.json").read_text())["sources"]["asked"]
    assert data["kinds"] == {"prompt": 9}
    assert (data["held_out"], data["supervised_tokens"], data["unread"]) == (3, 0, {"origin": 12})
    final = [line for line in lines(run.metrics_file) if "eval/asked/completion_length" in line][-1]
    assert 0 <= final["eval/asked/exact_match"] <= 1
    assert not any(name.startswith("eval/asked/nll") for name in final)
    assert ("eval/nll" in final) == bool(more)


def test_what_is_sampled_of_a_prompt_starts_where_an_answer_does(prompts, tmp_path):
    from test_rollouts import examples

    from uft.runs import create_run
    from uft.training.setup import Work, prepare

    prepared = prepare(create_run(tmp_path / "run", "{}\n", []), Work(prompts("grpo", *OWN)))
    for example in examples(prepared):
        assert example.row.kind is Kind.ROLLOUT
        assert [part.role for part in example.parts] == [Role.OWN] * 3
        start = prepared.data.dataset.renderer.prompt_ids(example.row.prompt)
        assert all(tokens.ids[: tokens.prompt_length].tolist() == start for tokens in example.encoded)


def refusal(config):
    from transformers import AutoTokenizer

    with pytest.raises(UftError) as error:
        StageData.of(config, read_train_data(config, AutoTokenizer.from_pretrained(config.model.path)))
    return str(error.value)


def test_prompts_are_refused_where_nothing_is_sampled_and_what_to_type_is_said(prompts):
    said = refusal(prompts("sft", more=("demonstration",)))
    assert "objective=sft cannot use 12 prompt rows: they have no reply to learn from" in said
    assert "data.sources.asked.columns.completion=origin" in said
    assert "objective=grpo rollout.completions=8" in said
    assert "uft generate" in said
    said = refusal(prompts("irft", "rollout.completions=2", checker=None, more=("demonstration",)))
    assert "sets own completions beside a demonstration, and they have none" in said
    assert "data.sources.asked.rollout=true" in refusal(
        prompts("chord_mu", *OWN, rollout=False, more=("demonstration",))
    )
    hints = ("rollout.hint.schedule=uniform", "rollout.hint.cut=token")
    assert "no demonstration has a piece to show" in refusal(prompts("uft_rl", *OWN, *hints))
    kept = prompts("sft", "data.unusable=drop", more=("demonstration",))
    assert (
        StageData.of(kept, read_train_data(kept, _tokenizer(kept))).record["sources"]["asked"]["dropped_unusable"] == 12
    )


def _tokenizer(config):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.model.path)


@pytest.mark.slow
def test_a_model_answers_prompts_and_a_stopped_job_goes_on(prompts, tmp_path):
    """The samples are the replies: one line each, that reads back as a demonstration."""

    from uft.sampling.generate import Interrupted
    from uft.training.liveness import Stop
    from uft.training.making import drawn_sources, sample_rows
    from uft.training.setup import Work

    seeds = ("generate.seeds=[0,1,2]", "generate.batch_size=4", "generate.max_new_tokens=30")
    config = prompts("sft", *seeds)

    def job(out, stop=None):
        work = Work(config, stop=stop or Stop())
        return sample_rows(work, drawn_sources(config), out, config.model.path)

    whole = tmp_path / "whole.jsonl"
    made = job(whole)
    assert made.negatives == len(lines(whole)) > made.rows > 3
    assert {*lines(whole)[0]} == {"row", "prompt", "response", "wanted", "sampled_by", "sampling"}
    torn = tmp_path / "torn.jsonl"
    for size in range(0, len(content := whole.read_bytes()), 701):
        torn.write_bytes(content[:size])
        job(torn)
        assert torn.read_bytes() == content, size
    with pytest.raises(Interrupted):
        job(tmp_path / "stopped.jsonl", StopAt(9))
    job(tmp_path / "stopped.jsonl")
    assert (tmp_path / "stopped.jsonl").read_bytes() == content
    assert {row.kind for row in loaded(prompts, whole).rows} == {Kind.DEMONSTRATION}
