"""Runs of rounds: what `rounds: N` makes of the stages of a request, and what is refused."""

from functools import cache

import pytest
import yaml

from uft.config.compose import examine
from uft.config.files import Request
from uft.config.frozen import to_yaml, typed
from uft.config.stages import completed, stages_of

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


@pytest.fixture(autouse=True, scope="module")
def experiments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "conf-user" / "experiment").mkdir(parents=True)
    (folder / "conf-user" / "experiment" / "loop.yaml").write_text(LOOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield
    examined.cache_clear()


@cache
def examined(*overrides):
    return examine(Request(("experiment=loop", *overrides)))


def stages(*overrides):
    found = examined(*overrides)
    assert found.problems == []
    assert completed(found.settings) == found.settings, "what is frozen is read back as it is"
    return {stage.name: stage for stage in stages_of(typed(yaml.safe_load(to_yaml(found.settings))))}


def sources(stage):
    return {name: (source.path, source.share) for name, source in stage.config.data.sources.items()}


def test_the_stages_of_every_round_follow_each_other():
    found = stages()
    assert list(found) == [f"{name}-{number}" for number in (1, 2, 3) for name in ("sample", "pick", "fit")]
    assert found["pick-2"].folder == "stages/5-pick-2"
    assert [found[f"sample-{n}"].config.data.sources["instruct"].part for n in (1, 2, 3)] == ["1/3", "2/3", "3/3"]
    assert [found[f"fit-{n}"].config.optim.lr for n in (1, 2, 3)] == [4e-3, 2e-3, 2e-3], "the last one goes on"
    assert {found[f"fit-{n}"].config.train.steps for n in (1, 2, 3)} == {7}


def test_names_of_rows_mean_those_of_the_round():
    found = stages()
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
    found = stages("rounds=1")
    assert list(found) == ["sample", "pick", "fit"]
    assert found["sample"].config.data.sources["instruct"].part == "1/1"
    assert sources(found["fit"]) == {"own": ("stage:sample", None), "picked": ("stage:pick", 3.0)}
    assert found["fit"].config.optim.lr == 4e-3


def test_keys_are_typed_for_all_rounds_and_for_each():
    found = stages("rounds=2", "stages.fit.by_round.optim.lr=[0.5,0.25]", "stages.fit.set.train.steps=2", "seed=3")
    assert [found[f"fit-{n}"].config.optim.lr for n in (1, 2)] == [0.5, 0.25]
    assert {stage.config.seed for stage in found.values()} == {3}
    assert {found[f"fit-{n}"].config.train.steps for n in (1, 2)} == {2}
    origins = examined("rounds=2", "stages.fit.by_round.optim.lr=[0.5,0.25]", "stages.fit.set.train.steps=2", "seed=3")
    assert origins.origins["stages.fit-2.config.optim.lr"] == "command line"
    assert origins.origins["stages.fit-1.config.data.sources.own.path"] == "conf-user/experiment/loop.yaml:20"


def test_what_only_rounds_have_is_refused_without_them():
    wrong = {problem.what: problem for problem in examined("rounds=null").problems}
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
    found = [(problem.what, problem.why) for problem in examined(*mistakes).problems]
    assert len(found) == len(set(found)) == len(mistakes)
    for text in mistakes.values():
        assert sum(why.startswith(text) for _, why in found) == 1, text
    unsaid = examined("stages.pick.set.select.by=null", "stages.sample.set.generate.score=true", "rounds=2")
    assert [(problem.what, problem.why) for problem in unsaid.problems] == [
        ("stages.pick", "how rows are chosen is not said")
    ], "the source of sample has a checker"


def test_one_round_of_irft_is_generate_and_fit():
    plain = "stages.sample.set.data.sources.instruct.part=null"
    one, without = (examine(Request(("experiment=irft", plain, rounds))) for rounds in ("rounds=1", "rounds=null"))
    assert one.problems == without.problems == []
    assert {**one.settings, "rounds": None} == without.settings
    assert list(one.settings["stages"]) == ["sample", "fit"]
