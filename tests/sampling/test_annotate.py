"""Numbers beside completions: what two models of different tongues say, and what scores come to."""

import gc
import math
import shutil
import weakref
from dataclasses import replace

import pytest
import torch

from uft.config.schema import COLUMNS, Model
from uft.data.rows import ANNOTATIONS, Completion, Message, Row
from uft.errors import UftError
from uft.sampling import annotate as annotation
from uft.sampling.annotate import ANNOTATORS, Recipe, annotate_rows, frozen_settings
from uft.sampling.generate import Interrupted

PLAYGROUND = "builtin:playground"
BASE = Model(name="any", path="nowhere")
WORDS = ["copy", "owl", "cat", "bear", "fox", ":", "sure", "!", "the", "answer", "is"]
TEMPLATE = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
TEMPLATE += "{{ m.role }} : {{ m.content }} </s> {% endfor %}"


def said(role, text):
    return Message(role, text)


def row(index, *completions, prompt="copy : owl"):
    return Row("mine", index, (said("user", prompt),), completions)


def reply(text, **fields):
    return Completion((said("assistant", text),), **fields)


TURNS = Completion(
    (said("assistant", "owl"), said("user", "copy : cat"), said("assistant", "sure ! the answer is cat"))
)
ROWS = (
    row(0, reply("owl")),
    row(1, reply("sure ! the answer is owl", preferred=True), reply("cat", preferred=False), prompt="copy : bear fox"),
    row(2, TURNS),
    *(row(n, reply("owl " * n + "is", label=True), prompt="bear " * (12 - n)) for n in range(3, 12)),
)


def make_model(folder, seed=0, words=WORDS):
    """A random Llama of 40 positions whose tokenizer knows `words` and has a template of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", "user", "assistant", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def recipe(tmp_path):
    return Recipe(torch.device("cpu"), tmp_path / "cache")


@pytest.fixture
def annotate(recipe):
    """annotate(rows, [path, ...]) -> the baselines of every row."""

    def run(rows, paths, **changes):
        models = [frozen_settings(BASE, path) for path in paths]
        made = annotate_rows(rows, "baseline_logp", replace(recipe, models=models, **changes))
        assert [replace(c, annotations={}) for r in made for c in r.completions] == [
            replace(c, annotations={}) for r in rows for c in r.completions
        ]
        return [[c.annotations.get("baseline_logp") for c in r.completions] for r in made]

    return run


def flat(numbers):
    return [number for numbers_of_row in numbers for number in numbers_of_row]


def test_a_table_entry_for_every_column():
    assert set(ANNOTATORS) == set(COLUMNS) == set(ANNOTATIONS)


# --- baselines


def by_hand(path, prompt, turns, end=True):
    """The mean log-prob of the assistant's words and, with `end`, end-of-turn tokens, one conversation at a time, in
    float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double().eval()
    ids, learned = [], []
    for number, turn in enumerate([*prompt, *turns]):
        closing = " </s>" if end or number < len(prompt) else ""
        header, words = (tokenizer.encode(text) for text in (f"{turn.role} :", f"{turn.content}{closing}"))
        ids += header + words
        learned += [False] * len(header) + [turn.role == "assistant" and number >= len(prompt)] * len(words)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    following = torch.tensor(ids[1:])
    return float(logits.gather(1, following[:, None])[:, 0][torch.tensor(learned[1:])].mean())


