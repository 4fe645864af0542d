"""Runs of several stages, and of rounds: what each stage's configuration comes to, what is refused, and how two of
them differ."""

from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import yaml

from uft.config.compose import change, examine, footer
from uft.config.files import Request
from uft.config.frozen import may_change, to_builtins, to_config, to_yaml
from uft.config.stages import completed, differences, expanded, stages_of

TWO = """\
# @package _global_
# two stages
train:
  batch_size: 8
  steps: 7
objective:
  label_smoothing: 0.1
stages:
  sft:
    objective: sft
    data: instruct
    set:
      optim.lr: 2.0e-3
      objective.reduction: sequence
  dpo:
    objective: dpo
    data: pairs
    set:
      train: {steps: 5}
      optim.lr: ${model.lr}
      objective.beta: 0.3
"""
MADE = """\
# @package _global_
# rows that a stage makes
stages:
  gen:
    do: generate
    data: instruct
  dft:
    objective: dft
    data: files
    set:
      data.sources.sampled.path: stage:gen
"""
LOOP = """\
# @package _global_
# sample, choose, train
rounds: 3
stages:
  sample:
    do: generate
    data: instruct
    set: {data.sources.instruct.part: round, generate.temperature: 1.0}
  pick:
    do: select
    data: files
    set: {data.sources.own.path: stage:sample, select.by: random, select.past: stage:pick@before}
  fit:
    objective: dpo
    data: files
    by_round:
      optim.lr: [4.0e-3, 2.0e-3]
    set:
      data.sources:
        own: {path: stage:sample}
        before: {path: stage:sample@before, share: 0.5}
        picked: {path: stage:pick@all, share: 3.0}
      train.steps: 7
"""


DOCUMENTED = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text(encoding="utf-8")
EXPERIMENTS = {
    "two": TWO,
    "made": MADE,
    "loop": LOOP,
    "free": "# @package _global_\n# x\nstages:\n  a:\n    data: instruct\n  b:\n    objective: dpo\n",
    "odd": "# @package _global_\n# x\nstages:\n  sft:\n  dpo: 3\n  more:\n    set: [1]\n    data: [a]\n",
    "list": "# @package _global_\n# x\nstages: [a, b]\n",
    "bad": TWO.replace("train: {steps: 5}", "train.stepps: 5").replace("data: instruct", "data: instrukt"),
    "lacking": TWO.replace("label_smoothing", "smoothing"),
    "documented": DOCUMENTED.partition("```yaml\n")[2].partition("```")[0],
}


@pytest.fixture(autouse=True, scope="module")
def experiments(tmp_path_factory):
    """All at once: what is composed of them is kept until a file changes."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "conf-user" / "experiment").mkdir(parents=True)
    for name, text in EXPERIMENTS.items():
        (folder / "conf-user" / "experiment" / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield
    examined.cache_clear()


@cache
def examined(*overrides):
    """Composing takes half a second: what several tests ask for is composed once."""
    return examine(Request(overrides))


def settings(*overrides):
    found = examined(*overrides)
    assert found.problems == []
    return found.settings


def stages(*overrides):
    """The stages' typed configurations by name, as a worker reads them from the frozen file."""
    return {stage.name: stage.config for stage in stages_of(to_config(yaml.safe_load(to_yaml(settings(*overrides)))))}


def problems(*overrides):
    """By what was written: (why, where, advice as one text)."""
    return {p.what: (p.why, p.where, "\n".join(p.advice)) for p in examined(*overrides).problems}


def test_every_stage_has_its_objective_its_data_and_its_keys():
    found = stages("experiment=two")
    sft, dpo = found["sft"], found["dpo"]
    assert list(found) == ["sft", "dpo"]
    assert (sft.objective["name"], sft.data.name, sft.train.steps, sft.optim.lr) == ("sft", "instruct", 7, 2e-3)
    assert (dpo.objective["name"], dpo.data.name, dpo.train.steps, dpo.optim.lr) == ("dpo", "pairs", 5, 1e-3)
    assert sft.objective["reduction"] == "sequence"
    assert dpo.objective["beta"] == 0.3
    assert dpo.objective["label_smoothing"] == 0.1  # set for all stages: for those that have it
    assert sft.train.batch_size == dpo.train.batch_size == 8


