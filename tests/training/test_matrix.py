"""Every objective on disk x every data preset on disk x the playground's model: trained and resumed, or refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from uft.config.compose import compose
from uft.config.frozen import to_config
from uft.config.messages import conf_dir, groups
from uft.config.schema import Config, Lora, ReferenceModel, Rollout, Source, Teacher
from uft.data.rows import Kind
from uft.errors import UftError
from uft.objectives import make
from uft.playground.world import model_dir, records
from uft.runs import create_run
from uft.training import setup as preparing
from uft.training.setup import Prepared, TrainData, Work, prepare, read_train_data, resume
from uft.training.step import Step
from uft.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
from toys import apart, settings

GROUPS = groups([conf_dir()])
OBJECTIVES = list(GROUPS["objective"])
DATA = [name for name, file in GROUPS["data"].items() if "path: builtin:" in file.read_text()]  # the playground's
UNLIKE = list(apart(OBJECTIVES))[::2]
OTHERS = [name for name in DATA if name != "mix"]
SMALL = ("train.steps=2", "train.batch_size=8", "eval=none", "tracking=none", "hardware=cpu")
ROWS = 24


@cache
def short(data: str) -> Config:
    """The configuration under data=NAME, of whose sources the first rows alone are read."""
    content = compose((f"data={data}", *SMALL))
    sources = {
        name: {**source, "limit": ROWS, "checker": "playground"} for name, source in content["data"]["sources"].items()
    }
    return to_config({**content, "data": {**content["data"], "sources": sources}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs and the token cache lie. A corpus is a function of the data alone: each is read once, without the
    held-out rows, of which there is no evaluation here."""
    known: dict[str, TrainData] = {}

    def corpus_of(config: Config, tokenizer: Any) -> TrainData:
        key = json.dumps([config.data.name, {n: s.path for n, s in config.data.sources.items()}])
        known[key] = known.get(key) or replace(read_train_data(config, tokenizer), held_out=[])
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "read_train_data", corpus_of)
        yield tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def teacher(folder) -> Teacher:
    """The playground's model a little away from itself: from an equal teacher there is nothing to learn."""
    model = AutoModelForCausalLM.from_pretrained(model_dir())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    model.save_pretrained(folder / "teacher")
    return Teacher(str(folder / "teacher"))


@pytest.fixture
def configure(folder, teacher):
    """configure("dpo", "pairs", unusable="drop") -> a short `uft train objective=dpo data=pairs data.unusable=drop`."""

    def make_config(objective: str, data: str, **changes: Any) -> Config:
        config = short(data)
        changed = replace(config.data, cache=str(folder / "cache"), **changes)
        own: dict[str, Any] = {"teacher": teacher} if objective == "distill" else {}
        if make(settings(objective)).needs.rollouts:
            own = {"rollout": Rollout(completions=3, max_new_tokens=8, reward={"correct": 0.5, "plain": 0.5})}
        return replace(config, objective=settings(objective), data=changed, **own)

    return make_config


@pytest.fixture
def prepared(folder, tmp_path):
    def build(config: Config, run: str) -> Prepared:
        return prepare(create_run(tmp_path / run, "{}\n", []), Work(config))

    return build


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Saving:
    """A checkpoint after the first step; what was measured at every one."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.steps: list[Step] = []

    def __call__(self, trainer: Trainer, step: Step) -> None:
        self.steps.append(step)
        if trainer.progress.step == 1:
            self.folder = trainer.save_checkpoint()


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    weights = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    return weights | {f"state of {name}": values.clone() for name, values in trainer.objective.state.items()}


def train_and_resume(prepared: Callable[..., Prepared], config: Config, again: bool = True) -> None:
    """Two steps; then, if `again`, the second one again, by a fresh trainer from the checkpoint after the first."""
    trainer, saving = prepared(config, "run").trainer, Saving()
    before = state_of(trainer)
    trainer.hooks = (saving,)
    trainer.fit()
    after = state_of(trainer)
    assert trainer.progress.step == 2
    assert all(math.isfinite(float(step.loss)) and float(step.grad_norm) >= 0 for step in saving.steps)
    assert any(not torch.equal(after[name], before[name]) for name in trainer.parameters)
    if not again:
        return
    second = prepared(config, "again").trainer
    assert saving.folder is not None
    shutil.copytree(saving.folder, second.run.checkpoints_dir / saving.folder.name)
    assert resume(second) == 1
    second.fit()
    assert second.progress.step == 2
    for name, values in state_of(second).items():
        assert torch.equal(values, after[name]), name


def kinds_of(config: Config) -> set[Kind]:
    """What the sources that are drawn from hold, told by their names in the playground."""
    named = {
        "instruct": Kind.DEMONSTRATION,
        "chain": Kind.DEMONSTRATION,
        "pairs": Kind.PREFERENCE,
        "binary": Kind.BINARY,
        "scored": Kind.SCORED,
    }
    paths = [s.path.rpartition("/")[2] for s in config.data.sources.values() if s.share != 0]
    return {Kind.NEGATIVES if path == "negatives" else named[path] for path in paths}


@pytest.mark.parametrize("data", ["mix", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize(
    "objective", [pytest.param(name, marks=() if name in UNLIKE else pytest.mark.slow) for name in OBJECTIVES]
)
def test_it_trains_two_steps_and_resumes_or_stops_before_the_first(configure, prepared, objective, data):
    """On the mixture all train; those that are unlike each other resume (the fast ones), and on other data all do."""
    config, again = configure(objective, data), objective in UNLIKE or data != "mix"
    made, kinds = make(config.objective), kinds_of(config)
    unusable, lacking = kinds - made.views.keys(), {n for k in kinds & made.views.keys() for n in made.annotations(k)}
    if config.rollout.completions or (not unusable and not lacking):
        train_and_resume(prepared, config, again)
        return
    with pytest.raises(UftError) as refused:
        prepared(config, "refused")
    said = "\n".join(problem.why for problem in refused.value.problems)
    assert f"objective={objective} " in said
    assert all(f"cannot use {ROWS} {kind.value} rows" in said for kind in unusable)
    assert all(f"needs {name}, which " in said for name in lacking)
    some = unusable != kinds or all(kind is Kind.PROMPT for kind in unusable)
    assert ("data.unusable=drop" if some else "No other row is left") in refused.value.footer
    dropping = configure(objective, data, unusable="drop")
    if kinds == unusable or lacking:
        with pytest.raises(UftError, match=f"objective={objective} cannot use any"):
            prepared(dropping, "nothing left")
    else:
        train_and_resume(prepared, dropping, again)


def test_the_matrix_is_whole_and_has_both_ends():
    """Thirty objectives; DPO cannot use what SFT can, and a missing column stops PoFT everywhere."""
    assert len(OBJECTIVES) >= 30
    assert {"binary", "chain", "instruct", "mix", "negatives", "pairs", "scored"} == set(DATA)
    assert Kind.DEMONSTRATION not in make(settings("dpo")).views
    assert make(settings("poft")).annotations(Kind.BINARY) == {"baseline_logp"}


# --- what annotations make possible ----------------------------------------------------------------------------------

ANNOTATED = [name for name in OBJECTIVES if name == "poft" or name.endswith("_soft")]


@pytest.fixture(scope="module")
def written(folder):
    """The playground's rows with the numbers that `uft annotate` writes."""
    files = {}
    for kind in ("instruct", "pairs"):
        rows = list(records(kind, "train"))[:ROWS]
        for number, row in enumerate(rows):
            sides = 1 if kind == "instruct" else 2
            baseline = [-0.2 - 0.05 * (number % 7) - 0.3 * side for side in range(sides)]
            row["baseline_logp"] = baseline if sides > 1 else baseline[0]
            row |= {"soft_label": 0.55 + 0.06 * (number % 7)} if sides > 1 else {}
        files[kind] = folder / f"{kind}.jsonl"
        files[kind].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


