"""How much is drawn of the data, what makes two runs draw the same, and rows that an objective cannot use."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from uft.config.schema import Config, Source
from uft.data.rows import Completion, Kind, Message, Row, Selected
from uft.errors import UftError
from uft.model.load import load_tokenizer
from uft.objectives import make
from uft.objectives.base import Needs, Objective
from uft.training.dataset import (
    Horizon,
    StageData,
    TrainData,
    counted_as_certain,
    lacks,
    make_horizon,
    make_sampler,
    read_train_data,
    without_reply,
)

Read = Callable[..., tuple[Config, TrainData]]
EPOCHS = ("train.steps=null", "train.batch_size=7", "train.epochs=1")


@pytest.fixture
def corpus(configure):
    def read(*settings: str, objective: str = "uft", **options: object) -> tuple[Config, TrainData]:
        config = configure(objective, *settings, **options)
        return config, read_train_data(config, load_tokenizer(config.model))

    return read


def drawn(config: Config, found: TrainData, horizon: Horizon) -> Counter[str]:
    """How often each row is drawn in the whole run, batch by batch as the trainer takes them."""
    sampler = make_sampler(config, found, make(config.objective))
    rows: list[str] = []
    while len(rows) < horizon.total_rows:
        count = min(config.train.batch_size, horizon.total_rows - len(rows))
        items = sampler.take(count)
        assert len(items) == count
        rows += [item.row.id for item in items]
    return Counter(rows)


# --- the horizon


def test_passes_show_every_row_equally_often_with_a_short_last_batch(corpus):
    for epochs, rows, steps in ((1, 60, 9), (2, 120, 18), (0.5, 30, 5), (0.001, 1, 1)):  # 60 = 8 x 7 + 4
        config, found = corpus(*EPOCHS, f"train.epochs={epochs}")
        horizon = make_horizon(config, found)
        assert horizon == Horizon(60, rows, steps)
        if epochs >= 1:
            counts = drawn(config, found, horizon)
            assert (len(counts), set(counts.values())) == (60, {epochs})
    config, found = corpus("train.steps=11", "train.batch_size=7", "train.epochs=0.1")
    assert make_horizon(config, found) == Horizon(60, 77, 11), "steps are whole batches whatever the epochs"


SHARES = ("data.sources.demonstration.share=3", "data.sources.preference.share=1")


@pytest.mark.parametrize(
    ("exhaustion", "rows", "least", "most"),
    [("first", 16, 0, 1), ("repeat", 24, 0, 2), ("all", 48, 1, 3)],
)
def test_what_one_epoch_is_when_shares_do_not_fit_the_sizes(corpus, files, exhaustion, rows, least, most):
    two = {name: files[name] for name in ("demonstration", "preference")}
    config, found = corpus(*EPOCHS, *SHARES, f"data.exhaustion={exhaustion}", sources=two)
    horizon = make_horizon(config, found)
    assert horizon.total_rows == horizon.epoch_rows == rows
    counts = drawn(config, found, horizon)
    every = [counts[row.id] for source in found.train for row in source.rows]
    assert (min(every), max(every)) == (least, most)


def test_first_ends_the_run_before_anything_is_shown_twice(corpus, files):
    two = {name: files[name] for name in ("demonstration", "preference")}
    config, found = corpus("train.steps=100", "train.batch_size=7", *SHARES, "data.exhaustion=first", sources=two)
    assert make_horizon(config, found) == Horizon(16, 16, 3)


# --- the digest


def test_the_digest_is_of_what_decides_the_rows_and_their_order(corpus, files):
    def digest(*settings: str, **options: object) -> str:
        return corpus(*settings, **options)[1].digest

    plain = digest()
    same = [
        digest(objective="sft"),
        digest("optim.lr=0.3", "train.steps=99", "train.micro_batch_tokens=64"),
        digest("seeds.init=5", "seeds.sampling=6"),
        digest("eval.rows=1"),
    ]
    assert same == [plain] * len(same)
    others = [
        digest("seeds.data=1"),
        digest("train.batch_size=9"),
        digest("data.ratio=0.5"),
        digest("data.holdout=0.2"),
        digest("data.sources.scored.limit=3"),
        digest("data.template=plain"),
        digest(sources={name: files[name] for name in ("demonstration", "binary")}),
    ]
    assert len({plain, *others}) == len(others) + 1


def test_the_digest_does_not_know_where_files_lie(corpus, files, tmp_path):
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text(files["binary"].read_text())
    there, here = ({"one": path} for path in (files["binary"], moved))
    assert corpus(sources=there)[1].digest == corpus(sources=here)[1].digest


# --- held-out rows


def test_a_held_out_row_that_is_too_long_is_cut_and_a_training_row_refused(corpus, tmp_path):
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    short.write_text('{"prompt": "w3", "completion": "w4"}\n')
    long.write_text('{"prompt": "w3 w4", "completion": "' + "w5 " * 20 + '"}\n')
    config, found = corpus(
        *("train.max_length=12", f"data.sources.mine.eval_path={long}"), objective="sft", sources={"mine": short}
    )
    assert [encoded.length for row in found.held_out[0].encoded for encoded in row] == [12]
    with pytest.raises(UftError, match="long"):
        read_train_data(
            replace(
                config,
                data=replace(config.data, sources={"mine": replace(config.data.sources["mine"], path=str(long))}),
            ),
            load_tokenizer(config.model),
        )


# --- rows an objective cannot use


def test_unusable_rows_stop_the_request_with_the_objectives_own_words(corpus, files):
    two = {name: files[name] for name in ("demonstration", "binary", "preference")}
    config, found = corpus(objective="dpo", sources=two)
    with pytest.raises(UftError) as error:
        make_sampler(config, found, make(config.objective))
    assert [problem.what for problem in error.value.problems] == ["data.sources.binary", "data.sources.demonstration"]
    assert "12 binary rows" in error.value.problems[0].why
    assert "data.unusable=drop" in error.value.footer
    make_sampler(config, found, make(config.objective), refuse=False)
    dropping = replace(config, data=replace(config.data, unusable="drop"))
    sampler = make_sampler(dropping, found, make(config.objective))
    assert {item.row.source for item in sampler.take(36)} == {"preference"}


# --- numbers that an objective needs beside completions


@pytest.fixture
def half(tmp_path):
    """Six rows, of which the even ones have a baseline."""
    rows = [
        {"prompt": f"w{n + 3}", "completion": "w4", "baseline_logp": -1.0 if n % 2 == 0 else None} for n in range(6)
    ]
    path = tmp_path / "half.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path):
    """Three pairs: all numbers, the chosen one's alone, the rejected one's alone."""
    path = tmp_path / "pairs.jsonl"
    base = {"prompt": "w3", "chosen": "w4", "rejected": "w5"}
    columns = ([-1.0, -2.0], [-1.0, None], [None, -2.0])
    path.write_text("".join(json.dumps({**base, "baseline_logp": both}) + "\n" for both in columns))
    return path


def test_a_run_stops_and_says_how_to_write_them(configure, half, pairs):
    config = configure("poft", sources={"half": half, "pairs": pairs})
    config.data.sources["half"].columns = {"baseline_logp": "baseline_logp"}
    dataset = read_train_data(config, load_tokenizer(config.model))
    with pytest.raises(UftError) as error:
        make_sampler(config, dataset, make(config.objective))
    first, second = error.value.problems
    assert (first.what, first.where) == ("data.sources.half", "half:1")
    assert first.why == "objective=poft needs baseline_logp, which 3 of 6 rows lack"
    assert second.why == "objective=poft needs baseline_logp, which 1 of 3 rows lack"  # it takes the chosen one alone
    assert second.where == "pairs:2"
    command = f"uft annotate baseline_logp data={half} +data.sources.half.columns."
    assert command in error.value.footer
    assert f" data={pairs}" in error.value.footer
    assert "annotate.models=[MODEL,...]" in error.value.footer
    assert "data.unusable=drop" in error.value.footer


def test_or_leaves_them_out_and_counts_them(corpus, half):
    config, dataset = corpus("data.unusable=drop", sources={"half": half}, objective="poft")
    sampler = make_sampler(config, dataset, make(config.objective))
    assert {item.row.index for item in sampler.take(6)} == {0, 2, 4}
    record = StageData.of(config, dataset).record
    assert record["sources"]["half"]["dropped_unusable"] == 3
    config.data.unusable = "error"
    looked = make_sampler(config, dataset, make(config.objective), refuse=False)
    assert looked.unusable() == {"half": {Kind.DEMONSTRATION: (3, "half:1")}}


def test_log_probs_of_an_earlier_version_are_not_taken_for_those_of_the_sampler(corpus, tmp_path):
    """It wrote them at temperature 1 and without filters, whatever the samples were drawn with."""
    line = {"prompt": "w3", "response": "w4", "negatives": ["w5"], "negative_log_probs": [-1.5]}
    drawn = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "seeds": [0]}
    right = {"log_probs": "as sampled"}
    for name, settings in (("old", drawn), ("flat", drawn | {"temperature": 1.0}), ("new", drawn | right)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(line | {'sampling': settings})}\n" * 3)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("old", "flat", "new")}
    for unusable in ("error", "drop"):
        words = (f"data.unusable={unusable}", "objective.denominator=sampling")
        config, dataset = corpus(*words, sources=files, objective="dft")
        with pytest.raises(UftError) as error:
            make_sampler(config, dataset, make(config.objective))
        assert [problem.what for problem in error.value.problems] == ["data.sources.old"]
        assert "3 rows have those at temperature 1" in error.value.problems[0].why
    config, dataset = corpus(sources=files, objective="dft")
    assert make_sampler(config, dataset, make(config.objective)).takes_anything()


def test_nothing_left_is_no_run(corpus, files):
    config, dataset = corpus("data.unusable=drop", sources={"mine": files["demonstration"]}, objective="poft")
    with pytest.raises(UftError, match="cannot use any of the 12 rows"):
        make_sampler(config, dataset, make(config.objective))


def test_rows_of_which_nothing_is_taken_are_no_run_either(corpus, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "w3", "completion": "w4", "label": false}\n' * 3)
    config, dataset = corpus(sources={"bad": bad}, objective="sft")
    with pytest.raises(UftError, match="learns from none of the 3 rows"):
        make_sampler(config, dataset, make(config.objective))


def test_pairs_without_a_soft_label_are_told(corpus, tmp_path):
    path = tmp_path / "soft.jsonl"
    base = {"prompt": "w3", "chosen": "w4", "rejected": "w5"}
    path.write_text("".join(json.dumps(row) + "\n" for row in ({**base, "soft_label": 0.8}, base, base)))
    said = {}
    for name in ("gdpo_soft", "dpo"):
        config, dataset = corpus(objective=name, sources={"soft": path})
        objective = make(config.objective)
        said[name] = counted_as_certain(make_sampler(config, dataset, objective), objective)
    assert said == {"gdpo_soft": ["2 of 3 pairs of soft have no soft_label: they count as certain"], "dpo": []}


def test_objectives_that_need_none_take_rows_as_they_are(corpus, half):
    config, dataset = corpus(sources={"half": half}, objective="sft")
    assert len(make_sampler(config, dataset, make(config.objective)).take(6)) == 6


@dataclass(frozen=True)
class Turning(Objective):
    """Takes another completion at every visit, and needs a number on each."""

    @property
    def needs(self) -> Needs:
        return Needs(annotations=frozenset({"baseline_logp"}))

    @property
    def views(self):
        return {Kind.NEGATIVES: lambda row, visit: (Selected(visit % len(row.completions)),)}


def test_later_visits_count_too():
    turns = (Message("assistant", "a"),)
    shown = Completion(turns, annotations={"baseline_logp": -1.0})
    known = Completion(turns, sampled_by="m", annotations={"baseline_logp": -1.0})
    row = Row("s", 0, (Message("user", "q"),), (shown, known, known))
    assert lacks(Turning(), row) == frozenset()
    assert lacks(Turning(), replace(row, completions=(shown, known, replace(known, annotations={})))) == {
        "baseline_logp"
    }


def test_per_kind_asks_each_kind_for_what_its_own_objective_needs(configure):
    poft, dpo = (configure(name, sources={}).objective for name in ("poft", "dpo"))
    objective = make({"name": "per_kind", "method": "per_kind", "demonstration": poft, "preference": dpo})
    prompt, turns = (Message("user", "q"),), (Message("assistant", "a"),)
    shown = Row("s", 0, prompt, (Completion(turns),))
    pair = Row("s", 1, prompt, (Completion(turns, preferred=True), Completion(turns, preferred=False)))
    assert lacks(objective, shown) == {"baseline_logp"}
    assert lacks(objective, pair) == frozenset()


# --- words that the model does not know


def test_rows_of_words_that_the_tokenizer_does_not_know_are_refused(corpus, files, tmp_path):
    rows = [{"prompt": "what is the capital of France", "completion": f"Paris {n}"} for n in range(20)]
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("\n".join(map(json.dumps, rows)))
    config, found = corpus(objective="sft", sources={"known": files["demonstration"], "foreign": foreign})
    with pytest.raises(UftError) as error:
        make_sampler(config, found, make(config.objective))
    (problem,) = error.value.problems
    assert problem.what == "data.sources.foreign"
    assert "% of its tokens are <unk>: model.path=" in problem.why
    assert "model=smollm2_135m" in problem.advice[0]
    with pytest.raises(UftError) as error:  # what else is wrong is told with it
        make_sampler(config, found, make({"name": "poft", "method": "poft"}))
    whys = [problem.why for problem in error.value.problems]
    assert "of its tokens are <unk>" in whys[0]
    assert all(why.startswith("objective=poft needs baseline_logp") for why in whys[1:])
    assert len(whys) == 3
    make_sampler(config, found, make(config.objective), refuse=False)  # uft data shows them
    found.renderer.tokenizer.eos_token = "<unk>"  # then it is no sign of a word that is not known
    make_sampler(config, found, make(config.objective))


@pytest.mark.parametrize(
    ("columns", "advised"),
    [
        (["good one", "loser"], """.chosen="good one"' data.sources.a.columns.rejected=loser"""),
        (["dispreferred", "copyright", "closest"], "columns.completion=dispreferred"),
    ],
)
def test_prompts_alone_are_told_which_columns_may_hold_their_replies(columns, advised):
    _, (first, *_) = without_reply("a", Source(path="a.jsonl"), False, columns)
    assert advised in first
