"""The arms of the playground's study compose, and finished runs of them become a table."""

import importlib
import json
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from uft.config.compose import compose
from uft.config.frozen import to_config
from uft.config.messages import conf_dir, groups
from uft.errors import UftError

ROOT = Path(__file__).parents[2]
ARMS = {  # arm -> the objective and the mixture that it says it is
    "dft": ("dft", {"mix", "negatives"}),
    "dft2": ("dft2", {"mix", "negatives"}),
    "dpo": ("dpo", {"pairs"}),
    "dpo_sft": ("dpo", {"mix"}),
    "ift": ("ift", {"mix"}),
    "sft": ("sft", {"mix"}),
    "sft_alone": ("sft", {"instruct"}),
    "sft_sequence": ("sft", {"mix"}),
    "uft": ("uft", {"mix"}),
    "una": ("una", {"mix"}),
    "uft_alone": ("uft", {"instruct"}),
    "ift_alone": ("ift", {"instruct"}),
    "dft_alone": ("dft", {"negatives"}),
    "irft": ("irft", {"negatives"}),
    **{
        name: (name, {"mix"})
        for name in (
            *("dynamic_ft", "anchored_sft", "f_sft", "kto", "per_kind", "simpo", "cpo", "orpo", "asft"),
            *("cdpo", "robust_dpo", "hinge", "ipo", "rdpo_length", "ld_dpo", "dpop", "rpo", "nca"),
            *("gdpo_soft", "gipo_soft", "gropo_soft"),
        )
    },
}
SHIPPED = yaml.safe_load(groups([conf_dir()])["sweep"]["playground"].read_text())["hydra"]["sweeper"]["arms"]


@cache
def settings(arm):
    return to_config(compose(["sweep=playground", f"arm={arm}", *shlex.split(SHIPPED[arm])]))


def test_the_table_has_every_arm():
    assert set(SHIPPED) == set(ARMS)


@pytest.mark.parametrize(
    "arm", [pytest.param(arm, marks=pytest.mark.slow if n % 4 else ()) for n, arm in enumerate(ARMS)]
)
def test_a_row_is_the_arm_that_it_is_called(arm):
    cfg = settings(arm)
    objective, mixtures = ARMS[arm]
    assert cfg.objective["name"] == objective
    assert cfg.data.name in mixtures


@pytest.mark.slow
def test_arms_differ_in_what_the_search_was_over_and_in_nothing_else():
    """The same steps, rows per step, schedule, model and battery for all; a third of them is looked at."""
    shared = ("train", "eval", "model", "hardware")
    first, *others = map(settings, list(ARMS)[::3])
    assert all(getattr(cfg, group) == getattr(first, group) for cfg in others for group in shared)
    assert len({(cfg.optim.schedule, cfg.optim.warmup, cfg.optim.name) for cfg in (first, *others)}) == 1
    assert settings("sft").objective["reduction"] == "token"
    assert settings("sft_sequence").objective["reduction"] == "sequence"
    assert settings("una").data.ratio == 0, "it draws no demonstrations"


def test_an_experiment_of_before_is_refused_with_what_replaces_it():
    with pytest.raises(UftError) as refused:
        compose(["experiment=playground_uft"])
    assert "sweep=playground arm=uft" in str(refused.value.problems[0].advice)


FIGURES = ("eval/instruct/exact_match", "eval/pairs/exact_match", "eval/pairs/correct")
LIKELIHOODS = ("eval/instruct/nll", "eval/pairs/nll")


def fake_run(folder, values, status="finished", before=None):
    folder.mkdir(parents=True)
    names = (*FIGURES, *LIKELIHOODS)
    (folder / "config.yaml").write_text(f"seed: {folder.name[-1]}\n")
    (folder / "run.json").write_text("{}")
    result = {"status": status, "final": dict(zip(names, values, strict=True))}
    (folder / "result.json").write_text(json.dumps(result))
    if before:
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, **dict(zip(names, before, strict=True))}) + "\n")