def test_the_frozen_form_says_of_a_stage_where_it_differs_from_its_run():
    found = settings("experiment=two")
    assert (found["objective"]["name"], found["data"]["name"]) == ("dpo", "pairs")  # the last fit stage's
    assert set(found["stages"]["sft"]["config"]) == {"objective", "data", "optim"}
    assert set(found["stages"]["dpo"]["config"]) == {"train"}
    assert {key: value for key, value in found["stages"]["dpo"].items() if key != "config"} == {
        "do": "fit",
        "reference": "start",
    }
    assert to_builtins(asdict(to_config(found))) == found == completed(found)
    alone = settings("objective=dpo")
    assert "stages" not in alone, "a run of one piece says nothing of stages"
    assert [(s.name, s.do, s.folder) for s in stages_of(to_config(alone))] == [("", "fit", ".")]
    assert expanded(alone) == {}


def test_what_wins_over_what():
    typed_ones = ("optim.lr=0.5", "stages.dpo.set={optim.lr: 0.25}", "stages.dpo.set.train.steps=3")
    found = stages("experiment=two", *typed_ones)
    assert (found["sft"].optim.lr, found["dpo"].optim.lr) == (0.5, 0.25)
    assert (found["sft"].train.steps, found["dpo"].train.steps) == (7, 3)
    # a file that comes after the experiment, and one that comes before it
    fast = stages("experiment=two", "debug=fast", "optim=sgd")
    assert (fast["sft"].train.steps, fast["dpo"].train.steps) == (2, 2)
    assert (fast["sft"].optim.name, fast["sft"].optim.lr, fast["dpo"].optim.lr) == ("sgd", 2e-3, 1e-3)


def test_a_key_counts_for_every_stage_that_has_it():
    keys = ("objective.beta=0.05", "objective.min_score=0.7", "objective.reduction=token")
    sources = ("data.sources.pairs.limit=3", "+data.sources.more.path=x.jsonl", "~data.sources.binary")
    found = stages("experiment=two", *keys, *sources, "stages.dpo.data=mix")
    assert found["dpo"].objective["beta"] == 0.05
    assert "beta" not in found["sft"].objective
    assert found["sft"].objective["min_score"] == 0.7
    assert found["sft"].objective["reduction"] == found["dpo"].objective["reduction"] == "token"
    assert [config.data.sources["pairs"].limit for config in found.values()] == [3, 3]
    assert all("more" in config.data.sources for config in found.values())
    assert "scored" in found["dpo"].data.sources
    assert "binary" not in found["dpo"].data.sources


def test_a_key_that_no_stage_has_is_refused_with_the_keys_of_each():
    wrong = problems("experiment=two", "objective.bta=1", "data.sources.pears.limit=3", "train.stps=1")
    why, where, advice = wrong["objective.bta=1"]
    assert (why, where) == ("no such key in any stage", "command line")
    assert "did you mean  objective.beta ?" in advice
    assert "sft (objective=sft): reduction" in advice
    assert "dpo (objective=dpo): reduction, beta" in advice
    why, _, advice = wrong["data.sources.pears.limit=3"]
    assert why == "no such key in any stage"
    assert "did you mean  data.sources.pairs.limit ?" in advice
    assert wrong["train.stps=1"][0] == "no such key in train"
    assert "objective={bta: 1, gma: 2}" in problems("experiment=two", "objective={bta: 1, gma: 2}")


def test_a_choice_for_all_stages_is_refused_where_each_has_its_own():
    found = problems("experiment=two", "objective=kto", "data=mix")
    for choice, (why, _, advice) in found.items():
        assert "of its own" in why
        assert f"stages.sft.{choice}   or  stages.dpo.{choice}" in advice
    assert set(found) == {"objective=kto", "data=mix"}


def test_a_choice_counts_for_the_stages_without_one():
    found = stages("experiment=free", "objective=sft", "data=pairs")
    assert [(c.objective["name"], c.data.name) for c in found.values()] == [("sft", "instruct"), ("dpo", "pairs")]


