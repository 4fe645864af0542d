"""The tables of docs/objectives.md, made from the code: `python scripts/objectives_table.py` rewrites them.

Names, papers and losses are the comments of conf/objective/*.yaml; what an objective does with a row is asked of its
views, and what it costs is counted while it computes a loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml

from uft.data.batch import Batch, collate, make_example, mismatched
from uft.data.chat import Tokens
from uft.data.rows import ANNOTATIONS, Completion, Kind, Message, Row
from uft.objectives import make
from uft.objectives.base import PLAIN, ForwardOutput, ForwardRequest, Objective, StepContext
from uft.objectives.policy_gradient import SPREAD
from uft.objectives.views import kind_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "objectives.md"
FOLDER = ROOT / "conf" / "objective"
CONSTANT = ("name", "method", "reduction", "min_score", "sft_weight")  # not what a method is about


def presets() -> dict[str, Objective]:
    """Every objective of conf/objective by its public name."""
    return {file.stem: make(settings(file)) for file in sorted(FOLDER.glob("*.yaml"))}


def settings(file: Path) -> dict[str, object]:
    """What a file comes to, the objectives it places inside itself included."""
    content = yaml.safe_load(file.read_text(encoding="utf-8").replace("${rollout.max_new_tokens}", "128"))
    placed = {k: v for line in content.pop("defaults", []) if isinstance(line, Mapping) for k, v in line.items()}
    inside = {place.rpartition("@")[2]: settings(FOLDER / f"{name}.yaml") for place, name in placed.items()}
    return {**content, **inside}


def said(file: Path) -> tuple[str, str]:
    """(links to the papers, the loss) of a file's comment."""
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    papers = re.findall(r"\b(\d{4}\.\d{5})\b", " ".join(head))
    loss = next(line for line in head if line.startswith("# loss: ")).removeprefix("# loss: ")
    return ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in dict.fromkeys(papers)), loss


@dataclass
class Counting:
    """A forward that counts: a sequence forwarded is 1, its backward pass 2 more."""

    units: int = field(default=0)

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        if isinstance(request.anchor, Counting):
            request.anchor.units += len(batch.row)
        self.units += len(batch.row) * (3 if torch.is_grad_enabled() else 1)
        values = torch.full(batch.target_ids.shape, -1.0, requires_grad=True)
        zeros = torch.zeros_like(values)
        return ForwardOutput(values, batch.target_ids, zeros, values.detach(), zeros)


def sample(kind: Kind, index: int) -> Row:
    """A row of a kind, with everything that an annotation could have written."""

    def reply(**feedback: object) -> Completion:
        notes = dict.fromkeys((*ANNOTATIONS, SPREAD), -1.0)
        return Completion((Message("assistant", "x"),), annotations=notes, **feedback)  # type: ignore[arg-type]

    completions = {
        Kind.DEMONSTRATION: (reply(),),
        Kind.PREFERENCE: (reply(preferred=True), reply(preferred=False)),
        Kind.BINARY: (reply(label=True),),
        Kind.SCORED: (reply(score=0.9), reply(score=0.1)),
        Kind.NEGATIVES: (reply(), reply(sampled_by="m"), reply(sampled_by="m")),
        Kind.ROLLOUT: (reply(), reply(sampled_by="m", score=1.0), reply(sampled_by="m", score=0.0)),
    }
    return Row("s", index, (Message("user", "p"),), completions[kind])


def cost(name: str, objective: Objective) -> str:
    """Forward units an example costs, the reference computed or cached: counted on the kind of row it is made for."""
    if name == "per_kind":
        return "as its parts"
    kinds = [k for k in (Kind.DEMONSTRATION, Kind.PREFERENCE) if k in objective.views]
    kind = Kind.NEGATIVES if objective.method == "dft" else Kind.ROLLOUT if objective.needs.rollouts else kinds[0]
    encoded = Tokens(np.arange(4, dtype=np.int32), np.array([False, True, True, True]), 1)
    found = (
        make_example(row, [encoded] * 3, row.index, 0, objective.views[kind])
        for row in (sample(kind, i) for i in (0, 1))
    )
    items = [item for item in found if item is not None]
    objective.start(2)
    batch, others = collate(items, 0), mismatched(items, 8)
    policy, reference = Counting(), Counting()
    objective(batch, policy, reference, StepContext())
    if objective.needs.mismatched:
        with torch.no_grad():
            objective.baseline_terms(collate(others, 0), policy, reference)
    if objective.needs.matched:
        with torch.no_grad():
            objective.matched_values(batch, policy, reference)
    sequences = f" for {len(batch.row) // 2} sequences" if len(batch.row) > 2 else ""
    alone, whole = policy.units // 2, (policy.units + reference.units) // 2
    if not objective.needs.reference:
        return f"{alone}{sequences}"
    return f"{whole}{sequences}" if objective.needs.distributions else f"{whole} / {alone}{sequences}"


def keys(file: Path) -> str:
    content = {k: v for k, v in settings(file).items() if k not in CONSTANT and not isinstance(v, Mapping)}
    return ", ".join(f"`{name}: {yaml.safe_dump(value).split(chr(10))[0]}`" for name, value in content.items())


def methods() -> Iterator[list[str]]:
    yield ["`objective=`", "paper", "loss", "reference", "cost", "keys and defaults"]
    for name, objective in presets().items():
        file = FOLDER / f"{name}.yaml"
        paper, loss = said(file)
        needs = objective.needs
        other = "whole distributions" if needs.distributions else "yes" if needs.reference else "no"
        other = "a teacher's whole distributions" if needs.teacher else other
        other += "".join(f", `{column}`" for column in sorted(needs.annotations | needs.columns))
        shown = f"`{loss}`".replace("|", "\\|")
        yield [
            f"`{name}`",
            paper,
            shown,
            "as its parts" if name == "per_kind" else other,
            cost(name, objective),
            keys(file),
        ]


def markdown(lines: list[list[str]]) -> str:
    head, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows])


def written(page: str) -> str:
    """The page with its tables made anew."""
    tables = {"methods": markdown(list(methods())), "kinds": markdown(kind_table(presets()))}
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by scripts/objectives_table.py -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
