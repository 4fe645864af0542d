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
LINE = re.compile(r"^\| (packed|padded|refused) \| (.*?) \| (.*) \|$", re.MULTILINE)
TESTED = ("", "yes")
INTRO = """\
# What is supported

Made from the tests' own tables by `python scripts/support_table.py`. **tested**: a test holds that log-probs, gradients
or answers are those of plain transformers. **expected**: the same code, without a test of its own. **refused**: told in
a line before the first step. Any model, also of a family that is not here, is tried on a few small rows before the
first step, and refused where it reads other rows or later tokens; `uft check model.path=...` says it of yours.
"""
FAMILIES = """\
## Model families

By `model_type`, a tiny random model of each; sizes and settings of a real one may decide otherwise (an attention window
that is shorter than the longest row pads). **packed**: rows without padding, the prompt of a row's completions computed
once. **padded**: a rectangle; the same losses, slower. For both, log-probs and sampled answers are tested against plain
transformers; LoRA, sharding and export are expected.

| rows | why not packed | families |
|---|---|---|"""
OWN = """\
Besides tested by family: the gradients of every objective in every layout; an adapter on all its linear layers merged,
exported and read back by PEFT; GGUF, which describes it.

| family | gradients | adapter | GGUF |
|---|---|---|---|"""
ENGINES = """\
## Everything else

| | |
|---|---|
| devices | CPU: tested. CUDA, `mps`: expected |
| precision | float32, bfloat16 over float32, frozen weights in 4 bits: tested. float16, quantised files: refused |
| attention | `sdpa`, `eager`: tested. `flash_attention_2`: expected, where it is installed |
| adapters | LoRA on any linear layer, experts and tied heads too; {adapters}: tested. Other kinds: not there |
| sharding | {ways}: tested on two processes |
| sampling | `rollout.engine=` `own`, `transformers`: tested. `vllm`: tested against a stand-in. SGLang: not there |
| export | transformers 5, PEFT: tested at every export. transformers 4.57: told where it would read another model |
| GGUF, Ollama | {gguf}, with a byte-level BPE tokenizer; read back at every export. Others: refused |
| trackers | W&B online, offline and synced later: tested against a server's stand-in |
"""


def tests(name: str) -> Any:
    """A module of the tests, for its tables."""
    file = ROOT / "tests" / name
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(f"table_of_{file.stem}", file)
    assert spec
    assert spec.loader
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
    why = re.sub(r" by \d.*| of \d+ tokens.*", "", why).replace("|", "/")
    return "a tiny model of it does not run" if why == "it cannot be used" else why


def kinds(architectures: Any) -> list[str]:
    return sorted(architectures.KINDS.keys() - {"kimi_linear"})  # its forward pass takes minutes on a CPU


def page(found: Mapping[str, tuple[str, str]]) -> str:
    exported, layouts, cases = map(tests, ("training/test_exporting.py", "model/test_layouts.py", "parallel/cases.py"))
    asked = (" ".join(word for word in words if word.startswith("hardware.")) for words in cases.WAYS.values())
    ways = ", ".join(f"`{words}`" for words in dict.fromkeys(asked) if words)
    settings = {
        f"`{key}`": None
        for _, stored, keys in tests("model/test_adapters.py").KINDS.values()
        for key in (*keys, stored)
    }
    adapters = ", ".join(key for key in settings if key not in ("`none`", "`targets`"))
    gguf = ", ".join(ARCHITECTURES)
    alike: dict[tuple[str, str], list[str]] = {}
    for kind, outcome in sorted(found.items()):
        alike.setdefault(outcome, []).append(f"`{kind}`")
    groups = sorted(alike.items(), key=lambda one: ((PACKED, PADDED, REFUSED).index(one[0][0]), -len(one[1])))
    families = [f"| {outcome} | {why} | {', '.join(names)} |" for (outcome, why), names in groups]
    gradients = {name.partition("_")[0] for name in layouts.MODELS}
    adapted = {kind for kind, _ in exported.CASES} | {"llama", "gpt2"}
    own = [
        f"| `{kind}` | {TESTED[kind in gradients]} | {TESTED[kind in adapted]} | {TESTED[kind in ARCHITECTURES]} |"
        for kind in sorted(gradients | adapted | ARCHITECTURES.keys())
    ]
    return "\n".join(
        [INTRO, FAMILIES, *families, "", OWN, *own, "", ENGINES.format(ways=ways, adapters=adapters, gguf=gguf)]
    )


def known(text: str) -> dict[str, tuple[str, str]]:
    found = LINE.findall(text)
    return {kind: (outcome, why) for outcome, why, names in found for kind in re.findall(r"`([\w-]+)`", names)}


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