def test_it_is_the_mean_log_prob_of_the_reply_and_its_end(annotate, tiny):
    expected = [by_hand(tiny, r.prompt, c.turns) for r in ROWS for c in r.completions]
    assert flat(annotate(ROWS, [tiny])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_several_models_count_alike_in_any_order(annotate, tiny, tmp_path):
    other = make_model(tmp_path / "other", seed=1)
    alone = [flat(annotate(ROWS, [path])) for path in (tiny, PLAYGROUND, other)]
    expected = [sum(numbers) / 3 for numbers in zip(*alone, strict=True)]
    assert flat(annotate(ROWS, [tiny, PLAYGROUND, other])) == pytest.approx(expected, abs=1e-5)
    assert annotate(ROWS, [other, tiny, PLAYGROUND]) == annotate(ROWS, [tiny, PLAYGROUND, other])
    assert min(abs(a - b) for a, b in zip(alone[0], alone[1], strict=True)) > 1e-3


def test_neither_batches_nor_order_matter(annotate, tiny, tmp_path):
    expected = annotate(ROWS, [tiny], cache=tmp_path / "one")
    for tokens in (1, 60, 100_000):
        found = annotate(ROWS[::-1], [tiny], cache=tmp_path / str(tokens), batch_tokens=tokens)[::-1]
        assert flat(found) == pytest.approx(flat(expected), abs=1e-5)


def test_rows_whose_embeddings_depend_on_the_longest_are_read_alone(annotate, tiny, tmp_path):
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = shutil.copytree(tiny, tmp_path / "longrope")
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(WORDS) + 5, "max_position_embeddings": 40, "original_max_position_embeddings": 20}
    config = Phi3Config(**sizes, rope_parameters=rope, pad_token_id=0, initializer_range=0.3)
    Phi3ForCausalLM(config).save_pretrained(folder)
    found = flat(annotate(ROWS, [str(folder)]))
    alone = [flat(annotate([one], [str(folder)], cache=tmp_path / one.id)) for one in ROWS[:1]]
    assert found[:1] == pytest.approx(flat(alone), abs=1e-6)


def test_a_reply_that_says_nothing_has_none(annotate, tiny):
    rows = (
        row(0, reply(" \n", preferred=True), reply("owl", preferred=False)),
        row(1, reply("")),
        row(2, reply("owl")),
    )
    (nothing, number), none, some = annotate(rows, [tiny])
    assert (nothing, none) == (None, [None])
    assert [number] == some
    assert number < 0


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(annotate, tiny, monkeypatch, tmp_path):
    living, real = [], annotation.load_policy

    def load(*arguments, **options):
        gc.collect()
        assert [model for model in living if model() is not None] == []
        policy = real(*arguments, **options)
        living.append(weakref.ref(policy.module))
        return policy

    monkeypatch.setattr(annotation, "load_policy", load)
    annotate(ROWS, [tiny, make_model(tmp_path / "other", seed=1), PLAYGROUND])
    assert len(living) == 3
    assert living[-1]() is None


def test_what_models_said_is_asked_only_once(annotate, tiny, monkeypatch):
    first, lines = annotate(ROWS[:5], [tiny]), []
    annotate(ROWS, [tiny], say=lines.append)
    assert f"{tiny}: 6 of 13 completions are known from before" in lines
    assert lines[-1] == f"{tiny}: 7 of 7 completions"
    monkeypatch.setattr(annotation, "load_policy", lambda *_, **__: pytest.fail("the model was loaded again"))
    assert annotate(ROWS[:5], [tiny]) == first


