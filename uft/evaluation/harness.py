"""Tasks of lm-evaluation-harness (`pip install 'uft-lm[lmeval]'`) over the program's own packed forward and sampler.

`PackedLM` is the harness's model; it says what the harness's own `HFLM` says, to 1e-3 nats and in every verdict. Tasks,
prompts, metrics and filters are the harness's. A task whose data set cannot be fetched runs on a local file of rows
with the same columns.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from uft.config.schema import Eval, Task
from uft.data.batch import Layout, batches_of, packs_of, sequence_batch
from uft.data.readers import READERS, reader_of
from uft.data.sources import hub_answers
from uft.errors import Problem, UftError, did_you_mean, first_line
from uft.evaluation.measures import Sum, mean_stderr
from uft.heartbeat import activity
from uft.model.load import pad_id
from uft.model.policy import Policy, evaluating
from uft.objectives.base import ForwardRequest
from uft.sampling.generate import Interrupted, Sampling, complete

LONGEST_ANSWER = 256  # tokens, where a task says nothing: as HFLM
NO_LIMIT = 2048  # tokens of a model without a limit of positions: as HFLM
TASKS = Path(str(lm_eval.tasks.__file__)).parent
SENTENCES = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
"""Rules of IFEval that need nltk's punkt_tab, which is data of its own."""
NO_PUNKT = "their rules need data of nltk's that is not here:  python -m nltk.downloader punkt_tab"


