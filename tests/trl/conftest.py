"""The same rows through both programs: uft from a file to one optimiser step, TRL from a dataset to its own loss.

Each tokenises by itself; that both arrived at the same tokens, the same of them learned, is asserted before any number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Record = dict[str, Any]
Sequences = list[tuple[list[int], list[bool]]]  # ids of a prompt with a completion, and which of them are learned


# --- rows ------------------------------------------------------------------------------------------------------------


def said(role: str, content: str) -> Record:
    return {"role": role, "content": content}


def asked(content: str) -> list[Record]:
    return [said("user", content)]


def answered(content: str) -> list[Record]:
    return [said("assistant", content)]


PROMPTS = [
    asked("where is the sea"),
    [said("system", "be brief"), *asked("how are you")],
    [*asked("two and two"), *answered("four"), *asked("and one more makes how many of them")],
    asked("go on"),
    asked("say what you see"),
]
CHOSEN = [
    "the sea is where the land ends",
    "well",
    "five of them",
    "i will go on and on and on",
    "the land and the sea",
]
REJECTED = [
    "on land",
    "how are you i am well and so are you",
    "two and two makes four",
    "no",
    "i see you and you see me",
]
LABELS = [True, False, True, True, False]

ROWS: dict[str, list[Record]] = {
    "demonstrations": [{"prompt": p, "completion": answered(c)} for p, c in zip(PROMPTS, CHOSEN, strict=True)],
    "labels": [
        {"prompt": p, "completion": answered(c if good else r), "label": good}
        for p, c, r, good in zip(PROMPTS, CHOSEN, REJECTED, LABELS, strict=True)
    ],
    "pairs": [
        {"prompt": p, "chosen": answered(c), "rejected": answered(r)}
        for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ],
    "alike": [  # every completion is of five tokens
        {"prompt": PROMPTS[0], "chosen": answered("the land ends here"), "rejected": answered("on land you see")},
        {"prompt": PROMPTS[2], "chosen": answered("five of them more"), "rejected": answered("four and no more")},
    ],
}
"""Records that both programs read as they are, of unequal lengths, with one turn and several."""


# --- models ----------------------------------------------------------------------------------------------------------

TEMPLATE = (  # nothing after the stop token: TRL learns that too, uft does not
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SPECIAL = ["<pad>", "</s>", "<unk>", "<system>", "<user>", "<assistant>"]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    turns = [turn["content"] for rows in ROWS.values() for row in rows for turn in _turns(row)]
    words = sorted({word for content in turns for word in content.split()})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE
    )


def _turns(record: Record) -> list[Record]:
    return [turn for value in record.values() if isinstance(value, list) for turn in value]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders with a random float32 Llama each, `policy` and `reference`; no prediction is near uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folders = {name: tmp_path_factory.mktemp("models") / name for name in ("policy", "reference")}
    for seed, folder in enumerate(folders.values()):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- what came out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A loss over all rows with its gradient in every weight; sums and multiples of losses are those of gradients."""

    loss: float
    gradients: Mapping[str, torch.Tensor]
    sequences: Sequences | None = None
    mismatched: Sequences | None = None
    records: Sequence[Record] = ()  # in the order in which they came
    terms: Mapping[str, float] = field(default_factory=dict)  # of uft, by name

    def __add__(self, other: Outcome) -> Outcome:
        assert self.gradients.keys() == other.gradients.keys()
        summed = {name: gradient + other.gradients[name] for name, gradient in self.gradients.items()}
        return Outcome(self.loss + other.loss, summed)

    def __rmul__(self, factor: float) -> Outcome:
        return Outcome(factor * self.loss, {name: factor * gradient for name, gradient in self.gradients.items()})

    def __sub__(self, other: Outcome) -> Outcome:
        return self + -1.0 * other


def gap(ours: Outcome, theirs: Outcome) -> tuple[float, float]:
    """(difference of the losses, largest difference in any weight's gradient per unit of the largest gradient)."""
    assert ours.gradients.keys() == theirs.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.gradients.values())
    apart = max(float((ours.gradients[n] - gradient).abs().max()) for n, gradient in theirs.gradients.items())
    return abs(ours.loss - theirs.loss), apart / largest


def assert_equal(ours: Outcome, theirs: Outcome) -> None:
    loss, gradient = gap(ours, theirs)
    assert loss < 1e-5 * max(1.0, abs(theirs.loss)), f"ours {ours.loss}, theirs {theirs.loss}"
    assert gradient < 1e-5, f"gradients differ by {gradient} of the largest"


