"""The shipped mixtures of the playground, as `data=NAME` gives them."""

from functools import cache

import pytest

from uft.config.compose import compose
from uft.config.schema import data_settings
from uft.data.mixture import mixture_weights, portion
from uft.data.sources import load_sources
from uft.playground import world

DRAWN = {
    "mix": {"instruct": 0.5, "pairs": 0.25, "binary": 0.125, "scored": 0.125},
    "negatives": {"instruct": 0.5, "pairs": 0.25, "binary": 0.125, "scored": 0.125},
    "instruct": {"instruct": 1.0},
    "pairs": {"pairs": 1.0},
    "binary": {"binary": 1.0},
    "scored": {"scored": 1.0},
}


@cache
def load(name, *overrides):
    data = data_settings(compose([f"data={name}", *overrides])["data"])
    loaded = load_sources(data)
    portions = [portion(source.name, source.rows, data.sources[source.name].share) for source in loaded]
    weights = mixture_weights(portions, data.ratio)
    return loaded, dict(zip([source.name for source in loaded], weights, strict=True))


@pytest.mark.slow
def test_what_is_drawn_and_what_is_measured():
    for name, drawn in DRAWN.items():
        loaded, weights = load(name)
        assert {source: weight for source, weight in weights.items() if weight} == drawn
        measured = {source.name for source in loaded if source.held_out and source.checker == "playground"}
        assert "instruct" in measured, "what is learned of the new tasks"
        assert measured & {"pairs", "binary", "scored"}, "what is kept of the old ones"
        assert all(row.answer for source in loaded for row in source.held_out)
    for name in ("mix", "negatives"):
        _, weights = load(name, "data.ratio=0.8")
        assert weights == pytest.approx({"instruct": 0.8, "pairs": 0.1, "binary": 0.05, "scored": 0.05})


@pytest.mark.slow
def test_negatives_stand_beside_the_very_demonstrations_of_the_mix():
    mix, negatives = ({source.name: source for source in load(name)[0]} for name in ("mix", "negatives"))
    for with_negatives, alone in zip(negatives["instruct"].rows, mix["instruct"].rows, strict=True):
        assert with_negatives.prompt == alone.prompt
        assert with_negatives.completions[0] == alone.completions[0]
        assert [one.sampled_by for one in with_negatives.completions[1:]] == ["rule"] * 3


def test_the_completions_of_a_scored_prompt_are_one_row():
    (scored,) = (source for source in load("scored")[0] if source.name == "scored")
    assert len(scored.rows) == world.SOURCES["scored"].size
    assert {len(row.completions) for row in scored.rows} == {2, 3}
