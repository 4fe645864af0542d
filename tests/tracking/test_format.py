"""Numbers, times and the step line."""

from __future__ import annotations

import math

from uft.tracking.console import card, count, duration, number, printable, shorten, step_line


def test_numbers_and_times():
    numbers = {
        (1.8734, 3): "1.873",
        (0.0, 2): "0.00",
        (-12.345, 2): "-12.35",
        (0.01, 2): "0.01",
        (0.0012, 2): "1.2e-03",
        (1234.56, 2): "1234.6",
        (-123456.0, 3): "-1.2e+05",
        (math.nan, 2): "nan",
        (-math.inf, 2): "-inf",
        (None, 2): "-",
    }
    assert {given: number(*given) for given in numbers} == numbers
    counts = {0: "0", 999: "999", 41_200: "41.2k", 1_234_567: "1.2M", 7.2e9: "7.2G"}
    assert {value: count(value) for value in counts} == counts
    times = {0: "00:00", -3: "00:00", 432: "07:12", 59.6: "01:00", 4032: "1:07:12", 187_032: "2d 03:57:12"}
    assert {seconds: duration(seconds) for seconds in times} == times


def test_what_moves_the_cursor_is_shown_instead():
    assert printable("a\nb\x1b[2J\r\u202e\u2028") == "a\\nb\\x1b[2J\\r\\u202e\\u2028"
    assert printable("häß 日本 \u0645\u06cc\u200c\u062e") == "häß 日本 \u0645\u06cc\u200c\u062e"
    assert printable("half \ud83d") == "half \\ud83d"


def test_shorten():
    assert shorten("abcdefgh", 8) == "abcdefgh"
    assert shorten("abcdefghi", 8) == "abcde..."


METRICS = {
    "loss": 1.873,
    "nll": 1.8,
    "objective/uft": 0.21,
    "lr": 9.6e-6,
    "grad_norm": 0.8,
    "tokens_per_second": 41_200.0,
    "mfu": 0.38,
    "memory_gb": 61.0,
    "memory_total_gb": 80.0,
}


def test_the_whole_step_line():
    assert step_line(120, 800, METRICS, ("uft",), eta=432) == (
        "step 120/800  15% | loss  1.873 | uft  0.21 nll  1.80 | lr 9.6e-06 | grad  0.80 |  41.2k tok/s"
        " | mfu 38% | 61.0/80 GB | eta 07:12"
    )


def test_what_is_unknown_is_left_out():
    assert step_line(1, 800, {"loss": 2.0, "lr": 0.0}) == "step   1/800   0% | loss  2.000 | lr 0.0e+00"
    assert step_line(1, 800, {"memory_gb": 1.25}) == "step   1/800   0% | 1.2 GB"


def test_the_width_is_fixed_while_numbers_grow():
    lines = [
        step_line(1, 800, METRICS | {"loss": 12.5, "tokens_per_second": 950.0}, ("uft",), eta=3000),
        step_line(99, 800, METRICS | {"grad_norm": 0.00012, "objective/uft": -1.5}, ("uft",), eta=2000),
        step_line(800, 800, {name: value for name, value in METRICS.items() if name != "objective/uft"}, ("uft",), 0),
    ]
    bars = [[at for at, character in enumerate(line) if character == "|"] for line in lines]
    assert bars[0] == bars[2]
    assert len(lines[0]) == len(lines[2])
    assert len(lines[1]) - len(lines[0]) <= 4  # powers of ten need two characters more


def test_a_narrow_terminal_keeps_what_is_wanted_most():
    for width in range(30, 140):
        line = step_line(120, 800, METRICS, ("uft",), eta=432, width=width)
        assert len(line) <= max(width, len("step 120/800 | loss  1.873 | eta 07:12"))
        assert line.startswith("step 120/800")
        assert line.endswith("eta 07:12")
    assert "nll" in step_line(120, 800, METRICS, ("uft",), eta=432, width=80)


def test_a_card_keeps_its_columns():
    assert card([("model", "tiny"), ("mixture", "a  1\nb  2\n")]) == (
        "  model    tiny\n  mixture  a  1\n           b  2\n"
    )
    assert "\x1b" not in card([("model", "evil\x1b[31m")])