# --- uft -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def same_generator() -> Iterator[None]:
    """Both programs seed torch's generator; no test may depend on which one ran before it."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def ours(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """ours("dpo", records, beta=0.3): one step of training on all of them at once, as `uft train` prepares it.

    The step is cut into micro-batches of two rows or so, which must not show.
    """
    monkeypatch.setenv("UFT_CACHE", str(tmp_path / "cache"))

    def run(objective: str, records: Sequence[Record], **keys: Any) -> Outcome:
        import yaml

        from uft.config.frozen import to_config
        from uft.config.messages import conf_dir
        from uft.runs import Run
        from uft.training.liveness import Stop
        from uft.training.setup import Work, choose_device, prepare

        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        preset = yaml.safe_load((Path(conf_dir()) / "objective" / f"{objective}.yaml").read_text(encoding="utf-8"))
        settings = {
            "objective": preset | keys,
            "data": {"name": "rows", "sources": {"rows": {"path": str(rows)}}, "holdout": 0},
            "model": {"name": "tiny", "path": str(models["policy"])},
            "optim": {"lr": 0.0},
            "reference": {"path": str(models["reference"])},
            "teacher": {"path": str(models["reference"])},
            "train": {"steps": 1, "batch_size": len(records), "micro_batch_tokens": 48, "max_grad_norm": 0},
            "hardware": {"device": "cpu"},
        }
        config = to_config(settings)
        trainer = prepare(Run(tmp_path / "run"), Work(config, choose_device(config.hardware), Stop())).trainer
        items = trainer.sampler.examples_of(trainer.sampler.preview(len(records)))
        trainer.hooks = [keep := Keep()]
        trainer.fit()
        return Outcome(
            float(keep.step.loss),
            {name: parameter.grad for name, parameter in trainer.parameters.items() if parameter.grad is not None},
            _sequences(items),
            _sequences(trainer.sampler.mismatched(items) if trainer.objective.needs.mismatched else ()),
            [records[item.row.index] for item in items],
            {name: float(term.total / term.count) for name, term in keep.step.terms.items()},
        )

    return run


class Keep:
    """A hook of the training loop that keeps what the step measured."""

    step: Any = None

    def __call__(self, trainer: Any, step: Any) -> None:
        self.step = step


def _sequences(items: Iterable[Any]) -> Sequences:
    return sorted((e.ids.tolist(), e.supervised.tolist()) for item in items for e in item.encoded)


# --- TRL -------------------------------------------------------------------------------------------------------------

PLAIN = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": None, "report_to": "none"}


def _trainers() -> dict[str, tuple[Any, Any]]:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return {
        "dpo": (DPOTrainer, DPOConfig),
        "kto": (KTOTrainer, KTOConfig),
        "sft": (SFTTrainer, SFTConfig),
        "cpo": (CPOTrainer, CPOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
    }


@pytest.fixture
def theirs(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """theirs("dpo", records, loss_type=["ipo"]): that trainer's own loss on its own batches of `batch`; their mean."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def run(trainer: str, records: Sequence[Record], batch: int = 64, **options: Any) -> Outcome:
        from datasets import Dataset
        from transformers import AutoTokenizer

        make_trainer, make_arguments = _trainers()[trainer]
        reference = {"ref_model": _load(models["reference"])} if trainer in ("dpo", "kto") else {}
        folder = {"output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": batch}
        made = make_trainer(
            model=_load(models["policy"]),
            args=make_arguments(**folder, **PLAIN, **options),
            train_dataset=Dataset.from_list(list(records)),
            processing_class=AutoTokenizer.from_pretrained(models["policy"]),
            **reference,
        )
        made.model.train()
        batches = list(made.get_train_dataloader())
        losses = [made.compute_loss(made.model, inputs) for inputs in batches]
        loss = torch.stack(losses).mean()
        loss.backward()
        return Outcome(
            float(loss.detach()),
            {name: parameter.grad for name, parameter in made.model.named_parameters()},
            sorted(s for inputs in batches for prefix in ("", "chosen_", "rejected_") for s in _read(inputs, prefix)),
            sorted(s for inputs in batches for s in _read(inputs, "KL_")),
        )

    return run


def _read(inputs: Mapping[str, torch.Tensor], prefix: str) -> Sequences:
    """The sequences of a collated batch without their padding."""
    if f"{prefix}input_ids" not in inputs:
        return []
    learned = inputs.get(f"{prefix}completion_mask")
    learned = inputs[f"{prefix}labels"] != -100 if learned is None else learned.bool()
    real = inputs[f"{prefix}attention_mask"].sum(1).tolist()
    lines = zip(inputs[f"{prefix}input_ids"].tolist(), learned.tolist(), real, strict=True)
    return [(ids[:length], mask[:length]) for ids, mask, length in lines]


# --- neither ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole_nll(models: dict[str, Path]) -> Callable[[Sequences], Outcome]:
    """whole_nll(sequences): -log p per token over prompts and completions, by the model's own logits."""

    def run(sequences: Sequences) -> Outcome:
        model = _load(models["policy"])
        lines = [torch.tensor(ids) for ids, _ in sequences]
        found = [torch.log_softmax(model(ids[None]).logits[0, :-1], -1) for ids in lines]
        every = torch.cat([one.gather(1, ids[1:, None])[:, 0] for one, ids in zip(found, lines, strict=True)])
        loss = -every.mean()
        loss.backward()
        return Outcome(float(loss.detach()), {n: p.grad for n, p in model.named_parameters()})

    return run


@pytest.fixture
def gkd(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequences, float], Outcome]:
    """gkd(sequences, beta): TRL's own loss of them under both models' own logits, by the number of learned tokens."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    def run(sequences: Sequences, beta: float) -> Outcome:
        policy, teacher = _load(models["policy"]), _load(models["reference"])
        loss, learned = torch.zeros(()), sum(sum(mask) for _, mask in sequences)
        for ids, mask in sequences:
            tokens = torch.tensor([ids])
            labels = torch.where(torch.tensor([mask]), tokens, -100)[:, 1:]
            ours, theirs = (model(tokens).logits[:, :-1] for model in (policy, teacher))
            loss = loss + GKDTrainer.generalized_jsd_loss(
                ours, theirs.detach(), labels, beta, num_items_in_batch=learned
            )
        loss.backward()
        return Outcome(float(loss.detach()), {n: p.grad for n, p in policy.named_parameters()})

    return run


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """With importlib imports, tests share code through fixtures."""
    return SimpleNamespace(ROWS=ROWS, gap=gap, assert_equal=assert_equal)
