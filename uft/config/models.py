"""Settings derived from the choice of a model: its name, a first learning rate by its size and adapter, and the keys of
the run whose weights it has.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from uft.config.checks import Draft, Setting
from uft.config.files import Files, Words
from uft.config.messages import conf_dir
from uft.config.schema import leaves
from uft.errors import Problem, UftError
from uft.runs import find_weights


def complete(draft: Draft, words: Words, files: Files) -> None:
    """Lay the settings derived from the choice of a model: keys of the run that it comes from, and learning rates."""
    start_from(draft, words.chosen)
    forget_rate(draft, words.chosen, files)
    complete_model(draft)


def start_from(draft: Draft, chosen: Sequence[str]) -> None:
    """Lay the keys of the model of the run that `init_from` names, and its weights as `model.path`.

    What the command line or an experiment sets of the model stays, but for another model.
    """
    word = draft.get(("init_from",))
    if not isinstance(word, str):
        return
    own = [s for s in draft.settings if s.path[0] == "model" and Path(s.file).parent.name != "model"]
    others = [s.text for s in own if s.path == ("model", "path")] + [line for line in chosen if gives_choice(line)]
    try:
        source = find_weights(word)
    except UftError as error:
        draft.problems += [replace(problem, what=f"init_from={word}") for problem in error.problems]
        return
    if others or source.run is None:
        why = f"names a run, whose model comes along, and {others[0]} another" if others else "is a model, and no run"
        advice = "leave one of them out" if others else f"model.path={word}"
        draft.problems.append(Problem(f"init_from={word}", why, draft.where(("init_from",)), (advice,)))
        return
    place = f"{source.run.path}@{source.step}" if source.is_checkpoint else str(source.run.path)
    given, text, where = {s.path for s in own}, f"init_from={word}", f"the model of {source.name}"
    model = {**source.config["model"], "path": source.path, "revision": None}
    model.pop("trust_remote_code", None)  # has to be set again for this run
    for path, value in leaves({"model": model, "init_from": place}):
        if path not in given:
            draft.put(Setting(path, value, where, text))


def forget_rate(draft: Draft, chosen: Sequence[str], files: Files) -> None:
    """Put a learning rate that an experiment of ours sets back to the model's own where another model or adapter was
    chosen. What an experiment of the user's own sets is meant for whatever model it is given."""
    lr = next((s for s in reversed(draft.settings) if s.path == ("optim", "lr")), None)
    if lr is None or Path(lr.file).parts[-3:-1] != ("conf", "experiment"):
        return
    if not (conf_dir() / "experiment" / Path(lr.file).name).is_file():
        return
    meant = files.composed(tuple(line for line in chosen if not gives_choice(line))).values["model"]
    if any(draft.get(("model", key)) != meant[key] for key in ("path", "adapter")):
        why = f"model.lr: the one in {lr.where} is for another model or adapter"
        draft.put(Setting(("optim", "lr"), "${model.lr}", why, lr.text))


def gives_choice(line: str) -> bool:
    """Whether this is a choice of a file of conf/model."""
    return line.lstrip("+").startswith(("model=", "model@"))


def complete_model(draft: Draft) -> None:
    """Lay the name and the learning rate that follow from a model's path and adapter.

    A model of `model=custom` is called after its path, and its rate goes by its size. Any other file's rate is for
    its own adapter. What was set elsewhere, on the command line or in an experiment, stays.
    """
    path, is_lora = draft.get(("model", "path")), draft.get(("model", "adapter")) == "lora"
    latest = {setting.path[1]: setting for setting in draft.settings if setting.path[:1] == ("model",)}
    name, lr = latest.get("name"), latest.get("lr")
    if not isinstance(path, str):
        return
    parts = [part for part in path.split("/") if re.search(r"\w", part)]
    parts = parts[:-1] if len(parts) > 1 and parts[-1] == "model" else parts  # RUN for RUN/model
    called = re.sub(r"[^\w.+-]", "_", parts[-1].rpartition(":")[2])[:60] if parts else ""
    if called and name is not None and Path(name.file).name == CUSTOM:
        draft.put(Setting(("model", "name"), called, "after model.path", name.text))
    if lr is None or (Path(lr.file).parent.name != "model" and not lr.text.startswith("init_from=")):
        return
    own = [s for s in draft.settings if s.file == lr.file and s.path == ("model", "adapter")]
    meant = bool(own) and own[-1].value == "lora"
    if Path(lr.file).name == CUSTOM:
        rate, why = first_rate(path, is_lora), "by size and adapter"
    elif meant == is_lora or not isinstance(lr.value, int | float):
        return
    elif is_lora:
        rate, why = max(lr.value, min(10 * lr.value, HIGHEST_RATE)), f"{lr.where}, tenfold for an adapter"
    else:
        rate, why = lr.value / 10, f"{lr.where}, a tenth for all weights"
    draft.put(Setting(("model", "lr"), float(f"{rate:.3g}"), why, lr.text))


CUSTOM = "custom.yaml"  # conf/model's file of models that are given by their path
HIGHEST_RATE = 1e-3  # of first learning rates
SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", re.IGNORECASE)


def size_of_model(path: str) -> float | None:
    """Roughly how many parameters: of the weights in a folder, or as the name says (Qwen2.5-0.5B); None: not known."""
    count = 0
    for file in Path(path).glob("*.safetensors") if os.path.isdir(path) else ():
        try:
            with file.open("rb") as opened:
                header = json.loads(opened.read(min(int.from_bytes(opened.read(8), "little"), 100_000_000)))
            count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # told when it is loaded
    sizes = SIZE_IN_NAME.findall(path.rstrip("/").rpartition("/")[2])
    return count or (float(sizes[-1][0]) * {"m": 1e6, "b": 1e9}[sizes[-1][1].lower()] if sizes else None)


def first_rate(path: str, is_lora: bool) -> float:
    """A first learning rate for a model of which only its path is known: by its size, and tenfold for an adapter."""
    size = size_of_model(path)
    rate = 1e-5 if size is None or size > 3e8 else 2e-5 if size > 1e7 else HIGHEST_RATE
    return min(10 * rate, HIGHEST_RATE) if is_lora else rate
