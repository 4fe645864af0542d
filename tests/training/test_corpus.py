"""How much is drawn of what there is, and what makes two runs draw the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from uft.config.schema import Config
from uft.errors import UftError
from uft.model.load import load_tokenizer
from uft.objectives import make
from uft.training.dataset import Horizon, TrainData, make_horizon, make_sampler, read_train_data

EPOCHS = ("train.steps=null", "train.batch_size=7", "train.epochs=1")


@pytest.fixture
def corpus(configure: Callable[..., Config]) -> Callable[..., tuple[Config, TrainData]]:
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


def test_one_pass_shows_every_row_once_with_a_short_last_batch(
    corpus: Callable[..., tuple[Config, TrainData]],
) -> None:
    config, found = corpus(*EPOCHS)
    horizon = make_horizon(config, found)
    assert horizon == Horizon(epoch_rows=60, total_rows=60, steps=9)  # 8 x 7 + 4
    counts = drawn(config, found, horizon)
    assert len(counts) == 60
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(0.5, 30, 5), (2, 120, 18), (0.001, 1, 1)])
def test_parts_of_passes_and_several(
    corpus: Callable[..., tuple[Config, TrainData]], epochs: float, rows: int, steps: int
) -> None:
    config, found = corpus(*EPOCHS, f"train.epochs={epochs}")
    assert make_horizon(config, found) == Horizon(60, rows, steps)


def test_two_passes_show_every_row_twice(corpus: Callable[..., tuple[Config, TrainData]]) -> None:
    config, found = corpus(*EPOCHS, "train.epochs=2")
    assert set(drawn(config, found, make_horizon(config, found)).values()) == {2}


def test_steps_are_whole_batches_whatever_the_epochs(corpus: Callable[..., tuple[Config, TrainData]]) -> None:
    config, found = corpus("train.steps=11", "train.batch_size=7", "train.epochs=0.1")
    assert make_horizon(config, found) == Horizon(60, 77, 11)


SHARES = ("data.sources.demonstration.share=3", "data.sources.preference.share=1")


@pytest.mark.parametrize(
    ("exhaustion", "rows", "least", "most"),
    [("first", 16, 0, 1), ("repeat", 24, 0, 2), ("all", 48, 1, 3)],
)
def test_what_one_epoch_is_when_shares_do_not_fit_the_sizes(
    corpus: Callable[..., tuple[Config, TrainData]],
    files: dict[str, Path],
    exhaustion: str,
    rows: int,
    least: int,
    most: int,
) -> None:
    two = {name: files[name] for name in ("demonstration", "preference")}
    config, found = corpus(*EPOCHS, *SHARES, f"data.exhaustion={exhaustion}", sources=two)
    horizon = make_horizon(config, found)
    assert horizon.total_rows == horizon.epoch_rows == rows
    counts = drawn(config, found, horizon)
    every = [counts[row.id] for source in found.train for row in source.rows]
    assert (min(every), max(every)) == (least, most)


def test_first_ends_the_run_before_anything_is_shown_twice(
    corpus: Callable[..., tuple[Config, TrainData]], files: dict[str, Path]
) -> None:
    two = {name: files[name] for name in ("demonstration", "preference")}
    config, found = corpus("train.steps=100", "train.batch_size=7", *SHARES, "data.exhaustion=first", sources=two)
    assert make_horizon(config, found) == Horizon(16, 16, 3)


# --- the digest


def test_the_digest_is_of_what_decides_the_rows_and_their_order(
    corpus: Callable[..., tuple[Config, TrainData]], files: dict[str, Path]
) -> None:
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


def test_the_digest_does_not_know_where_files_lie(
    corpus: Callable[..., tuple[Config, TrainData]], files: dict[str, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text(files["binary"].read_text())
    there, here = ({"one": path} for path in (files["binary"], moved))
    assert corpus(sources=there)[1].digest == corpus(sources=here)[1].digest


# --- held-out rows


def test_a_held_out_row_that_is_too_long_is_cut_and_a_training_row_refused(
    corpus: Callable[..., tuple[Config, TrainData]], tmp_path: Path
) -> None:
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


def test_unusable_rows_stop_the_request_with_the_objectives_own_words(
    corpus: Callable[..., tuple[Config, TrainData]], files: dict[str, Path]
) -> None:
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
