"""TensorBoard and Trackio: what their own readers find, and what is said without them."""

from __future__ import annotations

import math

import pytest
from records import SAMPLES

from uft.config.compose import compose
from uft.errors import UftError
from uft.tracking.trackers import make_tracker


def logged(run, settings, resumed_step=None, steps=(0, 1, 2)):
    said: list[str] = []
    tracker = make_tracker(run, settings, resumed_step=resumed_step, say=said.append)
    tracker.start()
    for step in steps:
        tracker.log(step, {"loss": 1.0 + step, "eval/pairs/nll": math.nan if step else 2.0, "stage": "sft"})
    tracker.samples(steps[-1], SAMPLES, "sft")
    tracker.finish("finished", 0, {})
    assert said == []
    return tracker


def test_tensorboard_reads_what_was_logged_and_steps_that_were_trained_again_once(new_run, config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = new_run()
    tracker = logged(run, config(tracker="tensorboard"))
    assert "tensorboard --logdir" in tracker.description
    logged(run, config(tracker="tensorboard"), resumed_step=1, steps=(2, 3))
    found = EventAccumulator(str(run.path / "tensorboard"))
    found.Reload()
    assert [(each.step, each.value) for each in found.Scalars("train/loss")] == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]
    assert found.Scalars("eval_pairs/nll")[0].value == 2.0
    assert len([tag for tag in found.Tags()["tensors"] if tag.startswith("samples/")]) == len(SAMPLES)


def test_trackio_reads_what_was_logged(new_run, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    run = new_run()
    logged(run, config(tracker="trackio", project="mine"))
    (name,) = trackio.Api().runs("mine")
    assert name.name == f"{run.name}-{run.info()['id']}"
    assert capsys.readouterr().out == "", "the console is the run's"


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_missing_package_is_told_before_anything_starts(monkeypatch, tracker):
    monkeypatch.setattr("uft.config.rules.find_spec", lambda name: None)
    with pytest.raises(UftError) as error:
        compose([f"tracking={tracker}"])
    assert f"{tracker} is not installed" in str(error.value)
    assert f"pip install 'uft-lm[{tracker}]'" in str(error.value)