class PackedLM(TemplateLM):
    """A policy as the harness asks it."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int,
        should_stop: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__()
        self.policy, self.tokenizer, self.batch_tokens = policy, tokenizer, batch_tokens
        self.should_stop, self.say = should_stop, say
        self.max_length = policy.positions or NO_LIMIT
        self.cut = 0  # prompts whose beginning did not fit

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:  # unless the text (of a chat template) begins with the token already
            add_special_tokens = not string.startswith(str(self.tokenizer.decode(self.prefix_token_id)))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        render = partial(self.tokenizer.apply_chat_template, tokenize=False)
        goes_on = not add_generation_prompt
        return str(render(chat_history, add_generation_prompt=add_generation_prompt, continue_final_message=goes_on))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(text, context ids, continuation ids) -> (log-prob of the continuation, whether greedy decoding says it)."""
        padded, pad = self.policy.layout is Layout.PADDED, pad_id(self.tokenizer)
        # HFLM's: the last token is no input, and needs no position. Padded it is one, which rotary positions allow
        rotary = getattr(self.policy.base.config.get_text_config(), "rope_parameters", None) is not None
        room = self.max_length + (rotary or not padded)
        sequences = []
        for _, context, continuation in requests:
            ids = np.array([*context, *continuation][-room:])
            self.cut += len(context) + len(continuation) > room
            sequences.append((ids, np.arange(len(ids)) >= len(ids) - len(continuation)))
        order = sorted(range(len(sequences)), key=lambda at: requests[at][1])  # equal contexts side by side
        ordered = [sequences[at] for at in order]
        sizes = [len(ids) for ids, _ in ordered]
        scored: dict[int, tuple[float, bool]] = {}
        with evaluating(self.policy.module):
            for group in batches_of(sizes, self.batch_tokens) if padded else packs_of(ordered, self.batch_tokens):
                if self.should_stop():
                    raise Interrupted
                batch = sequence_batch([ordered[at] for at in group], pad, self.policy.layout).to(self.policy.device)
                out = self.policy(batch, ForwardRequest(argmax=True))
                assert out.argmax is not None
                lengths = batch.lengths.tolist()
                sums = out.log_probs.cpu().double().split(lengths)
                greedy = (out.argmax == batch.target_ids).cpu().split(lengths)
                for at, total, same in zip(group, sums, greedy, strict=True):
                    scored[order[at]] = (float(total.sum()), bool(same.all()))
                self.say(f"{len(scored):,} of {len(requests):,} continuations scored")
        return [scored[at] for at in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-prob of whole texts, in windows of the model's positions."""
        windows = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows += [(number, *make_disjoint_window(window)) for window in cut]
        totals = [0.0] * len(requests)
        for (number, *_), (log_prob, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to every (prompt, settings), cut at the first of its stop strings."""
        eos = str(self.tokenizer.decode(self.eot_token_id))
        ends = getattr(self.policy.base.generation_config, "eos_token_id", None)
        stop_ids = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])}
        alike: dict[str, list[int]] = defaultdict(list)  # requests by their settings
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        answers: dict[int, str] = {}
        for numbers in alike.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], LONGEST_ANSWER)
            until = handle_stop_sequences(settings.get("until"), eos=eos)
            most = int(settings["max_gen_toks"])
            room = self.max_length - most
            if room <= 0:
                why = f"answers of up to {most} tokens leave no room for a prompt: the model has {self.max_length}"
                advice = (f"shorter ones:  eval.task_tokens={self.max_length // 4}",)
                raise UftError(Problem("eval.tasks", why, advice=advice))
            sampling = Sampling(max_new_tokens=most)
            if settings.get("do_sample"):
                drawn = {"temperature": settings["temperature"], "top_k": settings.get("top_k", 0)}
                sampling = Sampling(**drawn, top_p=settings.get("top_p", 1.0), max_new_tokens=most)
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            self.cut += sum(len(prompt) > room for prompt in prompts)

            def ended(ids: Sequence[int], until: Sequence[str] = until) -> bool:
                tail = str(self.tokenizer.decode([*ids[-2 * max(map(len, until)) :]]))
                return any(stop in tail for stop in until if stop)

            replies = complete(
                self.policy,
                [prompt[-room:] for prompt in prompts],
                sampling,
                seed=0,
                stop_ids=stop_ids,
                pad_id=pad_id(self.tokenizer),
                batch_size=max(1, self.batch_tokens // 256),
                should_stop=self.should_stop,
                numbers=numbers,
                ended=ended,
            )
            for number, reply in zip(numbers, replies, strict=True):
                text = str(self.tokenizer.decode(reply.ids, skip_special_tokens=True))
                answers[number] = postprocess_generated_text(text, until, None)
            self.say(f"{len(answers):,} of {len(requests):,} prompts answered")
        return [answers[number] for number in range(len(requests))]


# --- Tasks


Figures = dict[str, dict[str, Any]]
"""By name (TASK/METRIC, TASK/METRIC,FILTER, or TASK/mean of several): `value`, its `stderr` over the task's rows (None:
the harness knows none), `n` rows, and what it can be compared by: `keys` of the harness, `shots`, `template`,
`task_version`, `rows` (a file, or the harness's data set) and `left_out`, the rows that cannot be judged here."""
Items = list[dict[str, Any]]


@activity("tasks were read", moving=True)
def load_tasks(tokenizer: PreTrainedTokenizerBase, settings: Eval, say: Callable[[str], None]) -> list[Loaded]:
    """All tasks of `eval.tasks`, before the first one is run. Raises UftError about tasks and files."""
    rendered = [task.task for task in settings.tasks if task.template]
    if rendered and not tokenizer.chat_template:
        plain = ", ".join(f"{{task: {name}, template: false}}" for name in rendered)
        why = "asks for the chat template, and the model has none"
        raise UftError(Problem(f"eval.tasks: {', '.join(rendered)}", why, advice=(f'"eval.tasks=[{plain}]"',)))
    return [Loaded.of(task, settings, say) for task in settings.tasks]


@activity("tasks were evaluated", moving=True)
def run_tasks(
    lm: PackedLM, tasks: Sequence[Loaded], settings: Eval, say: Callable[[str], None]
) -> tuple[Figures, Items]:
    """(figures of the tasks, verdicts and answers row by row). Raises UftError and Interrupted.

    Few-shot examples under a chat template are turns of the conversation, as the harness's default has it.
    """
    figures, items = Figures(), Items()
    for one in tasks:
        before = lm.cut
        say(f"{one.task.task}: {len(one.leaves)} task{'s' * (len(one.leaves) > 1)} of the harness")
        options = {"apply_chat_template": one.task.template, "fewshot_as_multiturn": one.task.template}
        outcome = evaluate(lm, one.content, limit=settings.task_rows, bootstrap_iters=100, **options)
        if lm.cut > before:
            say(f"{one.task.task}: {lm.cut - before:,} prompts are longer than {lm.max_length} tokens: cut at the left")
        figures |= one.figures(outcome)
        items += one.items(outcome["samples"])
    return figures, items


@dataclass(frozen=True)
class Loaded:
    """A task, or a group of tasks, of the harness with its rows."""

    task: Task
    content: Mapping[str, Any]  # of TaskManager.load
    file: str | None
    left_out: int

    @property
    def leaves(self) -> Mapping[str, Any]:
        tasks: Mapping[str, Any] = self.content["tasks"]
        return tasks

    @classmethod
    def of(cls, task: Task, settings: Eval, say: Callable[[str], None]) -> Loaded:
        name, file = task.task, settings.task_files.get(task.task)
        files = (path for path in TASKS.rglob(f"{name}.yaml") if f"task: {name}\n" in path.read_text(encoding="utf-8"))
        near = next((path.parent for path in files), None)  # the whole list takes ten seconds to read
        if near is None:
            say("reading the harness's list of tasks")
        manager = TaskManager(include_path=str(near) if near else None, include_defaults=near is None)
        if name not in manager.all_tasks:
            close = did_you_mean(name, manager.all_tasks, 3)
            raise UftError(Problem(f"eval.tasks: {name}", "the harness has no such task", advice=close))
        rows = Rows.read(name, file, settings.shot_files.get(name)) if file else None
        if rows and rows.left_out:
            say(f"{name}: {rows.left_out:,} rows left out: {NO_PUNKT}")
        reached = rows is not None or hub_answers()
        say(f"{name}: reading its rows")
        # a registered task takes changes as the member of a group
        own: Any = {"group": "files", "task": [{"task": name, **rows.settings}]} if rows else name
        try:
            content = manager.load([own])
        except Exception as error:  # the network, the hub, a data set, code of a task: whatever it raises
            why = f"its rows cannot be loaded: {type(error).__name__}: {first_line(error)}"
            why = why if reached else "its rows are not in the hub's cache here, and the hub does not answer"
            advice = (f"rows of a file with the same columns:  eval.task_files.{name}=FILE",)
            raise UftError(Problem(f"eval.tasks: {name}", why, advice=advice)) from error
        for leaf in content["tasks"].values():
            if task.shots is not None:
                leaf.set_config("num_fewshot", task.shots)
            if settings.task_tokens is not None and leaf.OUTPUT_TYPE == "generate_until":
                leaf.set_config("generation_kwargs", {"max_gen_toks": settings.task_tokens}, update=True)
            leaf.set_fewshot_seed(1234)  # the harness's default
            shots = leaf.get_config("num_fewshot")
            if rows and rows.shots is None and shots and leaf.fewshot_cfg.samples is None:
                why = f"{shots} examples are drawn for its prompts, and no rows for them are given"
                none = f'none:  "eval.tasks=[{{task: {name}, shots: 0}}]"'
                raise UftError(Problem(f"eval.tasks: {name}", why, advice=(f"eval.shot_files.{name}=FILE", none)))
        return cls(task, content, file, rows.left_out if rows else 0)

    def figures(self, outcome: Mapping[str, Any]) -> Figures:
        """The metrics that the task was asked for, else all that the harness gives."""
        results = outcome["results"][self.task.task]
        there = {key.removesuffix(",none"): key for key in results if "," in key and "_stderr," not in key}
        if unknown := [key for key in self.task.keys if key.removesuffix(",none") not in there]:
            why, advice = f"has no metric {', '.join(unknown)}", f"there are: {'  '.join(there)}"
            raise UftError(Problem(f"eval.tasks: {self.task.task}", why, advice=(advice,)))
        wanted = [[key.removesuffix(",none") for key in self.task.keys]] if self.task.keys else [[key] for key in there]
        leaf = next(iter(self.leaves.values()))
        rows = {key: by_row(outcome["samples"], self.leaves, there[key]) for key in there}
        made = Figures()
        for keys in wanted:
            values = [float(results[there[key]]) for key in keys]
            errors = [results.get(there[key].replace(",", "_stderr,", 1)) for key in keys]
            stderr = mean_stderr([rows[key] for key in keys], values)
            if stderr is None and len(keys) == 1 and isinstance(errors[0], float):
                stderr = errors[0]
            name = f"{self.task.task}/{keys[0] if len(keys) == 1 else 'mean'}"
            made[name] = {
                "name": name,
                "value": float(np.mean(values)),
                "stderr": stderr,
                "n": len(rows[keys[0]]),
                "keys": [there[key] for key in keys],
                "shots": int(leaf.get_config("num_fewshot") or 0),
                "template": self.task.template,
                "task_version": str(leaf.VERSION),
                "rows": self.file or str(leaf.DATASET_PATH),
                "left_out": self.left_out,
            }
        return made

    def items(self, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Items:
        """A line per row and filter: its verdicts, and what the model answered or how it scored each choice."""
        return [
            {
                "source": name,
                "row": f"{name}:{one['doc_id']}",
                "measures": {
                    f"{metric},{one['filter']}".removesuffix(",none"): pair
                    for metric in one["metrics"]
                    if (pair := sum_of(one[metric])) is not None
                },
                "prompt": str(one["arguments"][0][0]),
                "reply": one["resps"][0][0] if isinstance(one["resps"][0][0], str) else None,
                "log_probs": [resp[0][0] for resp in one["resps"] if isinstance(resp[0], (tuple, list))],
            }
            for name in self.leaves
            for one in samples[name]
        ]


def sum_of(value: Any) -> Sum | None:
    """(sum, count) of what a row gives a metric: a number, or a list of verdicts; None for anything else."""
    if isinstance(value, (bool, int, float, np.number)):
        return float(value), 1.0
    if isinstance(value, list) and all(isinstance(one, (bool, int, float)) for one in value):
        return float(sum(value)), float(len(value))
    return None


def by_row(samples: Mapping[str, Any], leaves: Iterable[str], key: str) -> list[Sum | None]:
    """(sum, count) of a metric for every row."""
    metric, _, kept = key.partition(",")
    return [sum_of(one.get(metric)) for name in leaves for one in samples[name] if one["filter"] == kept]


# --- Rows of local files


@dataclass(frozen=True)
class Rows:
    """The rows of a task in local files."""

    evaluated: Sequence[Mapping[str, Any]]
    shots: Sequence[Mapping[str, Any]] | None  # those that examples are drawn from; None: none are given
    left_out: int

    @classmethod
    def read(cls, task: str, file: str, shots: str | None) -> Rows:
        """The rows of files. Of rows with a column `task` those that the task's name ends in; of IFEval's rows
        those that can be judged here."""
        rows = read_rows(file, f"eval.task_files.{task}")
        rows = [row for row in rows if task.endswith(str(row.get("task", task)))]
        judged = [row for row in rows if not SENTENCES & set(row.get("instruction_id_list", ())) or has_punkt()]
        if not judged:
            raise UftError(Problem(f"eval.task_files.{task}", f"{file} has no row for this task"))
        examples = read_rows(shots, f"eval.shot_files.{task}") if shots else None
        return cls(judged, examples, len(rows) - len(judged))

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of the task's configuration."""
        return {"custom_dataset": self.dataset} | ({"fewshot_split": "shots"} if self.shots else {})

    def dataset(self, **_: Any) -> Mapping[str, Any]:
        """As the harness loads it: any split has the rows, but for `shots`."""
        from datasets import Dataset

        evaluated, shots = (Dataset.from_list(list(map(dict, rows))) for rows in (self.evaluated, self.shots or ()))

        return defaultdict(lambda: evaluated, shots=shots)


def read_rows(file: str, key: str) -> list[dict[str, Any]]:
    """The records of a file of rows, of any kind that `data` reads."""
    path, rows = Path(file).expanduser(), list[dict[str, Any]]()
    if (read := reader_of(path)) is None:
        raise UftError(Problem(f"{key}={file}", f"is none of {', '.join(READERS)}"))
    try:
        for number, record in read(path):
            if isinstance(record, str):
                raise UftError(Problem(f"{key}={file}", record, f"row {number}"))
            rows.append(record)
    except OSError as error:
        raise UftError(Problem(f"{key}={file}", error.strerror or first_line(error))) from error
    return rows


def has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True
