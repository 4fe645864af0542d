"""Tasks of lm-evaluation-harness: the same figures and verdicts as its own model over transformers, and `uft eval`."""

from __future__ import annotations

import gzip
import json
import random
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from uft.config.schema import Eval, Model
from uft.data.batch import Layout
from uft.errors import UftError
from uft.model.layout import settle_layout
from uft.model.load import load_model, load_tokenizer
from uft.model.policy import Policy

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from uft.evaluation.harness import PackedLM, Rows, load_tasks, run_tasks
from uft.evaluation.measures import mean_stderr

SHARED = Path(__file__).parents[3] / "shared" / "data"
MODEL = Model(name="playground", path="builtin:playground")
WORDS = ("queen", "moon", "book", "bird", "chair", "glass", "snow", "boat")
GSM8K = [
    {"question": f"count : {' '.join(WORDS[:n])}", "answer": f"there are <<{n}={n}>>{n}\n#### {n}"} for n in range(2, 8)
]
TRUTH = [
    {"question": f"sort : {a} {b}", "mc1_targets": {"choices": [f"{a} {b}", b, f"{b} {a}"], "labels": [1, 0, 0]}}
    | {"mc2_targets": {"choices": [f"{a} {b}", a, f"{b} {a}"], "labels": [1, 1, 0]}}
    for a, b in zip(WORDS[:4], WORDS[4:], strict=True)
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def ours(tokenizer, packing="packed"):
    policy = Policy(load_model(MODEL, torch.device("cpu"), 0))
    settle_layout(policy, packing, 200)
    assert (policy.layout is Layout.PADDED) == (packing == "padded")
    return PackedLM(policy, tokenizer, 600)


@pytest.fixture(scope="module")
def models(tokenizer):
    """(ours, the harness's own) over the same weights."""
    module = load_model(MODEL, torch.device("cpu"), 0)
    return ours(tokenizer), HFLM(pretrained=module, tokenizer=tokenizer, batch_size=3)


def asked(kind, pairs):
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]


def test_log_probs_are_those_of_the_harness_s_own_model(models, tokenizer):
    draw = random.Random(0)
    text = lambda most: " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))  # noqa: E731
    pairs = [(context, f" {text(6)}") for context in (text(30) for _ in range(6)) for _ in range(3)]
    pairs += [("", "queen moon"), ("sort : queen moon ", "moon"), (" ".join(WORDS * 40), " queen")]  # cut at the left
    pairs += [("sort : queen moon", f" {word}") for word in tokenizer.get_vocab()]  # one is greedy
    three = (*models, ours(tokenizer, "padded"))
    packed, theirs, padded = (m.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True) for m in three)
    assert len({greedy for _, greedy in theirs}) == 2
    for found in (packed, padded):
        assert [greedy for _, greedy in found] == [greedy for _, greedy in theirs]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    texts = [(text(20),), (" ".join(WORDS * 80),)]  # the second in several windows
    packed, theirs = (model.loglikelihood_rolling(asked("loglikelihood_rolling", texts)) for model in models)
    assert packed == pytest.approx(theirs, abs=1e-3)


def test_prompts_are_rendered_as_the_harness_s_own_model_renders_them(models, tokenizer):
    turns = [{"role": role, "content": WORDS[n]} for n, role in enumerate(("user", "assistant", "user"))]
    ours, theirs = (model.apply_chat_template(turns) for model in models)
    assert ours == theirs
    plain = PackedLM(models[0].policy, deepcopy(tokenizer), 600)
    plain.tokenizer.chat_template = None
    with pytest.raises(UftError, match="the model has none"):
        load_tasks(plain.tokenizer, Eval(tasks=[{"task": "gsm8k", "template": True}]), print)


def test_answers_are_those_of_the_harness_s_own_model(models):
    settings = {"until": ["moon", "\n\n"], "do_sample": False, "max_gen_toks": 12}
    pairs = [(f"{task} : {WORDS[n]} {WORDS[n + 2]} moon", settings) for task in ("sort", "copy") for n in range(5)]
    pairs += [(" ".join(WORDS * 40), settings), ("min : snow book", {**settings, "until": [], "max_gen_toks": 5})]
    found, theirs = (model.generate_until(asked("generate_until", pairs), disable_tqdm=True) for model in models)
    assert found == theirs
    assert len(set(found)) > 3


def local(name, found, **settings):
    """A task of its own over these rows."""
    from datasets import Dataset

    own = {"task": name, "custom_dataset": lambda **_: {"test": Dataset.from_list(found)}, "test_split": "test"}
    return {**own, "num_fewshot": 0, **settings}


def test_every_verdict_of_a_task_is_the_harness_s(models):
    choices = local(
        "choices",
        TRUTH,
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="{{mc1_targets.choices}}",
        doc_to_target=0,
    )
    answers = local(
        "answers",
        GSM8K,
        output_type="generate_until",
        doc_to_text="question",
        doc_to_target="{{answer.split('#### ')[1]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
    )
    found = []
    for model in models:
        content = TaskManager(include_defaults=False).load([dict(choices), dict(answers)])
        found.append(evaluate(model, content, bootstrap_iters=10))
    own, theirs = found
    for task in ("choices", "answers"):
        figures = {key: value for key, value in theirs["results"][task].items() if isinstance(value, float)}
        assert figures
        assert {key: own["results"][task][key] for key in figures} == pytest.approx(figures, abs=1e-3)
        for one, other in zip(own["samples"][task], theirs["samples"][task], strict=True):
            assert [one[metric] for metric in one["metrics"]] == [other[metric] for metric in other["metrics"]]


