"""After training: answers of a run's model and of its checkpoints, checked with plain transformers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uft import load

QUESTIONS = ("What is the capital of France?", "one two three")
LEARNING = ("train.steps=4", "optim.lr=1e-2", "train.batch_size=4", "train.checkpoint_every=2", "train.keep_last=3")
GREEDY = ("generate.temperature=0", "generate.max_new_tokens=12")


@pytest.fixture
def trained(uft, request_of, tmp_path) -> Callable[..., Path]:
    """trained(overrides): a run of four steps with a checkpoint after each two."""

    def train(*more: str, name: str = "run") -> Path:
        done = uft("train", *request_of("sft", ["demonstrations"], *LEARNING, f"run.dir={tmp_path / name}", *more))
        (tmp_path / name / "said").write_text(done.stdout)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_checkpoint_is_exported_and_every_form_of_it_is_the_same_model(uft, trained, tmp_path, tiny_model):
    run = trained("model.adapter=lora", "model.lora.rank=4", "optim.lr=5e-2")
    for line in re.findall(r"uft ((?:chat|export) .*?)   ", (run / "said").read_text()):
        uft(*shlex.split(line), input="Hello\n")
    assert log_probs(tmp_path / "run-model") == log_probs(run / "model")
    shutil.rmtree(run / "model")
    (run / "result.json").unlink()
    whole, adapter, half = (tmp_path / name for name in ("whole", "adapter", "half"))
    told = uft("export", run, "--to", whole, "--gguf", "--ollama").stdout
    for line in ("run@4: exporting", "are those of the run", "read back with transformers", "ollama create whole"):
        assert line in told
    assert list(whole.glob(".*")) == [], "nothing half-written is left"
    uft("export", run, "--to", adapter, "--adapter", "--checkpoint", "4")
    uft("export", f"{run}@2", "--to", half, "--dtype", "bfloat16")
    expected = log_probs(whole)
    loaded = load(run)  # in Python: stopped, so its newest checkpoint
    assert log_probs(whole, loaded.model()) == pytest.approx(expected, abs=1e-4)
    assert log_probs(half, loaded.model(2)) == pytest.approx(log_probs(half), abs=0.1)
    assert loaded.tokenizer().chat_template == loaded.tokenizer(2).chat_template is not None
    assert log_probs(adapter, base=tiny_model) == pytest.approx(expected, abs=1e-4)
    assert log_probs(whole, gguf_file="whole.gguf") == pytest.approx(expected, abs=1e-4)
    assert log_probs(half) != pytest.approx(expected, abs=1e-2)
    card = (whole / "README.md").read_text()
    assert "objective `sft`" in card
    assert "4 steps of 4 rows" in card
    assert "AutoPeftModelForCausalLM" in (adapter / "README.md").read_text()
    assert str(tmp_path) not in card
    modelfile = (whole / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./whole.gguf\n")
    assert 'eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{' in modelfile
    assert modelfile.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')
    config = json.loads((whole / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert json.loads((whole / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    told = uft("export", run, "--to", whole, code=2).stderr
    assert "is there already" in told


def log_probs(folder: Path, model: Any = None, base: Path | None = None, **options) -> list[float]:
    """Plain transformers' log-probs of the second token and on, of a few tokens; of a folder, or of `model`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = model or AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32, **options)
    if base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = model.eval()(ids).logits[0, :-1].log_softmax(-1)
    return found.gather(1, ids[0, 1:, None]).flatten().tolist()


