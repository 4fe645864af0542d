"""The space of a search, from Hydra's override grammar.

objective.beta=interval(0.01,1)              a number in between; a whole one where the key takes whole ones
optim.lr=tag(log,interval(1e-5,1e-3))        likewise, spread over its powers of ten
train.batch_size=range(16,65,16)             16, 32, 48, 64
objective=uft,dpo                            one of these
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from uft.config.objectives import whole_number
from uft.errors import Problem, UftError

DIGITS = 6  # of a number that was drawn: enough for any search, and it stands in folder names


@dataclass(frozen=True)
class Choice:
    """One of several, as they were typed."""

    options: tuple[str, ...]

    def draw(self, trial: Any, key: str, whole: bool) -> str:
        return str(trial.suggest_categorical(key, list(self.options)))

    @property
    def ends(self) -> tuple[str, ...]:
        return self.options


@dataclass(frozen=True)
class Interval:
    """A number between two others, these included; with a step, one of a row of them."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def draw(self, trial: Any, key: str, whole: bool) -> str:
        if whole:
            step = int(self.step or 1)
            return str(trial.suggest_int(key, int(self.low), int(self.high), step=step, log=self.log))
        return number(trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log))

    @property
    def ends(self) -> tuple[str, ...]:
        return (number(self.low), number(self.high))


Axis = Choice | Interval


def number(value: float) -> str:
    """A number as it is typed."""
    short = float(f"{value:.{DIGITS}g}")
    return str(int(short)) if short.is_integer() and abs(short) < 10**DIGITS else repr(short)


@dataclass(frozen=True)
class Space:
    """The overrides that are the same in all trials, and the axes that a trial draws from."""

    fixed: tuple[str, ...]
    axes: Mapping[str, Axis]
    written: Mapping[str, Sequence[str]]  # by axis: as it was typed
    whole: frozenset[str] = frozenset()  # keys that take whole numbers

    def corners(self) -> list[list[str]]:
        """Jobs that show whether every end and every option can be run: each once, the others at their first."""
        first = {key: axis.ends[0] for key, axis in self.axes.items()}
        values = [first, *({**first, key: end} for key, axis in self.axes.items() for end in axis.ends[1:])]
        return [self.job(one) for one in values]

    def job(self, values: Mapping[str, str]) -> list[str]:
        return [*self.fixed, *(f"{key}={value}" for key, value in values.items())]

    def draw(self, trial: Any) -> list[str]:
        """The overrides of a trial of Optuna's."""
        return self.job({key: axis.draw(trial, key, key in self.whole) for key, axis in self.axes.items()})

    def typed_by(self, settings: Mapping[str, Any]) -> Space:
        """The same space, knowing from composed settings which keys take whole numbers."""
        whole = frozenset(key for key in self.axes if whole_number(key.lstrip("+"), settings))
        return Space(self.fixed, self.axes, self.written, whole)


def space_of(lines: Sequence[str], loader: ConfigLoader) -> Space:
    """The space that these overrides describe; a later line about a key replaces an earlier one. UftError for none."""
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(lines))
    last = {override.get_key_element(): override for override in overrides}
    swept = {key: override for key, override in last.items() if override.is_sweep_override()}
    if not swept:
        advice = (
            "objective.beta=interval(0.01,1)",
            "optim.lr=tag(log,interval(1e-5,1e-3))",
            "data.ratio=0.25,0.5,0.75",
        )
        raise UftError(Problem("hydra/sweeper=uft_optuna", "no key says what to search", "command line", advice))
    fixed = tuple(f"{key}={o.get_value_element_as_str()}" for key, o in last.items() if key not in swept)
    written = {key: [str(override.input_line).partition("=")[2]] for key, override in swept.items()}
    return Space(fixed, {key: axis_of(override) for key, override in swept.items()}, written)


def axis_of(override: Override) -> Axis:
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        low, high = sorted((float(sweep.start), float(sweep.end)))
        return checked(override, Interval(low, high, log="log" in sweep.tags))
    if isinstance(sweep, RangeSweep) and "log" not in sweep.tags:
        values = sorted(float(value) for value in sweep.range())
        if len(values) > 1:
            return Interval(values[0], values[-1], step=abs(float(sweep.step)))
    return Choice(tuple(text.partition("=")[2] or text for text in override.sweep_string_iterator()))


def checked(override: Override, axis: Interval) -> Interval:
    if axis.log and axis.low <= 0:
        raise UftError(Problem(str(override.input_line), "a logarithmic interval begins above 0", "command line"))
    return axis