def test_the_standard_error_of_a_metric_and_of_a_mean_of_metrics():
    """Linearised over rows: for one metric of one verdict a row it is s / sqrt(n)."""
    verdicts = [(1.0, 1.0), (0.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
    assert mean_stderr([verdicts], [0.75]) == pytest.approx(0.5 / 2)
    assert mean_stderr([verdicts, verdicts], [0.75, 0.75]) == pytest.approx(0.5 / 2)
    opposite = [(1 - s, n) for s, n in verdicts]
    assert mean_stderr([verdicts, opposite], [0.75, 0.25]) == pytest.approx(0.0)
    several = [(2.0, 4.0), (3.0, 3.0), (0.0, 1.0)]  # rules of IFEval: 5 of 8 are kept
    shares = [(s - 0.625 * n) * 3 / 8 for s, n in several]
    spread = sum(share**2 for share in shares) / 2
    assert mean_stderr([several], [0.625]) == pytest.approx((spread / 3) ** 0.5)
    assert mean_stderr([verdicts], [0.5]) is None, "no mean over rows: the harness's own is taken"


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def test_rows_of_a_task_are_read_as_rows_of_a_data_set_are(tmp_path):
    row = {"question": "one\u2028line", "answer": "#### 1"}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode("utf-8")))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert Rows.read("gsm8k", str(tmp_path / name), None).evaluated == [row]
    (tmp_path / "broken.jsonl").write_text(text + "{\n", encoding="utf-8")
    for name, why in (("broken.jsonl", "broken JSON.*row 2"), ("rows.xml", "none of .jsonl"), ("no.jsonl", "No such")):
        with pytest.raises(UftError, match=why):
            Rows.read("gsm8k", str(tmp_path / name), None)


def test_examples_of_a_prompt_are_never_drawn_from_the_rows_that_are_measured(tokenizer, tmp_path):
    file = str(write(tmp_path / "gsm8k.jsonl", GSM8K))
    with pytest.raises(UftError, match=r"eval\.shot_files\.gsm8k=FILE"):
        load_tasks(tokenizer, Eval(tasks=["gsm8k"], task_files={"gsm8k": file}), print)


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_told_at_once(uft):
    """The client of the hub would try six times in half a minute, with a line on each."""
    asked = {"HF_HUB_OFFLINE": "", "HF_ENDPOINT": "http://127.0.0.1:9"}
    said = uft("eval", "builtin:playground", "eval.tasks=[gsm8k]", code=2, env=asked).stderr
    assert "its rows are not in the hub's cache here, and the hub does not answer" in said
    assert "Retry" not in said


def test_tasks_on_files_of_rows(uft, tmp_path):
    files = {"gsm8k": write(tmp_path / "gsm8k.jsonl", GSM8K), "truthfulqa_mc2": write(tmp_path / "t.jsonl", TRUTH)}
    words = [f"eval.task_files.{task}={file}" for task, file in files.items()]
    words += [f"eval.shot_files.gsm8k={files['gsm8k']}", "eval.task_tokens=8"]
    tasks = "eval.tasks=[{task: gsm8k, shots: 1, keys: ['exact_match,strict-match', 'exact_match,flexible-extract']}"
    done = uft("eval", "builtin:playground", f"{tasks},truthfulqa_mc2]", *words)
    file = tmp_path / "evals" / "playground-gsm8k+truthfulqa_mc2.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["harness"] == "lm_eval 0.4.13"
    mean, truth = found["figures"]["gsm8k/mean"], found["figures"]["truthfulqa_mc2/acc"]
    assert (mean["shots"], mean["template"], mean["n"], mean["task_version"]) == (1, False, 6, "3.0")
    assert (truth["shots"], truth["n"]) == (0, 4)
    assert 0 < truth["value"] < 1
    assert truth["stderr"] > 0
    items = [json.loads(line) for line in file.with_suffix(".items.jsonl").read_text(encoding="utf-8").splitlines()]
    of_truth = [item["measures"]["acc"] for item in items if item["source"] == "truthfulqa_mc2"]
    assert sum(s for s, _ in of_truth) / sum(n for _, n in of_truth) == pytest.approx(truth["value"])
    assert sum(item["source"] == "gsm8k" for item in items) == 2 * 6, "a line per row and filter"
    assert f"{truth['value']:.4g} ± {truth['stderr']:.2g}" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no rows of the benchmarks here")
def test_rows_of_the_benchmarks(models, tokenizer):
    """GSM8K, IFEval, TruthfulQA and BBH as they are distributed."""
    pytest.importorskip("langdetect")
    files = {"gsm8k": "gsm8k_test", "ifeval": "ifeval", "truthfulqa_mc1": "truthfulqa"}
    files |= {f"bbh_fewshot_{name}": "bbh_small" for name in ("word_sorting", "object_counting")}
    settings = Eval(
        tasks=list(files),
        task_files={task: str(SHARED / f"{name}.jsonl") for task, name in files.items()},
        shot_files={"gsm8k": str(SHARED / "gsm8k_train.jsonl")},
        task_rows=2,
        task_tokens=6,
    )
    found, items = run_tasks(models[0], load_tasks(tokenizer, settings, print), settings, print)
    assert {name.partition("/")[0] for name in found} == set(files)
    assert all(one["n"] == 2 and 0 <= one["value"] <= 1 for one in found.values())
    assert found["gsm8k/exact_match,strict-match"]["shots"] == 5
    assert found["bbh_fewshot_word_sorting/exact_match"]["shots"] == 3
    asked_of = {item["source"]: item["prompt"] for item in items}
    assert asked_of["bbh_fewshot_object_counting"].count("Q:") == 4