def test_a_conversation_has_a_history_and_shows_answers_that_cannot_move_the_cursor(uft, tiny_model, other_model):
    sampling = ("generate.max_new_tokens=40", "generate.temperature=2", "generate.top_k=0")

    def said(*words: object, lines: list[str]) -> list[str]:
        out = uft("chat", *words, *sampling, input="".join(f"{line}\n" for line in lines)).stdout
        assert all(character.isprintable() or character == "\n" for character in out)
        return [piece.strip() for piece in out.split("you> ")[1:]]

    first, again, third, cleared, anew, told, left = said(
        tiny_model, lines=["Hello", "/regen", "Hello", "/clear", "Hello", "/what", "/quit", "never"]
    )
    assert len({first, again, third}) == 3, "another seed, and another history"
    assert (anew, cleared, left) == (first, "", "")
    assert "no such command" in told
    assert "\\x" in first + again + third, "random tokens hold control characters"
    both, _ = said(tiny_model, other_model, lines=["Hello"])
    assert tiny_model.name in both.splitlines()[0]
    assert other_model.name in both.splitlines()[0]
    assert uft("chat", tiny_model, other_model, tiny_model, code=2).stderr


def weights_of(checkpoint: Path) -> dict:
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / "tensors.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("model/", "optimiser/"))}


@pytest.mark.slow
def test_an_extended_run_is_the_run_that_was_longer_from_the_start(uft, trained):
    constant = ("optim.schedule=constant", "optim.warmup=0.25")
    run = trained(*constant)
    refused = uft("resume", run, "train.steps=3", code=2).stderr
    assert "a horizon can only be extended" in refused
    extended = uft("resume", run, "train.steps=8").stdout
    assert "train.steps=8 " in extended[extended.index("  next ") :], "not the steps that were typed first"
    assert "train.steps=4" not in extended[extended.index("  next ") :]
    whole = trained("optim.schedule=constant", "optim.warmup=1", "train.steps=8", name="whole")
    ours, theirs = (weights_of(one / "checkpoints/step-000008") for one in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours), "bit for bit, moments too"
    (row,) = json.loads(uft("ls", run, "--json").stdout)
    assert (row["status"], row["steps"], row["started_from"]) == ("finished", 8, "extended at 4")
    assert "is finished already" in uft("resume", run).stdout


def test_a_run_whose_last_rollout_was_cut_short_is_not_extended(uft, trained):
    own = ("rollout.completions=2", "rollout.max_new_tokens=2", "rollout.prompts=12", "reward=length")
    run = trained("optim.schedule=constant", *own)
    refused = uft("resume", run, "train.steps=8", code=2).stderr
    assert "the last rollout before step 4 was of fewer than rollout.prompts=12 prompts" in refused


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another(uft, trained, metrics, tmp_path):
    first = trained("model.adapter=lora", "model.lora.rank=4", "optim.lr=5e-2", "eval=quick", "train.eval_every=2")
    refused = uft("resume", first, "train.steps=8", code=2).stderr
    assert "optim.schedule=cosine ends at step 4: only a constant schedule can be extended" in refused
    assert json.loads((first / "result.json").read_text())["status"] == "finished"
    log = uft("export", f"{first}@2", "--to", tmp_path / "half").stdout
    assert "are those of the run" in log
    other = ("optim.lr=0", "train.steps=1", "eval=quick", "tracking=none", "hardware=cpu")
    words = ["objective=sft", f"data={tmp_path / 'rows.jsonl'}", "data.holdout=2", *other]
    rows = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = uft("train", *words, f"init_from={first}@2", f"run.dir={tmp_path / 'second'}").stdout
    assert "its optimiser does not come along" in " ".join(said.split())
    uft("train", *words, f"model.path={tmp_path / 'half'}", f"run.dir={tmp_path / 'third'}")
    found = [metrics(tmp_path / name)[0]["eval/nll"] for name in ("second", "third")]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    info = json.loads((tmp_path / "second/run.json").read_text())
    assert (info["init_from"]["run"], info["init_from"]["step"]) == ("run", 2)
    assert "run@2" in uft("ls", tmp_path / "second").stdout
    told = uft("config", *words, f"init_from={first}@5", code=2).stderr
    assert "checkpoints are of the steps 2, 4" in told
    told = uft("config", *words, f"init_from={first}", "model=custom", code=2).stderr
    assert "names a run, whose model comes along" in told
