"""Checkers that ask a model, against the model asked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from uft.data.rows import Message, Row
from uft.errors import UftError
from uft.playground import world
from uft.rewards import check, judge

PROMPT = "copy : fox red"
REPLIES = ["sure ! the answer is fox red", "fox red", "owl", "fox red " * 20]


def row(prompt=PROMPT):
    return Row("s", 0, (Message("user", prompt),), ())


def test_likelihood_is_the_inverse_perplexity_under_the_other_model():
    tokenizer = AutoTokenizer.from_pretrained(world.model_dir())
    model = AutoModelForCausalLM.from_pretrained(world.model_dir()).eval()
    expected = []
    for reply in REPLIES:
        chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": reply}]
        start = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
        ids = torch.tensor(tokenizer.apply_chat_template(chat)["input_ids"])
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
        end = (ids == tokenizer.eos_token_id).nonzero().max() + 1  # a template may write more after it
        own = log_probs[len(start) - 1 : end - 1].gather(-1, ids[len(start) : end, None])
        expected.append(math.exp(own.mean()))
    spec = {"method": "likelihood", "path": "builtin:playground", "batch_size": 3}
    found = [verdict.figures["likelihood"] for verdict in judge([(spec, row(), reply) for reply in REPLIES])]
    assert found == pytest.approx(expected, rel=1e-4)
    long = judge([(spec, row(), "owl " * 5000), (spec, row(), REPLIES[1]), (spec, row(), "")])
    assert long[0].figures == {"likelihood": 0.0}
    assert "positions" in long[0].reason
    assert long[1].figures["likelihood"] == pytest.approx(expected[1], rel=1e-4)
    assert 0 <= long[2].figures["likelihood"] <= 1, "an empty reply stops nothing"
    warm = check({**spec, "temperature": 4.0}, row(), REPLIES[2])["likelihood"]
    assert warm == pytest.approx(expected[2] ** 0.25, rel=1e-4)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Folders of two random classifiers over the playground's vocabulary: of three classes, and of one output."""
    folders = []
    for labels in (["bad", "so", "good"], ["reward"]):
        torch.manual_seed(0)
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
        model = AutoModelForSequenceClassification.from_pretrained(world.model_dir(), num_labels=len(labels), **names)
        folders.append(tmp_path_factory.mktemp("classifier"))
        model.save_pretrained(folders[-1])
        AutoTokenizer.from_pretrained(world.model_dir()).save_pretrained(folders[-1])
    return folders


@pytest.mark.parametrize("reads", ["reply", "conversation"])
def test_a_classifier_gives_the_probability_of_a_class(classifier, reads):
    of_three, of_one = classifier
    figures = {}
    for label in ("bad", "so", "good", None):
        spec = {"method": "classifier", "path": str(of_three), "label": label, "reads": reads}
        figures[label] = [v.figures["probability"] for v in judge([(spec, row(), reply) for reply in REPLIES])]
    assert [sum(three) for three in zip(*list(figures.values())[:3], strict=True)] == pytest.approx([1.0] * 4)
    assert figures[None] == figures["good"]
    tokenizer = AutoTokenizer.from_pretrained(of_one)
    model = AutoModelForSequenceClassification.from_pretrained(of_one).eval()
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "owl"}]
    ids = tokenizer("owl")["input_ids"] if reads == "reply" else tokenizer.apply_chat_template(chat)["input_ids"]
    with torch.no_grad():
        expected = float(model(torch.tensor([ids])).logits.sigmoid())
    spec = {"method": "classifier", "path": str(of_one), "reads": reads}
    assert check(spec, row(), "owl")["probability"] == pytest.approx(expected, rel=1e-4)


def test_what_is_wrong_with_a_model_is_told(classifier, tmp_path, monkeypatch):
    with pytest.raises(UftError, match="bad, so, good"):
        check({"method": "classifier", "path": str(classifier[0]), "label": "fine"}, row(), "owl")
    with pytest.raises(UftError, match="cannot be loaded"):
        check({"method": "likelihood", "path": str(tmp_path)}, row(), "owl")

    def fail(*arguments, **options):
        raise KeyError  # without a message

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UftError, match="cannot be loaded: KeyError"):
        check({"method": "likelihood", "path": "elsewhere"}, row(), "owl")
