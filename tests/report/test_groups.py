"""What counts as one configuration, what it is called, and which keys are axes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from synthetic import loaded

from uft.config.frozen import FREE
from uft.report.groups import differences, grouping, rank


def names(found):
    return [group.name for group in found.groups]


def keys(found):
    return [axis.key for axis in found.axes]


def test_runs_that_differ_in_their_seed_are_one_configuration():
    found = grouping([loaded("uft", seed) for seed in (1, 2, 3)])
    assert [group.runs for group in found.groups] == [(0, 1, 2)]
    assert (names(found), keys(found), dict(found.seeds)) == (["uft"], [], {0: 1, 1: 2, 2: 3})
    following = [loaded("uft", seed, select__seed=seed) for seed in (1, 2)]
    assert "select.seed" not in {key for key, _ in differences(following, ())}
    given = [loaded("uft", seed, select__seed=3 * seed) for seed in (1, 2)]
    assert "select.seed" in {key for key, _ in differences(given, ())}


def test_keys_that_change_no_result_do_not_split():
    """Among them every key that may change within a run."""
    changes = {(key.rstrip(".") + (".x" if key.endswith(".") else "")).replace(".", "__"): "other" for key in FREE}
    changes |= {"data__cache": "/somewhere", "eval__samples": 0, "eval__best": "eval/kl"}
    found = grouping([loaded("uft", 1), loaded("uft", 2, **changes)])
    assert (len(found.groups), found.varying) == (1, ())


def test_a_grid_has_its_swept_keys_as_axes_and_readable_names():
    grid = product(("uft", "dpo"), (0.1, 0.01), (0.75, 0.5), (1, 2))
    runs = [loaded(o, seed, objective__beta=beta, data__ratio=ratio) for o, beta, ratio, seed in grid]
    found = grouping(runs)
    assert keys(found) == ["objective.name", "objective.beta", "data.ratio"]
    assert [axis.values for axis in found.axes] == [["dpo", "uft"], [0.01, 0.1], [0.5, 0.75]]
    assert [axis.numeric for axis in found.axes] == [False, True, True]
    assert names(found)[:3] == ["dpo beta=0.01 ratio=0.5", "dpo beta=0.01 ratio=0.75", "dpo beta=0.1 ratio=0.5"]
    assert {len(group.runs) for group in found.groups} == {2}


def test_what_an_objective_settles_is_no_axis():
    found = grouping([loaded("sft"), loaded("uft"), loaded("ift", objective__lam=0.2)])
    assert keys(found) == ["objective.name"]
    assert {"objective.beta", "objective.lam"} <= set(found.varying)
    assert names(found) == ["ift", "sft", "uft"]


def test_a_key_that_only_some_objectives_have():
    found = grouping([loaded("sft"), loaded("uft", objective__beta=0.1), loaded("uft", objective__beta=0.3)])
    assert names(found) == ["sft", "uft beta=0.1", "uft beta=0.3"]
    assert found.groups[0].config == {"objective.name": "sft"}


def test_a_swept_experiment_is_an_axis_though_no_key_holds_it():
    runs = []
    for name, objective, rate in (("a", "sft", 0.1), ("b", "dpo", 0.2), ("c", "dpo", 0.3)):
        for seed in (1, 2):
            words = (f"experiment=playground_{name}", f"seed={seed}")
            runs.append(loaded(objective, seed, optim__lr=rate, overrides=words))
    found = grouping(runs)
    assert keys(found) == ["experiment"]
    assert names(found) == ["playground_a", "playground_b", "playground_c"]
    assert [group.objective for group in found.groups] == ["sft", "dpo", "dpo"]


def test_a_choice_that_changes_no_result_and_a_copy_of_a_key_are_no_axes():
    runs = [loaded("uft", seed, overrides=("tracking=none" if seed == 1 else "tracking=wandb",)) for seed in (1, 2)]
    assert keys(grouping(runs)) == []
    runs = [loaded("uft", model__lr=rate, optim__lr=rate, overrides=(f"model.lr={rate}",)) for rate in (0.1, 0.2)]
    assert keys(grouping(runs)) == ["model.lr"]


def test_short_names_that_would_clash_are_written_in_full():
    runs = [loaded("uft", model__lora={"rank": a}, reference__lora={"rank": b}) for a, b in ((1, 1), (1, 2), (2, 1))]
    assert names(grouping(runs))[0] == "model.lora.rank=1 reference.lora.rank=1"


def test_values_of_every_type_make_a_name():
    values = [None, True, 1, 0.5, "text", [1, 2], ["a"]]
    found = grouping([loaded("uft", train__odd=value, overrides=(f"train.odd={value}",)) for value in values])
    assert set(names(found)) == {f"odd={v}" for v in ("null", "true", "1", "0.5", "text", "[1,2]", "[a]")}
    assert found.axes[0].values == [0.5, 1, True, ["a"], [1, 2], "text"]
    assert not found.axes[0].numeric
    assert len(grouping([loaded("uft", train__odd=True), loaded("uft", train__odd=1)]).groups) == 2
    assert len(grouping([loaded("uft", train__odd=1.0), loaded("uft", train__odd=1)]).groups) == 1
    assert sorted(["b", 10, 2.5, None, "a", True], key=rank) == [None, 2.5, 10, True, "a", "b"]


def test_long_and_hostile_values_are_cut_and_names_stay_apart():
    found = grouping([loaded("uft", data__name="x" * 3000 + end) for end in ("a", "b")])
    assert all(len(name) < 200 for name in names(found))
    assert len(set(names(found))) == 2


def test_seeds_that_differ_from_each_other_are_all_told():
    run = loaded("uft", 1, seeds__data=7)
    assert grouping([run]).seeds == {0: "init=1 data=7 sampling=1"}


def test_other_seed_keys_make_the_usual_ones_axes():
    runs = [loaded("uft", seed, train__fold=fold) for seed, fold in product((1, 2), (1, 2, 3))]
    found = grouping(runs, ["train.fold"])
    assert keys(found) == ["seed"]
    assert [len(group.runs) for group in found.groups] == [3, 3]
    assert set(found.seeds.values()) == {1, 2, 3}


def test_a_run_without_a_configuration_has_no_group():
    found = grouping([replace(loaded("uft"), config={}), loaded("uft")])
    assert [group.runs for group in found.groups] == [(1,)]
    assert grouping([replace(loaded("uft"), config={})]).groups == []
    assert grouping([]).groups == []


def without(run, *gone):
    return replace(run, config={key: value for key, value in run.config.items() if key not in gone})


def test_keys_that_an_older_version_lacks_count_as_their_default():
    """`data.exhaustion` is of the schema, `objective.tau` of an objective whose other runs agree on it."""
    new = loaded("uft", 2, data__exhaustion="repeat", objective__tau=0.5)
    old = without(loaded("uft", 1), "objective.tau")
    assert len(grouping([old, new]).groups) == 1
    assert len(grouping([old, loaded("uft", 2, data__exhaustion="all")]).groups) == 2
    other = loaded("uft", 3, objective__tau=0.7)
    assert len(grouping([old, new, other]).groups) == 3, "where they do not agree, the default is unknown"


def test_a_source_that_is_not_there_has_no_defaults():
    one, two = (loaded("uft", data__sources={name: {"path": f"{name}.jsonl"}}) for name in ("a", "b"))
    assert len(grouping([one, two]).groups) == 2
    newer = loaded("uft", 2, data__sources={"a": {"path": "a.jsonl", "split": "train"}})
    assert len(grouping([one, newer]).groups) == 1


def test_a_run_of_stages_has_the_objectives_of_all_that_train():
    stages = {
        "warm": {"do": "fit", "reference": "start", "config": {"objective": {"name": "sft"}, "seeds": {"init": 1}}},
        "draw": {"do": "generate", "config": {"objective": {"name": "none"}}},
        "prefer": {"do": "fit", "reference": "start", "config": {"tracking": {"mode": "online"}}},
    }
    runs = [loaded("dpo", seed, stages=stages) for seed in (1, 2)]
    runs[1].config["stages.warm.config.seeds.init"] = 2
    runs[1].config["stages.prefer.config.tracking.mode"] = "offline"
    found = grouping([*runs, loaded("dpo"), loaded("sft")])
    assert names(found) == ["dpo", "sft", "sft+dpo"]
    assert [group.objective for group in found.groups] == ["dpo", "sft", "sft+dpo"]
    assert [len(group.runs) for group in found.groups] == [1, 1, 2]
    longer = loaded("dpo", stages={**stages, "warm": {**stages["warm"], "config": {"train": {"steps": 9}}}})
    assert len(grouping([runs[0], longer]).groups) == 2


def test_how_nothing_is_sampled_has_no_effect():
    def sampling(objective, completions, longest, seed=1):
        keys = {"rollout__completions": completions, "rollout__max_new_tokens": longest}
        return loaded(objective, seed, **keys, overrides=())

    runs = [sampling("dpo", 0, 128), sampling("dpo", 0, 64, 2), sampling("dpo", 4, 12), sampling("grpo", 8, 12)]
    found = grouping(runs)
    assert names(found) == ["dpo completions=0", "dpo completions=4", "grpo completions=8"]
    assert found.groups[0].runs == (0, 1)


def test_what_a_stage_works_by_tells_configurations_apart():
    """Keys of a verb change nothing of a run, unless one of its stages does what the verb does."""
    stages = {"stages__pick__do": "select", "stages__fit__do": "fit"}
    runs = [
        loaded("sft", seed, stages__pick__config__select={"by": by, "seed": seed}, **stages)
        for by in ("pds", "random")
        for seed in (1, 2)
    ]
    assert [(group.name, len(group.runs)) for group in grouping(runs).groups] == [("by=pds", 2), ("by=random", 2)]
    for shared, groups in ((stages, 2), ({}, 1)):
        runs = [loaded("sft", 1, select__rows=count, **shared) for count in (5, 6)]
        assert len(grouping(runs).groups) == groups


def test_settings_of_an_arm_are_no_axes_and_what_is_swept_beside_it_is():
    runs = [
        loaded(name, seed, optim__lr=rate, objective__beta=beta, overrides=words)
        for name, rate in (("dpo", 0.1), ("uft", 0.2))
        for beta in (0.01, 0.3)
        for seed in (1, 2)
        for words in [
            (f"objective={name}", f"optim.lr={rate}", f"arm={name}", f"objective.beta={beta}", f"seed={seed}")
        ]
    ]
    assert names(grouping(runs[:2] + runs[4:6])) == ["dpo", "uft"]
    assert names(grouping(runs)) == [f"{name} beta={beta}" for name in ("dpo", "uft") for beta in (0.01, 0.3)]