WRONG = {
    "stages.dp.data=mix": ("no such stage", "did you mean  stages.dpo ?"),
    "stages.dpo.objektive=kto": ("no such key in stages.dpo", "did you mean  stages.dpo.objective ?"),
    "stages.sft.objective=sftt": ("no such file in conf/objective", "did you mean  stages.sft.objective=sft ?"),
    "stages.dpo.data=pears": ("no such file in conf/data", "did you mean  stages.dpo.data=pairs ?"),
    "stages.sft.do=fitt": ("no such choice", "did you mean  stages.sft.do=fit ?"),
    "stages.dpo.set={objective.bt: 1}": ("no such key in objective=dpo", "did you mean  objective.beta ?"),
    "stages.dpo.set.train.epochs=many": ("must be a number", ""),
    "stages.dpo.set.hardware.device=cpu": ("hardware is the same in all stages", ""),
    "stages.dpo.set.model.path=other": ("a stage starts from the model that the stage before it left", ""),
    "+stages.ask.do=annotate": ("which column to write is not said", "annotate.column: baseline_logp"),
    "+stages.more={do: generate, data: pairs, reference: initial}": ("has no meaning where do=generate", ""),
    "stages.sft.set=3": ("must be a group of keys", ""),
    "stages.sft.set.objective=kto": ("is chosen by the stage", "beside set, not in it:  objective: kto"),
    "+stages._x.objective=sft": ("names a folder: letters, digits, - and _, a letter first", ""),
}
"""Each wrong in its own way, whatever else is."""


def test_mistakes_are_found_together():
    found = problems("experiment=two", *WRONG)
    for override, (why, advice) in WRONG.items():
        what = {
            "+stages.ask.do=annotate": "stages.ask",
            "+stages.more={do: generate, data: pairs, reference: initial}": "stages.more.reference=initial",
            "+stages._x.objective=sft": "stages._x",
        }
        assert found[what.get(override, override)][0] == why, override
        assert advice in found[what.get(override, override)][2]
    assert len(found) == len(WRONG)


def test_stages_that_are_none():
    assert {what: why for what, (why, _, _) in problems("experiment=odd").items()} == {
        "stages.dpo=3": "must be a group of keys",
        "stages.more.set": "must be a group of keys",
        "stages.more.data=[a]": "must be text or null",
    }
    assert list(problems("experiment=list")) == ["stages=[a,b]"]


def test_every_mistake_at_once_and_once():
    request = ("experiment=bad", "train.batch_size=0", "objective=kto", "seed=3")
    found = problems(*request)
    assert set(found) == {
        "stages.sft.data=instrukt",
        "stages.dpo.set.train.stepps",
        "train.batch_size=0",
        "objective=kto",
    }
    assert found["stages.dpo.set.train.stepps"][1] == "conf-user/experiment/bad.yaml:19"
    assert found["stages.sft.data=instrukt"][1] == "conf-user/experiment/bad.yaml:11"
    assert footer(examined(*request)).endswith("uft config experiment=bad seed=3")
    ((why, _, advice),) = problems("experiment=two", "optim.warmup=6").values()
    assert why == "leaves no step after the warm-up: train.steps=5"
    assert "in stage dpo" in advice, "a rule that one stage breaks names it"


def test_a_key_for_all_stages_in_a_file_that_none_has():
    why, where, advice = problems("experiment=lacking")["objective.smoothing"]
    assert (why, where) == ("no such key in any stage", "conf-user/experiment/lacking.yaml:7")
    assert "did you mean  objective.label_smoothing ?" in advice


def test_rows_that_an_earlier_stage_makes():
    assert stages("experiment=made")["dft"].data.sources["sampled"].path == "stage:gen"
    sources = {
        "sampled": {"path": "stage:gem"},
        "own": {"path": "stage:dft"},
        "held": {"path": "stage:gen", "holdout": 0.1},
        "late": {"path": "stage:last"},
    }
    data = ", ".join(
        f"{name}: {yaml.safe_dump(node, default_flow_style=True).strip()}" for name, node in sources.items()
    )
    last = "+stages.last={data: files, set: {data: {sources: {trained: {path: stage:dft}}}}}"
    found = problems("experiment=made", f"stages.dft.set={{data: {{sources: {{{data}}}}}}}", last)
    key = "data.sources"
    why, _, advice = found[f"{key}.sampled.path=stage:gem"]
    assert why == "no such stage before this one"
    assert "did you mean  stage:gen ?" in advice
    for what in (f"{key}.own.path=stage:dft", f"{key}.late.path=stage:last"):
        assert found[what][0] == "no such stage before this one"
    assert found[f"{key}.trained.path=stage:dft"][0] == "stage dft trains and leaves no rows"
    assert found[f"{key}.held.holdout"][0].startswith("what stage:gen holds out is measured")


def test_a_stage_can_be_added_and_taken_away():
    more = stages("experiment=two", "+stages.more={objective: ift, data: mix, set: {train.steps: 2}}", "~stages.sft")
    assert list(more) == ["dpo", "more"]
    assert more["more"].train.steps == 2
    assert problems("experiment=two", "stages.sft.do=generate", "stages.dpo.do=generate")["stages"][0] == (
        "none of them trains anything"
    )


