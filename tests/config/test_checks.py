"""Ranges, choices and rules between keys."""

from uft.config.compose import examine
from uft.config.files import Request


def complaints(*overrides):
    examined = examine(Request(overrides))
    return {p.what.partition("=")[0]: p.why for p in examined.problems}


TOGETHER = {  # values that do not touch each other's rules
    "data.ratio=1.5": "must be at most 1",
    "train.batch_size=0": "must be at least 1",
    "optim.eps=0": "must be above 0",
    "optim.momentum=1": "must be below 1",
    "optim.weight_decay=nan": "must be at least 0",
    "model.dtype=fp16": "no such choice",
    "data.sources.pairs.kind=preferences": "no such choice",
    "objective.lam_start=0.9": "the ramp goes up: lam_start=0.9 is above lam=0.2",
    "objective.gamma=1.1": "must be at most 1",
    "train.epochs=7": "does nothing beside train.steps=200",
    "optim.warmup=200": "leaves no step after the warm-up: train.steps=200",
    "optim.betas=[0.9]": "must be two numbers, at least 0 and below 1",
    "reference.mode=adapter_off": "needs an adapter to switch off",
    "data.holdout=1.5": "must be a share below 1 or a whole number of rows",
    "data.sources.pairs.score_range=[1,0]": "must be [lowest, highest]",
    "generate.seeds=[1,1]": "must be different seeds, at least one",
    "run.name=a/b": "names a folder",
    "eval.tasks=[{task: gsm8k, shotz: 1}]": "must be a list, like [NAME] or [{key: value}]",
}


def test_every_rule_speaks_at_once():
    assert complaints("train.steps=200", *TOGETHER) == {line.partition("=")[0]: why for line, why in TOGETHER.items()}


ALONE = {  # words, and the one complaint about them
    ("optim.warmup=2.5",): ("optim.warmup", "must be a share below 1 or a whole number of steps"),
    ("model.adapter=lora", "model.lora.targets=[]"): ("model.lora.targets", "names no layer to adapt"),
    ("data=files",): ("data.sources", "the mixture has no sources"),
    ("data=files", "+data.sources.a={path: x.jsonl, kind: demonstration}", "data.ratio=0.5"): (
        "data.ratio",
        "shares between demonstrations and the rest, and the mixture has demonstrations only",
    ),
    ("data.sources.pairs.holdout=5", "data.sources.pairs.eval_path=x.jsonl"): (
        "data.sources.pairs.eval_path",
        "and holdout both say which rows are for evaluation: give one",
    ),
    ("objective=distill",): ("teacher.path", "names the model to learn from, and is not given"),
    ("reference.sync_every=5", "model.adapter=lora"): (
        "reference.sync_every",
        "moves the weights of a whole copy, and an adapter trains none of those",
    ),
    ("reference.sync_every=5", "reference.mode=cached"): (
        "reference.mode",
        "keeps the log-probs of a reference that stays",
    ),
    ("experiment=online_dpo", "rollout.truncated=mask"): (
        "rollout.truncated",
        "leaves one side of a pair empty, and objective=dpo learns from pairs",
    ),
    ("objective=rwr", "rollout.completions=1", "rollout.refill=1", "train.steps=5"): (
        "rollout.refill",
        "replaces groups of equal scores, as every group of one is",
    ),
    ("reference.sync_every=5", "hardware.sharding=full"): (
        "reference.sync_every",
        "needs whole weights on every device",
    ),
    ("seed=x",): ("seed", "must be a whole number"),  # and not the seeds that refer to it
    ("optim.lr=inf",): ("optim.lr", "must be a finite number"),
    ("objective=dpo", "objective.beta=1e400"): ("objective.beta", "must be a finite number"),
    ("data=null",): ("data", "no such file in conf/data"),
    ("train.steps =3",): ("train.steps ", "has a space beside ="),
}
SILENT = [
    ("reward=null", "debug=null", "experiment=null", "sweep=null"),  # as conf/config.yaml has them
    ("train.epochs=7", "train.steps=null", "optim.warmup=300", "optim.lr=0", "data.ratio=0"),
    ("optim.warmup=199", "model.adapter=lora", "reference.mode=adapter_off", "data.ratio=1", "data.holdout=12"),
    ("objective=distill", "teacher.path=some/model"),
    ("objective=dpo", "reference.sync_every=5", "reference.sync_mix=1", "reference.path=org/other"),
    ("optim.warmup=0", "data.sources.pairs.share=0", "data.sources.pairs.kind=null", "run.name=a-b_c.d"),
]


def test_each_rule_speaks_and_is_silent_where_all_is_well():
    for overrides, (key, why) in ALONE.items():
        assert complaints(*overrides) == {key: why}
    for overrides in SILENT:
        assert complaints(*overrides) == {}


def test_adapter_off_is_the_initial_policy_and_no_other():
    found = complaints("model.adapter=lora", "reference.mode=adapter_off", "reference.path=org/other")
    assert list(found) == ["reference.path"]


def test_one_complaint_per_key():
    problems = examine(Request(("optim.betas=[0.9]", "data.ratio=7", "data.holdout=-1.5"))).problems
    assert len(problems) == len({problem.what.partition("=")[0] for problem in problems}) == 3
