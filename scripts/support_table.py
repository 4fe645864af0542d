"""docs/support.md, made from the tests' own tables: `python scripts/support_table.py` tries every architecture anew.

What a model family gets is asked of a tiny random model of it, as tests/model/test_architectures.py does, which also
holds that its log-probs and answers are right. That takes some minutes; `written(page)` keeps the page's answers.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from uft.config.schema import Model
from uft.errors import UftError
from uft.model import layout, load
from uft.model.gguf import ARCHITECTURES
from uft.model.layout import settle_layout

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
PACKED, PADDED, REFUSED = "packed", "padded", "refused"
LINE = re.compile(r"^\| `(\w+)` \| (packed|padded|refused)(?:: (.*?))? \|", re.MULTILINE)
INTRO = """\
# What is supported

Made from the tests' own tables by `python scripts/support_table.py`. **tested**: a test holds that log-probs, gradients
or answers are those of plain transformers. **expected**: the same code path, without a test of its own. **refused**:
told in a line before the first step. `uft check model.path=...` says it of your model, whatever stands here.

`packed`: rows without padding, the prompt of a row's completions computed once. `padded`: a rectangle; the same losses
and gradients, slower. Both are tested for every family that is not refused, and so is sampling.

A model of another family is tried on a few small rows before the first step, and refused where it reads other rows or
later tokens, or cannot be loaded. Multimodal models train by their text part alone; sequence-to-sequence models,
quantised weights and models without a causal head are refused.
"""
ENGINES = """\
| | |
|---|---|
| devices | CPU, CUDA: tested. `mps`: expected |
| precision | float32, bfloat16 over float32 master weights: tested. float16, quantised weights: refused |
| attention | `sdpa`, `eager`: tested. `flash_attention_2`: expected, where it is installed |
| adapters | LoRA on any linear layer, experts and tied heads too: tested. Other kinds of PEFT: not there |
| sharding | {ways}: tested on two processes |
| sampling | the program's own sampler: tested. vLLM, SGLang: not there |
| export | transformers 5, PEFT: tested at every export. transformers 4.57: tested, or told that it would read another model |
| GGUF, Ollama | {gguf}, with a byte-level BPE tokenizer; read back at every export. Others: refused before it writes |
| trackers | W&B online, offline and synced later: tested against a server's stand-in |
"""


def tests(name: str) -> Any:
    """A module of the tests, for its tables."""
    file = ROOT / "tests" / name
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(f"table_of_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def tried(kind: str, architectures: Any) -> tuple[str, str] | None:
    """(packed, padded or refused; why not packed) of a tiny model; None where none can be made."""
    try:
        model = architectures.tiny(kind)
    except Exception:
        return None
    small, base = layout.SMALL_MODEL, load.load_base
    layout.SMALL_MODEL = 0
    setattr(load, "load_base", lambda *_: model)  # noqa: B010
    try:
        policy = load.load_policy(Model(path="tiny"), torch.device("cpu"), 0).eval()
        settle_layout(policy, "auto", 30)
    except UftError as error:
        return REFUSED, shortened(error.problems[0].why)
    finally:
        layout.SMALL_MODEL = small
        setattr(load, "load_base", base)  # noqa: B010
    note = policy.notes[-1]
    return (PADDED, shortened(note.removeprefix("rows padded: "))) if note.startswith("rows padded") else (PACKED, "")


def shortened(why: str) -> str:
    """A reason without figures and messages of libraries, which differ between machines and versions."""
    why = re.sub(r"\(.*", "", why.splitlines()[0]).strip()
    return re.sub(r" by \d.*| of \d+ tokens.*", "", why).replace("|", "/")


def kinds(architectures: Any) -> list[str]:
    return sorted(architectures.KINDS.keys() - {"kimi_linear"})  # its forward pass takes minutes on a CPU


def page(found: Mapping[str, tuple[str, str]]) -> str:
    exported, layouts, cases = map(tests, ("training/test_exporting.py", "model/test_layouts.py", "parallel/cases.py"))
    adapted = {kind for kind, _ in exported.CASES} | {"llama", "gpt2"}
    gradients = {name.partition("_")[0] for name in layouts.MODELS}
    lines = ["| family | layout | gradients of every objective | adapter, merged | GGUF |", "|---|---|---|---|---|"]
    for kind, (outcome, why) in sorted(found.items()):
        other = ("tested", "expected") if outcome != REFUSED else ("", "")
        cells = [
            f"`{kind}`",
            f"{outcome}: {why}" if why else outcome,
            other[kind.removesuffix("_text") not in gradients],
            other[kind not in adapted],
            "described" if kind in ARCHITECTURES else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    counts = {outcome: sum(one == outcome for one, _ in found.values()) for outcome in (PACKED, PADDED, REFUSED)}
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    asked = (" ".join(word for word in words if word.startswith("hardware.")) for words in cases.WAYS.values())
    ways = ", ".join(f"`{words}`" for words in dict.fromkeys(asked) if words)
    engines = ENGINES.format(ways=ways, gguf=", ".join(ARCHITECTURES))
    families = f"## Families\n\nBy `model_type` of transformers' configuration: {told}.\n"
    return "\n".join([INTRO, "## Everything else\n", engines, families, *lines, ""])


def known(text: str) -> dict[str, tuple[str, str]]:
    return {kind: (outcome, why) for kind, outcome, why in LINE.findall(text)}


def attempts(names: Iterable[str], architectures: Any) -> dict[str, tuple[str, str]]:
    found = {}
    for name in names:
        if (outcome := tried(name, architectures)) is not None:
            found[name] = outcome
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    table = tests("model/test_architectures.py")
    PAGE.write_text(page(attempts(kinds(table), table)), encoding="utf-8")