def test_the_reference_is_named_once():
    assert settings("experiment=two", "stages.dpo.reference=initial")["stages"]["dpo"]["reference"] == "initial"
    both = problems("experiment=two", "stages.dpo.reference=initial", "reference.path=some/model")
    assert "stages.dpo.reference=initial" in both


def test_origins_name_the_place_of_every_value():
    origins = examined("experiment=two", "optim.lr=0.5", "stages.dpo.set.objective.beta=1").origins
    assert origins["objective.beta"] == "command line"
    assert origins["stages.sft.config.optim.lr"] == "command line"
    assert origins["stages.sft.config.objective.reduction"] == "conf-user/experiment/two.yaml:14"
    assert origins["stages.sft.objective"] == "conf-user/experiment/two.yaml:10"


def test_differences_are_told_once_and_by_stage():
    old = settings("experiment=two")
    assert differences(old, deepcopy(old)) == []
    seeded = deepcopy(old) | {"seed": 3}  # the stages say nothing of seeds: they have the run's
    assert differences(old, seeded) == [("seed", 0, 3)]
    new = deepcopy(old)
    new["stages"]["sft"]["config"]["optim"]["lr"] = 1.0
    new["stages"]["dpo"]["reference"] = "initial"
    assert differences(old, new) == [
        ("stages.sft.optim.lr", 2e-3, 1.0),
        ("stages.dpo.reference", "start", "initial"),
    ]
    del new["stages"]["sft"]
    assert differences(old, new)[0] == ("stages", ["sft", "dpo"], ["dpo"])
    assert ("stages.sft.do", "fit", "(absent)") in differences(old, new)
    swapped = old | {"stages": dict(reversed(old["stages"].items()))}
    assert differences(old, swapped) == [("stages", ["sft", "dpo"], ["dpo", "sft"])]


def test_what_a_stage_works_by_is_not_free():
    old = settings("experiment=made")
    new = deepcopy(old)
    new["generate"]["temperature"] = 0.25  # of all stages: one of them generates
    assert differences(old, new) == [
        ("generate.temperature", 0.7, 0.25),
        ("stages.gen.generate.temperature", 0.7, 0.25),
    ]
    assert may_change("generate.temperature")
    assert not may_change("stages.gen.generate.temperature")


def test_what_may_change_between_sittings_may_in_every_stage():
    assert may_change("stages.sft.train.log_every")
    assert not may_change("stages.sft.optim.lr")
    old = settings("experiment=two")
    new = to_builtins(change(old, ["train.log_every=3", "tracking.mode=offline"]))
    assert {key for key, _, _ in differences(old, new)} == {"train.log_every", "tracking.mode"}
    assert expanded(new)["dpo"]["train"]["log_every"] == 3
    assert expanded(new)["dpo"]["train"]["steps"] == 5
    assert to_builtins(change(old, [])) == old
    assert {key for key, _, _ in differences(old, to_builtins(change(old, ["optim.lr=0.5"])))} == {
        "optim.lr",
        "stages.sft.optim.lr",
    }


def test_the_example_of_the_documentation():
    found = stages("experiment=documented")
    assert list(found) == ["sft", "sample", "dft"]
    assert found["sample"].generate.seeds == [0, 1]
    assert (found["dft"].train.steps, found["dft"].objective["name"]) == (164, "dft")


# --- rounds: what `rounds: N` makes of the stages of a request, and what is refused


def looped(*overrides):
    return examined("experiment=loop", *overrides)


def rounds_of(*overrides):
    found = looped(*overrides)
    assert found.problems == []
    assert completed(found.settings) == found.settings, "what is frozen is read back as it is"
    return {stage.name: stage for stage in stages_of(to_config(yaml.safe_load(to_yaml(found.settings))))}


def sources(stage):
    return {name: (source.path, source.share) for name, source in stage.config.data.sources.items()}


def test_the_stages_of_every_round_follow_each_other():
    found = rounds_of()
    assert list(found) == [f"{name}-{number}" for number in (1, 2, 3) for name in ("sample", "pick", "fit")]
    assert found["pick-2"].folder == "stages/5-pick-2"
    assert [found[f"sample-{n}"].config.data.sources["instruct"].part for n in (1, 2, 3)] == ["1/3", "2/3", "3/3"]
    assert [found[f"fit-{n}"].config.optim.lr for n in (1, 2, 3)] == [4e-3, 2e-3, 2e-3], "the last one goes on"
    assert {found[f"fit-{n}"].config.train.steps for n in (1, 2, 3)} == {7}