@pytest.mark.parametrize("objective", ANNOTATED)
def test_with_their_annotations_they_train(configure, prepared, written, objective):
    names = ("instruct", "pairs") if objective == "poft" else ("pairs",)
    sources = {name: Source(str(written[name])) for name in names}
    train_and_resume(prepared, configure(objective, "pairs", sources=sources))


def test_labels_are_what_a_soft_objective_trains_on(configure, prepared, written):
    """The same pairs without the column are hard: another loss."""
    config = configure("gdpo_soft", "pairs", sources={"pairs": Source(str(written["pairs"]))})
    hard = configure("gdpo_soft", "pairs")
    items = [prepared(c, n).trainer.sampler.take(8) for c, n in ((config, "soft"), (hard, "hard"))]
    labels = [[i.row.completions[i.parts[0].completion].annotations.get("soft_label") for i in part] for part in items]
    assert None not in labels[0]
    assert set(labels[1]) == {None}


# --- where the reference comes from ----------------------------------------------------------------------------------


def test_a_reference_that_moves_is_part_of_the_checkpoint(configure, prepared):
    """It moves after the first step, which the checkpoint follows: the second step, taken again, rests on it."""
    config = replace(configure("dpo", "pairs"), reference=ReferenceModel(sync_every=1))
    train_and_resume(prepared, config)
    moved, stays = (
        prepared(replace(config, reference=r), f"{r.sync_every}") for r in (config.reference, ReferenceModel())
    )
    assert (moved.reference.mode, moved.reference.why) == ("copy", "it moves every 1 steps")
    curves = []
    for one in (moved, stays):
        one.trainer.hooks = (saving := Saving(),)
        one.trainer.fit()
        curves.append([float(step.loss) for step in saving.steps])
    assert curves[0][0] == curves[1][0]
    assert curves[0][1] != pytest.approx(curves[1][1], abs=1e-4)


@pytest.mark.parametrize("objective", ["kto", *(pytest.param(n, marks=pytest.mark.slow) for n in ("per_kind", "dpo"))])
def test_the_reference_is_the_same_wherever_its_log_probs_come_from(configure, prepared, objective):
    """KTO's mismatched completions are in no file: a cached reference has to have seen them too."""
    config = configure(objective, "mix" if objective != "dpo" else "pairs")
    losses = {}
    for mode in ("copy", "cached", "adapter_off"):
        model = replace(config.model, adapter="lora", lora=Lora(rank=4))
        settings = replace(config, model=model, reference=ReferenceModel(mode=mode))
        saving, made = Saving(), prepared(settings, mode)
        assert made.reference is not None
        assert made.reference.mode == mode
        made.trainer.hooks = (saving,)
        made.trainer.fit()
        losses[mode] = [float(step.loss) for step in saving.steps]
    assert losses["cached"] == pytest.approx(losses["copy"], rel=1e-5)
    assert losses["adapter_off"] == pytest.approx(losses["copy"], rel=1e-5)
    train_and_resume(prepared, replace(config, reference=ReferenceModel(mode="cached")))
