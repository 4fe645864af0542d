"""The YAML files of conf/objective: keys of the dataclass, within its rules, with the values of the papers."""

from __future__ import annotations

import typing
from dataclasses import fields

from pydantic import TypeAdapter
from toys import PRESETS, settings

from uft.config.parameters import parameters
from uft.data.rows import Kind
from uft.objectives import OBJECTIVES, make


def schema(method):
    return {f.name: f for f in fields(OBJECTIVES[method]) if not f.metadata.get("internal")}


NAMES = """
    sft ift uft una dft dft2 dynamic_ft anchored_sft f_sft poft asft gdpo_soft gipo_soft gropo_soft rpo dpop dpo cdpo
    robust_dpo hinge ipo simpo cpo orpo nca rdpo_length ld_dpo kto irft spin per_kind apo_zero apo_down sppo_hard
    exo_pair bco_pair discopop wpo distill aot aot_unpaired
"""


def test_the_names_of_the_design_are_there():
    assert set(PRESETS) >= set(NAMES.split())


def test_every_method_has_a_file_and_every_file_a_method():
    assert {settings(name)["method"] for name in PRESETS} == OBJECTIVES.keys()


def test_keys_are_fields_of_the_dataclass():
    """A file names the keys its method has; the class may know more of them, which then do nothing."""
    for name in PRESETS:
        values = settings(name)
        fields_of = schema(values["method"])
        assert values["name"] == name
        assert values.keys() <= fields_of.keys()
        assert name == "per_kind" or values.keys() >= {"name", "method", "reduction"}
        silent = {key: found.default for key, found in fields_of.items() if key not in values}
        assert make({**values, **silent}) == make(values)


def test_values_are_of_their_type_within_their_rules_and_agree():
    for name in PRESETS:
        values = settings(name)
        TypeAdapter(parameters()[values["method"]]).validate_python(values)
        objective = make(values)
        assert objective.problems() == [], name
        assert objective.length_convention, name


def test_every_key_has_help_and_a_plain_type():
    for method, cls in OBJECTIVES.items():
        hints = typing.get_type_hints(cls)
        parts = {kind.value for kind in Kind} if method == "per_kind" else set()
        for key, found in schema(method).items():
            assert found.metadata.get("help"), key
            plain = (float, int, bool, str, float | None, int | None, dict[str, float], dict[str, float] | None)
            assert hints[key] in plain or (key in parts and hints[key] is typing.Any), key


PAPERS = [
    ("ift", {"lam": 0.2, "lam_start": None, "lam_noise": 0.0, "gamma": 0.95, "propagation": "normalized"}),
    ("ift", {"detach_weights": False, "embed_grad": False, "reduction": "sequence"}),
    ("uft", {"beta": 0.01, "loss": "mse", "pairs": "pairwise", "demonstration_score": 1.0}),
    ("una", {"beta": 0.01, "loss": "mse", "pairs": "pairwise", "length_normalize": False, "method": "uft"}),
    ("dft", {"tau": 1.0, "gamma": 0.85, "negatives": 2, "length_normalize": False, "denominator": "plain"}),
    ("dft2", {"tau": 0.3, "gamma": 0.9, "negatives": 2, "length_normalize": True, "method": "dft"}),
    ("dpo", {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "method": "pairwise"}),
    ("sft", {"reduction": "token"}),
    ("dynamic_ft", {"reduction": "token", "weight": "probability"}),
    ("anchored_sft", {"reduction": "token", "weight": "probability", "alpha": 0.05}),
    ("f_sft", {"f": "pearson", "beta": 0.1, "ratio": "sum"}),
    ("poft", {"beta": 1.0, "gamma": 0.0}),
    ("asft", {"beta": 1.0, "lam": 1.0, "alpha": 1.0}),
    ("gdpo_soft", {"beta": 0.1, "soft": True}),
    ("gipo_soft", {"form": "scaled", "soft": True}),
    ("gropo_soft", {"beta": 0.1, "alpha": 2.0, "soft": True}),
    ("rpo", {"beta": 0.01, "eta": 0.005, "nll_norm": "sum"}),
    ("dpop", {"beta": 0.3, "lam": 50.0}),
    ("cdpo", {"label_smoothing": 0.1}),
    ("robust_dpo", {"label_smoothing": 0.1, "beta": 0.1}),
    ("ipo", {"tau": 0.1, "length": "sum"}),
    ("simpo", {"beta": 2.0, "gamma": 1.0}),
    ("cpo", {"beta": 0.1, "alpha": 1.0}),
    ("orpo", {"lam": 0.1, "alpha": 1.0}),
    ("nca", {"beta": 0.01}),
    ("rdpo_length", {"alpha": 0.05}),
    ("ld_dpo", {"alpha": 0.5}),
    ("kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    ("irft", {"beta": 0.1, "link": "sigmoid"}),
    ("apo_zero", {"beta": 0.1}),
    ("apo_down", {"beta": 0.1}),
    ("sppo_hard", {"beta": 0.001}),
    ("exo_pair", {"beta": 0.1, "label_smoothing": 0.001}),
    ("bco_pair", {"beta": 0.01}),
    ("discopop", {"beta": 0.05, "temperature": 0.05}),
    ("wpo", {"beta": 0.01, "wpo": True}),
    ("aot", {"beta": 0.1, "matching": "margins"}),
    ("aot_unpaired", {"beta": 0.1, "matching": "sides"}),
    ("distill", {"reduction": "token", "beta": 0.5}),
    ("spin", {"beta": 0.1, "link": "sigmoid"}),
]


def test_defaults_are_the_papers():
    for name, values in PAPERS:
        found = settings(name)
        assert {key: found[key] for key in values} == values, name
    for name in ("sft", "ift", "uft", "dft", "dpo", "f_sft", "poft", "kto"):
        values = settings(name)
        assert make(values) == make({"name": name, "method": values["method"]}), "and those of the class"


def test_problems_name_keys():
    wrong = {
        "dft": (
            {"reduction": "token", "length_normalize": True, "denominator": "sampling"},
            ["reduction", "denominator"],
        ),
        "uft": (
            {"reduction": "token", "kind_weights": {"demos": 1.0, "scored": -1.0}},
            ["reduction", "kind_weights", "kind_weights"],
        ),
        "ift": ({"lam": 0.2, "lam_start": 0.3}, ["lam_start"]),
        "robust_dpo": ({"label_smoothing": 0.5}, ["label_smoothing"]),
        **{name: ({"reduction": "token"}, ["reduction"]) for name in ("f_sft", "poft", "kto")},
    }
    for name, (changes, keys) in wrong.items():
        assert [key for key, _ in make(settings(name, **changes)).problems()] == keys, name
    for name, changes in (("ift", {"lam_start": 0.1}), ("cdpo", {"label_smoothing": 0.5})):
        assert make(settings(name, **changes)).problems() == []
    assert make(settings("uft", kind_weights={"scored": 0.5})).problems() == []


def test_needs():
    needs = {name: make(settings(name)).needs for name in NAMES.split()}
    without = "sft ift dft2 dynamic_ft poft asft simpo cpo orpo"
    assert {n for n, need in needs.items() if not need.reference} == set(without.split())
    assert {n for n, need in needs.items() if need.distributions} == {"anchored_sft", "distill"}
    assert {n for n, need in needs.items() if need.teacher} == {"distill"}
    assert {n for n, need in needs.items() if need.mismatched} == {"kto", "per_kind"}
    assert {n for n, need in needs.items() if need.annotations} == {"poft"}
    assert not any(need.columns for need in needs.values())
