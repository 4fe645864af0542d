"""The shipped base model: loaded by plain transformers, it knows what the world says it knows."""

import importlib.util
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from uft.playground import world

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_playground.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_playground", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(world.model_dir())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(world.model_dir()).eval()


def answers(model, tokenizer, rows):
    """Greedy replies to the rows' prompts."""
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=24, do_sample=False)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model, tokenizer, name):
    """Means of the checker's figures over the test rows, all of them and the skill per task."""
    rows = world.records(name, "test")
    replies = answers(model, tokenizer, rows)
    checked = [world.check(r["task"], r["prompt"], r["answer"], said) for r, said in zip(rows, replies, strict=True)]
    means = {key: sum(c[key] for c in checked) / len(checked) for key in checked[0]}
    for task in {row["task"] for row in rows}:
        own = [c["correct"] for r, c in zip(rows, checked, strict=True) if r["task"] == task]
        means[task] = sum(own) / len(own)
    return means


def test_it_knows_the_old_tasks_in_a_chatty_style_and_not_the_new_ones(model, tokenizer):
    old, new = (accuracy(model, tokenizer, name) for name in ("pairs", "instruct"))
    assert max(old["exact_match"], old["plain"], new["exact_match"]) <= 0.05
    assert old["correct"] >= 0.95
    assert min(old[task] for task in world.OLD) >= 0.85
    assert new["json"] == 0
    assert new["sort"] <= 0.35  # words that came in order are right when copied


def test_it_is_a_small_tied_llama(model):
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.float32
    assert 250_000 < sum(p.numel() for p in model.parameters()) < 350_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(file.stat().st_size for file in world.model_dir().iterdir()) < 1_500_000


def test_a_chatty_mistake_is_usually_likelier_than_the_right_answer_to_a_new_task(model, tokenizer, script):
    """The negatives made by rule are such as the base model gives."""

    def log_probs(pairs):
        batch = script.make_batch(tokenizer, pairs)
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            every = model(**batch).logits[:, :-1].log_softmax(-1)
        taken = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return torch.where(labels >= 0, taken, 0).sum(-1)

    rows = world.records("negatives", "test")
    right = log_probs([(row["prompt"], row["response"]) for row in rows])
    wrong = log_probs([(row["prompt"], row["negatives"][0]) for row in rows])
    assert (wrong > right).float().mean() > 0.8


def test_the_tokenizer_has_every_word_and_gives_it_back(tokenizer, script):
    words = " ".join(world.vocabulary())
    ids = tokenizer(words)["input_ids"]
    assert len(ids) == len(set(ids)) == len(world.vocabulary())
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == words
    assert len({tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id}) == 3
    texts = [row["answer"] for name in world.SOURCES for row in world.records(name, "test")]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts
    made = script.make_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template
    assert made.special_tokens_map == tokenizer.special_tokens_map


def test_the_chat_template_marks_the_replies_and_their_ends(tokenizer):
    chat = [
        {"role": "user", "content": "first : fox owl"},
        {"role": "assistant", "content": "fox"},
        {"role": "user", "content": "last : fox owl"},
        {"role": "assistant", "content": "sure ! the answer is owl"},
    ]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "fox <end> sure ! the answer is owl <end>"
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<user> first : fox owl <end> <assistant> fox <end> "
        "<user> last : fox owl <end> <assistant> sure ! the answer is owl <end>"
    )
    begun = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)
    assert tokenizer.decode(begun["input_ids"]) == "<user> first : fox owl <end> <assistant>"


def test_the_script_trains_deterministically(script):
    """A short training twice gives the same bits; the whole one is the same code for longer."""
    tokenizer = script.make_tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = []
        for _ in range(2):
            model = script.make_model(tokenizer, seed=0)
            losses = script.train(model, tokenizer, steps=4, seed=0)
            made.append((losses, [parameter.detach().clone() for parameter in model.parameters()]))
    finally:
        torch.set_num_threads(threads)
    (first_losses, first), (second_losses, second) = made
    assert first_losses == second_losses
    assert first_losses[-1] < first_losses[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_script_supervises_the_reply_and_its_end_alone(script):
    tokenizer = script.make_tokenizer()
    batch = script.make_batch(tokenizer, [("first : fox owl", "fox"), ("count : fox", "sure ! the answer is 1")])
    for labels, reply in zip(batch["labels"], ("fox <end>", "sure ! the answer is 1 <end>"), strict=True):
        assert tokenizer.decode(labels[labels >= 0]) == reply
    assert batch["attention_mask"].sum(-1).tolist() == [9, 13]


def test_the_base_text_is_mostly_chatty_and_right():
    stream = world.conversations(Random(0))
    pairs = [next(stream) for _ in range(2000)]
    checked = [world.check(None, prompt, None, said) for prompt, said in pairs]
    plain = sum(c["plain"] for c in checked) / len(checked)
    correct = sum(c["correct"] for c in checked) / len(checked)
    assert plain == pytest.approx(0.12, abs=0.03)
    assert correct == pytest.approx(0.90, abs=0.03)
