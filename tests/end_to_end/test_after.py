"""After training: answers of a run's model and of its checkpoints, checked with plain transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

QUESTIONS = ("What is the capital of France?", "one two three")
LEARNING = ("train.steps=4", "optim.lr=1e-2", "train.batch_size=4", "train.checkpoint_every=2", "train.keep_last=3")
GREEDY = ("generate.temperature=0", "generate.max_new_tokens=12")


@pytest.fixture
def trained(uft, request_of, tmp_path) -> Callable[..., Path]:
    """trained(overrides): a run of four steps with a checkpoint after each two."""

    def train(*more: str, name: str = "run") -> Path:
        uft("train", *request_of("sft", ["demonstrations"], *LEARNING, f"run.dir={tmp_path / name}", *more))
        return tmp_path / name

    return train


def greedy(folder: Path, questions=QUESTIONS) -> list[str]:
    """Plain transformers' greedy answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for question in questions:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, do_sample=False, max_new_tokens=12)
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def test_answers_of_a_run_and_of_its_checkpoints_are_those_of_their_weights(uft, trained, tiny_model):
    run = trained("model.adapter=lora", "model.lora.rank=4", "optim.lr=5e-2")

    def answers(word: object, *questions: str, **options) -> list[str]:
        (run / "answers.jsonl").unlink(missing_ok=True)
        said = uft("generate", word, *questions, *GREEDY, **options).stdout
        rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
        assert all(f"> {row['prompt']}" in said for row in rows)
        assert [row["prompt"] for row in rows] == list(QUESTIONS)
        return [row["response"] for row in rows]

    expected = greedy(run / "model")
    assert expected != greedy(tiny_model)
    assert answers(run, *QUESTIONS) == answers(f"{run}@4", *QUESTIONS) == expected
    (run / "questions.jsonl").write_text("".join(json.dumps({"question": one}) + "\n" for one in QUESTIONS))
    assert answers(run, run / "questions.jsonl") == answers(run, "-", input="\n".join(QUESTIONS)) == expected
    half = answers(run / "checkpoints/step-000002", *QUESTIONS)
    assert half != expected
    shutil.rmtree(run / "checkpoints/step-000004")
    (run / "result.json").unlink()  # as if it had been killed after its second step
    assert answers(run, *QUESTIONS) == half
    told = uft("generate", f"{run}@3", *QUESTIONS, code=2).stderr
    assert "has no checkpoint 3" in told
    assert "checkpoints are of the steps 2" in told
    told = uft("generate", run, "debug=fast", "generate.limit=1").stdout
    assert "1 rows with" in told or "0 rows with" in told
    assert f"> {QUESTIONS[0]}" in uft("generate", tiny_model, QUESTIONS[0], *GREEDY).stdout
