"""Model card: the README.md of an exported folder, in the form of the Hugging Face hub.

What was trained by which objective and paper, on which rows, how well it does, and how to load it. Places on this
machine are left out, and secrets are hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from uft.config.messages import config_dirs, groups
from uft.config.schema import Config
from uft.data.report import mixture_table
from uft.errors import redact
from uft.runs import Run, lineage, read_json
from uft.tracking.console import HEADLINES, number
from uft.tracking.metrics import read_metrics

PAPER = re.compile(r"(?:arXiv )?\b(\d{4}\.\d{5})\b")
LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""
PLAIN = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
print(tokenizer.decode(model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=64)[0]))
```"""
ADAPTER = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)  # a LoRA adapter: the base model is loaded too
```"""


@dataclass(frozen=True)
class ModelCard:
    """The card of the weights that `run` had after `step` steps, trained under `config`."""

    run: Run
    config: Config
    step: int
    has_template: bool

    def text(self, adapter: bool = False) -> str:
        """The card of the whole model, or of the adapter alone."""
        config, name = self.config, self.config.objective["name"]
        path = config.model.path
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith(".") and not Path(path).exists()
        base = path if is_hub_id else None
        head = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
        head |= {"base_model": base} if base else {}
        front = [*(f"{key}: {value}" for key, value in head.items()), "tags:", *(f"- {t}" for t in ("uft", name))]
        kind = "LoRA adapter for" if adapter else "model fine-tuned from"
        parts = [
            "\n".join(["---", *front, "---"]),
            f"# {self.run.name}",
            f"A {kind} {base or config.model.name} with the objective `{name}` on the mixture `{config.data.name}`, "
            f"{self.step:,} steps of {config.train.batch_size} rows.",
            *self.objective(),
            *self.data(),
            *self.figures(),
            f"## Made with\n\n{self.origin()}",
            f"## Load\n\n{ADAPTER if adapter else LOAD if self.has_template else PLAIN}",
        ]
        return redact("\n\n".join(parts)) + "\n"

    def objective(self) -> list[str]:
        config = self.config
        keys = {key: value for key, value in config.objective.items() if key not in ("name", "method")}
        file = groups(config_dirs()).get("objective", {}).get(config.objective["name"])
        lines = ["## Objective"] + ([opening_comment(file)] if file else [])
        optim = config.optim
        rate = (
            f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule} schedule, batch of {config.train.batch_size}"
        )
        adapter = f"; LoRA of rank {config.model.lora.rank}" if config.model.adapter == "lora" else ""
        settings = ", ".join(f"{key}={value}" for key, value in keys.items())
        return [
            *lines,
            "\n".join(filter(None, [settings and f"Settings: `{settings}`.", f"Optimiser: {rate}{adapter}."])),
        ]

    def data(self) -> list[str]:
        found = [record for part in self.run.stages or [self.run] if (record := read_json(part.path / "data.json"))]
        if not found:
            return []
        digest = f"Digest of the rows and their order: `{self.run.info().get('data_digest', '')}`."
        return ["## Data", table(mixture_table(found[-1])), digest]

    def figures(self) -> list[str]:
        """The last evaluation up to this step, all held-out rows together."""
        lines = [line for line in read_metrics(self.run) if line["step"] <= self.step and "eval/nll" in line]
        if not lines:
            return []
        last = {name.removeprefix("eval/"): value for name, value in lines[-1].items() if name.startswith("eval/")}
        overall = {name: last[name] for name in (*HEADLINES, *last) if name in last and "/" not in name}
        rows = [["metric", "value"], *([name, number(value, 3)] for name, value in overall.items())]
        return ["## Figures", f"On held-out rows, after {lines[-1]['step']:,} steps.", table(rows)]

    def origin(self) -> str:
        info = self.run.info()
        code, versions = info.get("code") or {}, info.get("versions") or {}
        commit = f", commit {code['commit'][:10]}" if code.get("commit") else ""
        changed = " with changes that are not committed" if code.get("dirty") else ""
        packages = ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions
        )
        started = f" Started from: {before}." if (before := lineage(info)) else ""
        return f"uft {versions.get('uft', '')}{commit}{changed}, {packages}, seed {self.config.seed}.{started}"


def opening_comment(file: Path) -> str:
    """The sentences in front of a file of conf/objective: the method, its paper as a link to arXiv, and its loss."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.strip("# ") for line in lines)
    return PAPER.sub(lambda found: f"[arXiv {found[1]}](https://arxiv.org/abs/{found[1]})", text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is its head."""
    first, *others = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([first, "|" + "---|" * len(rows[0]), *others])