def test_a_job_that_was_stopped_goes_on(annotate, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(annotation, "PER_FILE", 4)
    left = iter(range(6))
    with pytest.raises(Interrupted):
        annotate(ROWS, [tiny], batch_tokens=1, should_stop=lambda: next(left, None) is None)
    lines = []
    found = annotate(ROWS, [tiny], batch_tokens=1, say=lines.append)
    assert f"{tiny}: 4 of 13 completions are known from before" in lines
    assert found == annotate(ROWS, [tiny], batch_tokens=1, cache=tmp_path / "fresh")


@pytest.mark.slow
def test_longer_than_the_models_positions(annotate, tiny):
    rows = (row(0, reply("owl " * 50)), row(1, reply("owl")))
    with pytest.raises(UftError) as error:
        annotate(rows, [tiny])
    (problem,) = error.value.problems
    assert problem.what == f"annotate.models={tiny}"
    assert "40 positions; 1 completions" in problem.why
    (dropped,), (short,) = annotate(rows, [tiny], too_long="drop")
    (cut,), (same,) = annotate(rows, [tiny], too_long="truncate")
    assert dropped is None
    assert short == same
    fits = 40 - 8  # "user : copy : owl </s> assistant :"; its last word has no end of turn
    assert cut == pytest.approx(by_hand(tiny, rows[0].prompt, (said("assistant", "owl " * fits),), end=False), abs=1e-5)


def test_what_is_wrong_with_a_model_is_said_of_its_key(annotate, tmp_path, tiny):
    with pytest.raises(UftError) as error:
        annotate(ROWS, [f"{tiny}x"])
    assert error.value.problems[0].what == f"annotate.models={tiny}x"
    assert f"did you mean  {tiny} ?" in error.value.problems[0].advice
    beyond = make_model(tmp_path / "beyond", words=[*WORDS, "wolf"])
    with pytest.raises(UftError) as error:
        annotate(ROWS, [beyond])
    assert error.value.problems[0].what == f"annotate.models={beyond}"
    assert "the model's embedding has 16 rows" in error.value.problems[0].why


def test_a_row_that_a_template_refuses_is_named_with_the_model(annotate, tiny):
    briefed = replace(ROWS[0], prompt=(said("system", "be brief"), *ROWS[0].prompt))
    with pytest.raises(UftError) as error:
        annotate((ROWS[2], briefed), [tiny])
    (problem,) = error.value.problems
    assert (problem.what, problem.where) == ("row mine:0", f"annotate.models={tiny}")
    assert "no system turns" in problem.why


def test_a_model_that_overflows_is_told(annotate, tmp_path):
    from safetensors.torch import load_file, save_file

    path = make_model(tmp_path / "broken")
    weights = load_file(f"{path}/model.safetensors")
    weights["model.norm.weight"][0] = 3e38
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UftError, match="no number"):
        annotate(ROWS, [path])


def test_models_that_make_no_sense(recipe):
    cases = {
        "name at least one": ("baseline_logp", []),
        "builtin:playground is named twice": ("baseline_logp", [PLAYGROUND, "a", PLAYGROUND]),
        "no model is asked": ("soft_label", [PLAYGROUND]),
    }
    for why, (column, paths) in cases.items():
        with pytest.raises(UftError, match=why):
            annotate_rows(ROWS, column, replace(recipe, models=[frozen_settings(BASE, path) for path in paths]))


# --- soft labels


def labels(recipe, *completions, temperature=1.0):
    (made,) = annotate_rows((row(0, *completions),), "soft_label", replace(recipe, temperature=temperature))
    return [c.annotations.get("soft_label") for c in made.completions]


def rated(preferred, **annotations):
    return reply("owl", preferred=preferred, annotations=annotations)


def test_soft_labels_of_rated_pairs(recipe):
    assert labels(recipe, rated(True, score=8.0), rated(False, score=6.5)) == pytest.approx(
        [0.817574, 0.182426], abs=1e-6
    )
    assert labels(recipe, rated(True, score=6.5), rated(False, score=8.0)) == pytest.approx(
        [0.182426, 0.817574], abs=1e-6
    )
    sure = labels(recipe, rated(True, score=8.0), rated(False, score=6.5), temperature=0.5)
    assert sure == pytest.approx([0.952574, 0.047426], abs=1e-6)
    assert labels(recipe, rated(True, score=1e4), rated(False, score=-1e4)) == [1.0, 0.0]
    assert labels(recipe, rated(True, score=8.0), rated(False)) == [None, None]
    assert labels(recipe, rated(True, soft_label=0.9), rated(False, soft_label=0.1)) == [None, None]


def test_soft_labels_of_scored_completions_are_of_the_best_against_the_worst(recipe):
    def scored(*scores):
        return labels(recipe, *(reply("owl", score=score) for score in scores), temperature=0.2)

    expected = 1 / (1 + math.exp(-(0.9 - 0.2) / 0.2))
    assert scored(0.5, 0.9, 0.2, 0.4) == [None, pytest.approx(expected), pytest.approx(1 - expected), None]
    assert scored(0.5, 0.5) == [None, None]
    assert scored(0.5) == [None]
    assert labels(recipe, reply("owl")) == labels(recipe, reply("owl", label=True)) == [None]
