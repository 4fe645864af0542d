"""What each objective takes of each kind of row: the table of the design, row by row."""

from __future__ import annotations

import math

from toys import PRESETS, completion, preset, row_of, settings

from uft.data.rows import ANSWERED, Role
from uft.objectives.views import kind_table

LIKELIHOOD = ["sft", "ift", "dynamic_ft", "anchored_sft", "f_sft", "poft", "distill"]
PAIRS = [name for name in PRESETS if "sft_weight" in settings(name)]
SHOWN = completion("1")
ROWS = {
    "demonstration": [SHOWN],
    "preference": [completion("1", preferred=True), completion("2", preferred=False)],
    "good": [completion("1", label=True)],
    "bad": [completion("1", label=False)],
    "scored": [completion(str(i), score=score) for i, score in enumerate((0.3, 0.9, 0.5, 0.1))],
    "one score": [completion("1", score=0.9)],
    "equal scores": [completion("1", score=0.9), completion("2", score=0.9)],
    "negatives": [SHOWN, *(completion(str(i), sampled_by="m") for i in range(5))],
}
UP, DOWN = ("positive", None), ("negative", None)
PAIR, AGAINST_FIVE = {0: UP, 1: DOWN}, {0: UP, **dict.fromkeys(range(1, 6), DOWN)}


def taken(name, of, visit=0, **changes):
    """{completion: (role, target or None)} of a row of ROWS, or None where the run stops."""
    row = row_of(0, *ROWS[of])
    view = preset(name, **changes).views.get(row.kind)
    parts = view(row, visit) if view else None
    if parts is None:
        return None
    return {p.completion: (p.role.name.lower(), None if math.isnan(p.target) else p.target) for p in parts}


def rewards(*targets):
    return {i: ("positive" if target >= 0.5 else "negative", target) for i, target in enumerate(targets)}


TAKES = [
    (
        LIKELIHOOD,  # of a bad answer nothing, by its own rule: the run goes on
        {"demonstration": {0: UP}, "preference": {0: UP}, "good": {0: UP}, "bad": {}, "scored": {1: UP, 2: UP}}
        | {"negatives": {0: UP}},
    ),
    (
        ("uft", "una"),
        {"demonstration": rewards(1.0), "preference": PAIR, "good": rewards(1.0), "bad": rewards(0.0)}
        | {"scored": rewards(0.3, 0.9, 0.5, 0.1), "negatives": rewards(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)},
    ),
    (
        PAIRS,
        {"demonstration": None, "good": None, "one score": None, "equal scores": None}
        | {"preference": PAIR, "scored": {1: UP, 3: DOWN}, "negatives": AGAINST_FIVE},
    ),
    (
        ("kto",),
        {"demonstration": {0: UP}, "preference": PAIR, "good": {0: UP}, "bad": {0: DOWN}}
        | {"scored": {0: DOWN, 1: UP, 2: UP, 3: DOWN}, "negatives": AGAINST_FIVE},
    ),
    (
        ("dft", "dft2"),
        {"demonstration": {0: UP}, "preference": PAIR, "good": {0: UP}, "bad": {}, "scored": {1: UP, 2: UP}}
        | {"negatives": {0: UP, 1: DOWN, 2: DOWN}},
    ),
]
RL = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "lite"]
RL_SHOWN = ["uft_rl", "luffy", "chord_mu", "chord_phi", "hpt", "srft"]
TAKES += [
    (RL, dict.fromkeys(ROWS)),  # they learn from completions of their own: tests/objectives/test_policy_gradient.py
    (RL_SHOWN, TAKES[0][1]),
    (
        ("rwr",),
        {"demonstration": rewards(1.0), "preference": rewards(1.0, 0.0), "good": rewards(1.0), "bad": rewards(0.0)}
        | {"scored": rewards(0.3, 0.9, 0.5, 0.1), "negatives": rewards(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)},
    ),
]
TAKEN = {name: table for names, table in TAKES for name in names}
CHANGED = [
    *((name, "scored", {"min_score": 0.6}, {1: UP}) for name in LIKELIHOOD),
    *((name, "demonstration", {"demonstration_score": 0.8}, rewards(0.8)) for name in ("uft", "una")),
    *((name, "preference", {"pairs": "scores"}, rewards(1.0, 0.0)) for name in ("uft", "una")),
    *((name, "demonstration", {"sft_weight": 0.1}, {0: UP}) for name in PAIRS),
    *((name, "bad", {"sft_weight": 0.1}, None) for name in PAIRS),
    ("kto", "one score", {"min_score": 0.95}, {0: DOWN}),
    *((name, "negatives", {"negatives": 0}, {0: UP}) for name in ("dft", "dft2")),
    *((name, "negatives", {"negatives": 9}, AGAINST_FIVE) for name in ("dft", "dft2")),
    *((name, "preference", {"denominator": "sampling"}, None) for name in ("dft", "dft2")),
    ("per_kind", "scored", {"scored": settings("dpo")}, {1: UP, 3: DOWN}),
    ("per_kind", "demonstration", {"demonstration": None}, None),
]


def test_what_is_taken_of_every_kind_of_row():
    assert {*TAKEN, "per_kind"} == set(PRESETS)
    for name, table in TAKEN.items():
        assert {of: taken(name, of) for of in table} == table, name
    for name, of, changes, expected in CHANGED:
        assert taken(name, of, **changes) == expected, (name, of, changes)
    for of, name in {"demonstration": "sft", "preference": "dpo", "bad": "kto", "scored": "uft", "good": "kto"}.items():
        assert taken("per_kind", of) == TAKEN[name][of]
    assert taken("per_kind", "negatives", 1) == taken("dft", "negatives", 1)
    assert (Role.POSITIVE, Role.NEGATIVE) == (1, 0)


def test_dft_takes_fresh_negatives_at_every_visit():
    for name in ("dft", "dft2"):
        visits = [sorted(set(taken(name, "negatives", visit)) - {0}) for visit in range(4)]
        assert visits == [[1, 2], [3, 4], [1, 5], [2, 3]]


def test_the_printed_table_is_asked_of_the_views():
    header, *lines = kind_table({name: preset(name) for name in PRESETS})
    assert header == ["objective", *(kind.value for kind in ANSWERED)]
    assert [line[0] for line in lines] == PRESETS
    cells = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert cells["dpo"]["demonstration"] == "stops"
    assert cells["dpo"]["scored"] == "high score positive, low score negative"
    assert cells["dft"]["negatives"] == "shown positive, 2 of 4 sampled negative"
    assert cells["uft"]["negatives"] == "shown r=1, each sampled r=0"
    assert cells["sft"]["binary"] == "good positive"
    assert cells["kto"]["binary"] == "good positive, bad negative"
    assert cells["kto"]["scored"] == "high score positive, middling score positive, low score negative"
    parts = dict(zip(header[1:6], ("sft", "dpo", "kto", "uft", "dft"), strict=True))
    inside = {kind: cells[name][kind] for kind, name in parts.items()}
    assert cells["per_kind"] == {"objective": "per_kind", **inside, "rollout": "stops"}
    assert cells["luffy"]["rollout"] == "shown positive, own right r=1, own wrong r=0"
    named = kind_table({"mine": preset("dpo", sft_weight=1.0)})
    assert named[1][:2] == ["mine", "shown positive"]