def test_names_of_rows_mean_those_of_the_round():
    found = rounds_of()
    own, first = ("stage:sample-1", None), ("stage:pick-1", 3.0)
    assert sources(found["fit-1"]) == {"own": own, "picked-1": first}, "the first round has none before it"
    assert sources(found["fit-3"]) == {
        "own": ("stage:sample-3", None),
        "before": ("stage:sample-2", 0.5),
        "picked-1": ("stage:pick-1", 1.0),
        "picked-2": ("stage:pick-2", 1.0),
        "picked-3": ("stage:pick-3", 1.0),
    }
    assert [found[f"pick-{n}"].config.select.past for n in (1, 2, 3)] == [None, "stage:pick-1", "stage:pick-2"]


def test_one_round_is_the_plain_list():
    found = rounds_of("rounds=1")
    assert list(found) == ["sample", "pick", "fit"]
    assert found["sample"].config.data.sources["instruct"].part == "1/1"
    assert sources(found["fit"]) == {"own": ("stage:sample", None), "picked": ("stage:pick", 3.0)}
    assert found["fit"].config.optim.lr == 4e-3


def test_keys_are_typed_for_all_rounds_and_for_each():
    found = rounds_of("rounds=2", "stages.fit.by_round.optim.lr=[0.5,0.25]", "stages.fit.set.train.steps=2", "seed=3")
    assert [found[f"fit-{n}"].config.optim.lr for n in (1, 2)] == [0.5, 0.25]
    assert {stage.config.seed for stage in found.values()} == {3}
    assert {found[f"fit-{n}"].config.train.steps for n in (1, 2)} == {2}
    origins = looped("rounds=2", "stages.fit.by_round.optim.lr=[0.5,0.25]", "stages.fit.set.train.steps=2", "seed=3")
    assert origins.origins["stages.fit-2.config.optim.lr"] == "command line"
    assert origins.origins["stages.fit-1.config.data.sources.own.path"] == "conf-user/experiment/loop.yaml:20"


def test_what_only_rounds_have_is_refused_without_them():
    wrong = {problem.what: problem for problem in looped("rounds=null").problems}
    assert set(wrong) == {
        "data.sources.instruct.part=round",
        "stages.fit.by_round.optim.lr",
        "data.sources.before.path=stage:sample@before",
        "data.sources.picked.path=stage:pick@all",
        "select.past=stage:pick@before",
    }
    assert all(problem.where.startswith("conf-user/experiment/loop.yaml:") for problem in wrong.values())
    assert wrong["stages.fit.by_round.optim.lr"].advice == ("rounds=3",)
    (alone,) = examine(Request(("objective=sft", "rounds=2"))).problems
    assert (alone.what, alone.why) == ("rounds=2", "repeats stages, and this run has none")


def test_a_mistake_of_every_round_is_told_once():
    mistakes = {
        "stages.fit.by_round={train.batch_size: 3}": "must be a list",
        "stages.fit.set.objective.bta=1": "no such key in objective=dpo",
        "stages.sample.set.rounds=2": "rounds is the same in all stages",
        "stages.pick.set.data.sources.own.path=stage:sampel": "no such stage before this one",
        "data.sources.instruct.part=4/3": "must be r/n",
    }
    found = [(problem.what, problem.why) for problem in looped(*mistakes).problems]
    assert len(found) == len(set(found)) == len(mistakes)
    for text in mistakes.values():
        assert sum(why.startswith(text) for _, why in found) == 1, text
    unsaid = looped("stages.pick.set.select.by=null", "stages.sample.set.generate.score=true", "rounds=2")
    assert [(problem.what, problem.why) for problem in unsaid.problems] == [
        ("stages.pick", "how rows are chosen is not said")
    ], "the source of sample has a checker"


def test_one_round_of_irft_is_generate_and_fit():
    plain = "stages.sample.set.data.sources.instruct.part=null"
    one, without = (examine(Request(("experiment=irft", plain, rounds))) for rounds in ("rounds=1", "rounds=null"))
    assert one.problems == without.problems == []
    assert {**one.settings, "rounds": None} == without.settings
    assert list(one.settings["stages"]) == ["sample", "fit"]