@pytest.fixture
def table(monkeypatch, capsys):
    """table(word, ..., script=NAME) -> (what it ended with, stdout, stderr)."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run(*words, script="playground_table"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        try:
            importlib.import_module(script).main()
        except SystemExit as ended:
            return ended.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_that_differ_in_their_seed_are_one_row(tmp_path, table):
    fake_run(tmp_path / "ift-seed1", (0.8, 0.5, 0.9, 0.2, 1.0), before=(0.0, 0.1, 1.0, 8.0, 0.5))
    fake_run(tmp_path / "ift-seed2", (0.6, 0.5, 0.9, 0.4, 2.0))
    fake_run(tmp_path / "sft-seed1", (0.25, 0.5, 0.75, 1.0, 3.0))
    fake_run(tmp_path / "sft-seed2", (0.0, 0.0, 0.0, 0.0, 0.0), status="failed")
    code, out, err = table(tmp_path)
    assert code == 0, err
    head, _, *rows = out.splitlines()
    assert cells(head) == ["arm", "new", "style", "skill", "nll new", "nll chosen", "seeds"]
    assert [cells(row) for row in rows] == [
        ["base", "0.00", "0.10", "1.00", "8.00", "0.50", "1"],
        ["ift", "0.70 ± 0.14", "0.50 ± 0.00", "0.90 ± 0.00", "0.30 ± 0.14", "1.50 ± 0.71", "2"],
        ["sft", "0.25", "0.50", "0.75", "1.00", "3.00", "1"],
    ]
    assert "sft-seed2 (failed)" in err


def test_a_sweep_over_seeds_alone_is_called_by_its_name_and_an_empty_folder_an_error(tmp_path, table):
    for seed in (1, 2):
        fake_run(tmp_path / "mine" / f"seed{seed}", (0.5, 0.5, 0.5, 0.5, 0.5))
    (row,) = table(tmp_path / "mine")[1].splitlines()[2:]
    assert (cells(row)[0], cells(row)[-1]) == ("mine", "2")
    (tmp_path / "empty").mkdir()
    code, _, err = table(tmp_path / "empty")
    assert code != 0
    assert "no finished runs" in err


def test_the_best_trial_of_every_arm_of_the_search(tmp_path, table):
    for name, share in (("sft.token-lr0.001", 0.3), ("sft.token-lr0.003", 0.6), ("sft.sequence-lr0.001", 0.5)):
        fake_run(tmp_path / f"{name}-seed0", (share, share, share, 1.0, 1.0))
    code, out, err = table(tmp_path, "--search")
    assert code == 0, err
    [row] = out.splitlines()[2:]
    assert cells(row) == ["sft", "3", "token", "0.003", "0.60", "0.50"]


@pytest.fixture
def claims(tmp_path, table):
    """claims({arm: shares of its seeds}) -> claim -> (means, the difference, its verdict)."""

    def run(arms):
        for arm, shares in arms.items():
            for seed, share in enumerate(shares, 1):
                fake_run(tmp_path / f"{arm}-seed{seed}", (share, share, share, 1 - share, 1 - share))
        code, out, err = table(tmp_path, script="claims")
        assert code == 0, err
        found = [cells(row) for row in out.splitlines()[2:] if row.startswith("|")]
        return {row[0]: (row[3], row[4], row[5], row[7]) for row in found}

    return run


def test_a_claim_holds_or_not_by_more_than_the_noise_of_seeds(claims):
    found = claims({
        "uft_alone": (0.81, 0.83, 0.82), "sft_alone": (0.60, 0.61, 0.60),
        "ift_alone": (0.30, 0.32, 0.31), "sft_then_dpo": (0.58, 0.66, 0.60),
        "dynamic_ft": (0.20, 0.90, 0.50), "sft": (0.50, 0.50, 0.50),
        "rpo_pairs": (0.50, 0.51, 0.52), "dpo_weak": (0.20, 0.21, 0.21),
        "online_dpo": (0.70,), "dpo_150": (0.60,),
    })  # fmt: skip
    assert found["UFT on demonstrations alone beats SFT on them"][::3] == ("`uft_alone` 0.82", "**holds**")
    assert found["IFT beats SFT on the same rows"][3] == "does not hold"
    assert found["IFT on SFT's rows is as good as SFT, then DPO: new"][3] == "does not hold"
    assert found["Dynamic FT generalises better than SFT"][3] == "inside noise"
    fall = found["RPO slows the fall of the chosen likelihood"]
    assert fall == ("`rpo_pairs` 0.49", "`dpo_weak` 0.79", "+0.30 [+0.29, +0.32]", "**holds**")
    assert found["DPO on own samples beats DPO on the file's pairs"][2:] == ("+0.10", "one seed")
    assert found["PDS beats a random half"][3] == "not measured"


def test_a_seed_of_an_arm_counts_once(tmp_path, table):
    for folder in ("a", "b"):
        fake_run(tmp_path / folder / "sft-seed1", (0.5, 0.5, 0.5, 1.0, 1.0))
    code, out, err = table(tmp_path)
    assert cells(out.splitlines()[2])[-1] == "1"
    assert "another run of this arm has seed 1" in err
    code, out, err = table(tmp_path / "a", tmp_path / "b", script="claims")
    assert str(code).startswith("sft has seeds [1] in")


def test_as_good_as_means_within_five_points(claims):
    found = claims({"ift_alone": (0.59, 0.60, 0.61), "sft_then_dpo": (0.60, 0.60, 0.61)})
    assert found["IFT on SFT's rows is as good as SFT, then DPO: new"][3] == "**holds**"
