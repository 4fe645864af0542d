"""Runs and comparisons in Python: what `import uft` gives. docs/python.md has it as a notebook would.

Figures are those of the command line: metrics are read with their checksums, and every mean, interval and p-value is
of `uft.report`. "nan", "inf" and "-inf", as JSON files of a run write them, are floats here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uft.runs import Run, WeightsSource, find_weights, open_run
from uft.tracking.metrics import NOT_NUMBERS, read_metrics, read_samples

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from uft.config.schema import Model

Word = str | Path


def load(run: Word) -> RunRecord:
    """A run by its folder, its name, SWEEP/RUN or `last`, in whatever state it is. UftError where there is none."""
    return RunRecord(open_run(run).path)


@dataclass(frozen=True)
class RunRecord:
    """A run on the disk. Files are read when they are first asked for; `load` it again to see what came since."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def status(self) -> str:
        """finished, failed, stopped, running or interrupted."""
        return Run(self.path).status

    @cached_property
    def config(self) -> dict[str, Any]:
        """The frozen configuration, nested: `run.config["optim"]["lr"]`."""
        return Run(self.path).config()

    @cached_property
    def metrics(self) -> DataFrame:
        """metrics.jsonl by step: a column per metric, NaN where a step has none. Damaged lines are left out."""
        from pandas import DataFrame

        return DataFrame(read_metrics(Run(self.path)) or {"step": []}).set_index("step")

    @cached_property
    def samples(self) -> DataFrame:
        """samples.jsonl, a row per answer; what its checker says is in the columns `verdict/...`."""
        from pandas import DataFrame

        found = [sample for samples in read_samples(Run(self.path)).values() for sample in samples]
        rows = []
        for sample in found:
            verdict = sample.pop("verdict", None) or {}
            rows.append(sample | {f"verdict/{name}": NOT_NUMBERS.get(v, v) for name, v in verdict.items()})
        return DataFrame(rows)

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json: status, steps, the final and best metrics, costs; {} while the run has not ended."""
        return with_floats(Run(self.path).result())

    def model(self, checkpoint: str | int | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
        """The trained model, of transformers, on the CPU in evaluation mode; an adapter is merged.

        `checkpoint`: "best" or a step. Without it: the final model, of a run that was stopped its newest checkpoint.
        Code that comes with the model runs where the run was begun here, or with `trust_remote_code`.
        """
        from uft.launch.launcher import TYPED, refuse_untrusted
        from uft.model.load import load_base

        run = Run(self.path)
        refuse_untrusted(self.path, run.runs_code, [TYPED] if trust_remote_code else [])
        found: PreTrainedModel = load_base(self._settings(checkpoint)).eval()
        return found

    def tokenizer(self, checkpoint: str | int | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer with the chat template that was trained with."""
        from uft.model.load import load_tokenizer

        return load_tokenizer(self._settings(checkpoint))

    def _settings(self, checkpoint: str | int | None) -> Model:
        from uft.config.frozen import to_config
        from uft.config.stages import without_stages

        source: WeightsSource = find_weights(f"{self.path}@{checkpoint}" if checkpoint is not None else str(self.path))
        return to_config(without_stages(source.config) | {"model": source.model}).model


def with_floats(value: Any) -> Any:
    """A JSON value with its "nan", "inf" and "-inf" as floats."""
    if isinstance(value, Mapping):
        return {key: with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_floats(item) for item in value]
    return NOT_NUMBERS.get(value, value) if isinstance(value, str) else value


def compare(
    runs: Word | RunRecord | Iterable[Word | RunRecord] = (),
    *,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    seed_keys: Sequence[str] = (),
) -> Comparison:
    """What `uft compare` says of these runs, sweeps or patterns; of none: of the newest sweep. Writes no file.

    `metrics` are judged first ("exact_match", "eval/margin:max"); `baseline` is a configuration's name or "key=value".
    UftError where a word has no run, or an option has no meaning.
    """
    from uft.report.compare import Options
    from uft.report.compare import compare as compare_runs
    from uft.report.runs import select

    words = [runs] if isinstance(runs, (str, Path, RunRecord)) else list(runs)
    selection = select([str(word.path if isinstance(word, RunRecord) else word) for word in words])
    return Comparison(compare_runs(selection, Options(tuple(metrics), baseline, tuple(seed_keys))))


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, drawn from the one object that compare.json, the page and the terminal show: `content`."""

    content: dict[str, Any]

    @cached_property
    def groups(self) -> DataFrame:
        """A row per configuration and metric: n (seeds), mean, sd, and the 95 % interval from low to high of the mean.

        `direction` (max, min or None) says which way is better. The last columns are the settings that differ.
        """
        from pandas import DataFrame

        ways = {metric["name"]: metric["direction"] for metric in self.content["metrics"]}
        axes = [axis["key"] for axis in self.content["axes"]]
        rows = [
            {"configuration": group["name"], "metric": metric, "direction": ways.get(metric)}
            | with_floats(group["metrics"][metric])
            | {"baseline": group["baseline"], **{axis: group["config"].get(axis) for axis in axes}}
            for group in self.content["groups"]
            for metric in ways
            if metric in group["metrics"]
        ]
        return DataFrame(rows)

    @cached_property
    def differences(self) -> DataFrame:
        """A row per judged metric and configuration `b`: the best one, `a`, minus it.

        With the interval from low to high, p and p_adjusted (Holm, over the metric's comparisons), n (pairs, or seeds
        of the smaller side), the method, and what these seeds could have shown. NaN or None: it cannot be said.
        """
        from pandas import DataFrame

        names = {group["id"]: group["name"] for group in self.content["groups"]}
        rows = [
            {"metric": found["metric"], "direction": found["direction"]}
            | {key: value for key, value in with_floats(one).items() if key != "rows"}
            | {"a": names[one["a"]], "b": names[one["b"]]}
            for found in self.content["summary"]
            for one in found["comparisons"]
        ]
        return DataFrame(rows)

    @cached_property
    def runs(self) -> DataFrame:
        """A row per run, also of those that failed: name, path, configuration, status, seed, costs, last figures."""
        from pandas import DataFrame

        names = {group["id"]: group["name"] for group in self.content["groups"]}
        kept = ("name", "path", "status", "error", "seed", "steps", "seconds", "tokens", "peak_memory_bytes")
        rows = [
            {key: run[key] for key in kept} | {"configuration": names.get(run["group"])} | run["final"]
            for run in self.content["runs"]
        ]
        return DataFrame(with_floats(rows))

    @property
    def words(self) -> dict[str, str]:
        """The answer for every judged metric, in the sentences of the terminal."""
        return {found["metric"]: " ".join(found["words"]) for found in self.content["summary"]}

    @property
    def warnings(self) -> list[str]:
        """What makes the comparison doubtful: data, budgets, code or machines that were not equal, runs that failed."""
        return [f"{warning['what']}. {warning['why']}" for warning in self.content["warnings"]]


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of `uft train OVERRIDES`, nested, as a run would freeze them. UftError with all that is wrong."""
    from uft.cli.verbs import with_sources
    from uft.config.compose import compose

    return compose(with_sources(list(overrides)))
