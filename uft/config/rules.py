"""Rules between the keys of a configuration: each reads what it needs, and says nothing where that is missing or wrong
itself. What is wrong with a key alone is pydantic's matter (:mod:`uft.config.checks`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from typing import Any

from uft.config.messages import listing
from uft.config.parameters import objective_of, parameters
from uft.config.schema import flat, value_at
from uft.data.rows import slice_bounds
from uft.errors import secret_in, secrets

BY_METHOD = ("objective", "reward")
"""Groups whose keys are those of the class that their file names."""

Settings = dict[str, Any]
LONGEST_FILE_NAME = 200  # bytes; file systems allow 255, and our temporary files have longer names


Broken = tuple[str, str, tuple[str, ...]]
"""A dotted key, why its value breaks a rule, advice."""


def rules_broken(settings: Settings, wrong: Collection[str], typed: Collection[str]) -> list[Broken]:
    """The rules that settings break, at most one a key.

    `wrong` are the keys whose values are wrong by themselves: rules see them as not given. `typed` are those that the
    command line sets.
    """
    settings = copy.deepcopy(settings) if wrong else settings
    for path in (tuple(key.split(".")) for key in wrong if "." in key):
        node = value_at(settings, path[:-1])
        if isinstance(node, dict) and path[-1] in node:
            node.pop(path[-1]) if path[0] in BY_METHOD else node.update({path[-1]: None})
    problems = [one for rule in RULES for one in rule(settings)]
    steps = settings["train"]["steps"]
    if "train.epochs" in typed and steps is not None:
        problems.insert(0, broken("train.epochs", f"does nothing beside train.steps={steps}", "add  train.steps=null"))
    return list({one[0]: one for one in reversed(problems) if one[0] not in wrong}.values())[::-1]


def broken(key: str, why: str, *advice: str) -> Broken:
    return key, why, advice


def numbers(settings: Settings) -> Iterator[Broken]:
    warmup, steps = settings["optim"]["warmup"], settings["train"]["steps"]
    if warmup is not None and warmup >= 1:
        if warmup != int(warmup):
            yield broken("optim.warmup", "must be a share below 1 or a whole number of steps")
        elif steps is not None and warmup >= steps:
            yield broken("optim.warmup", f"leaves no step after the warm-up: train.steps={steps}")
    if settings["train"]["early_stop"] is not None and settings["train"]["eval_every"] == 0:
        yield broken("train.early_stop", "counts evaluations, and there are none on the way", "train.eval_every=100")
    betas, seeds = settings["optim"]["betas"], settings["generate"]["seeds"]
    if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        yield broken("optim.betas", "must be two numbers, at least 0 and below 1")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        yield broken("generate.seeds", "must be different seeds, at least one")


def adapters(settings: Settings) -> Iterator[Broken]:
    adapter = settings["model"]["adapter"]
    if settings["reference"]["mode"] == "adapter_off":
        if adapter == "none":
            advice = "model.adapter=lora  or  reference.mode=auto"
            yield broken("reference.mode", "needs an adapter to switch off", advice)
        if settings["reference"]["path"] is not None:
            why = "is another model, and switching the adapter off gives the initial policy"
            yield broken("reference.path", why, "reference.mode=auto")
    if settings["reference"]["sync_every"] is not None:
        if adapter == "lora":
            why = "moves the weights of a whole copy, and an adapter trains none of those"
            yield broken("reference.sync_every", why, "model.adapter=none")
        elif settings["hardware"]["sharding"] == "full":
            yield broken("reference.sync_every", "needs whole weights on every device", "hardware.sharding=none")
        if settings["reference"]["mode"] == "cached":
            yield broken("reference.mode", "keeps the log-probs of a reference that stays", "reference.mode=auto")
    whole, kept = settings["hardware"]["sharding"] != "full", settings["model"]["lora"]["modules_to_save"]
    if settings["model"]["quantize"] != "none":
        if adapter == "none":
            yield broken("model.quantize", "is for frozen weights, and all are trained", "model.adapter=lora")
        elif not whole:
            yield broken("model.quantize", "needs whole weights on every device", "hardware.sharding=none")
    if settings["model"]["activation_offload"] and not whole:
        yield broken("model.activation_offload", "needs whole weights on every device", "hardware.sharding=none")
    if settings["optim"]["name"] in ("muon", "adafactor", "adamw8bit") and not whole:
        yield broken("optim.name", "needs whole weights on every device: hardware.sharding=none", "optim.name=adamw")
    if adapter == "lora" and kept and not whole:
        yield broken("model.lora.modules_to_save", "needs whole weights on every device", "hardware.sharding=none")
    if adapter == "lora" and settings["model"]["lora"]["targets"] == []:
        yield broken("model.lora.targets", "names no layer to adapt", "for all linear layers:  [all-linear]")


def mixture(settings: Settings) -> Iterator[Broken]:
    sources, ratio = settings["data"]["sources"], settings["data"]["ratio"]
    if not sources:
        advice = "+data.sources.mine.path=rows.jsonl", "or a mixture that has some:  data=mix"
        yield broken("data.sources", "the mixture has no sources", *advice)
    elif all(source.get("share") == 0 for source in sources.values()):
        yield broken("data.sources", "every share is 0")
    kinds = [source.get("kind") for source in sources.values()]
    if ratio is not None and kinds and None not in kinds:  # where kinds are named, the ratio must have two sides
        shown = kinds.count("demonstration") + kinds.count("negatives")
        if (ratio < 1 and shown == len(kinds)) or (ratio > 0 and shown == 0):
            side = "demonstrations only" if shown else "no demonstrations"
            why = f"shares between demonstrations and the rest, and the mixture has {side}"
            yield broken("data.ratio", why)


def sources(settings: Settings) -> Iterator[Broken]:
    """Keys of a source about its rows (which are held out, which part is read, their scores), and amounts of rows."""
    for name, source in settings["data"]["sources"].items():
        key = f"data.sources.{name}"
        ways = [way for way in ("holdout", "eval_path", "eval_split") if source.get(way) is not None]
        if len(ways) > 1:
            why = f"and {ways[0]} both say which rows are for evaluation: give one"
            yield broken(f"{key}.{ways[1]}", why)
        part = source.get("part")
        if part is not None and slice_bounds(part, 0) is None:
            why = "must be r/n, the r-th of n slices; round has a meaning in a run of rounds alone"
            yield broken(f"{key}.part", why, "rounds=3") if part == "round" else broken(f"{key}.part", why)
        ends = source.get("score_range")
        if ends is not None and not (len(ends) == 2 and ends[0] < ends[1]):
            yield broken(f"{key}.score_range", "must be [lowest, highest]")
    of_sources = (f"data.sources.{name}.holdout" for name in settings["data"]["sources"])
    for key in ("select.rows", "data.holdout", *of_sources):
        amount = value_at(settings, tuple(key.split(".")))
        if amount is not None and amount > 1 and amount != int(amount):
            yield broken(key, "must be a share below 1 or a whole number of rows")


def names(settings: Settings) -> Iterator[Broken]:
    """Names that become folders, and names of sources, which stand in the names of metrics and of files."""
    model, path = str(settings["model"]["name"]), settings["model"]["path"]
    if "/" in model:
        yield broken("model.name", f"is a word for run names, and {path} is what is trained", f"model.path={model}")
    for key, name in (("run.name", settings["run"]["name"]), ("sweep.name", settings["sweep"]["name"])):
        bad = sorted(set(str(name or "")) & set("/\\=,"))
        if bad or name in ("", ".", ".."):
            yield broken(key, "names a folder", f"without {listing(bad)}" if bad else "give it a real name")
        elif name is not None:
            yield from _plain_name(key, name)
    for part in str(settings["run"]["dir"] or "").split("/"):
        yield from _plain_name("run.dir", part)
    for name in settings["data"]["sources"]:
        key = f"data.sources.{name}"
        if set(name) & set("/\\") or name in ("", ".", ".."):
            yield broken(key, "names files and metrics", "without / and \\")
        else:
            yield from _plain_name(key, name)


def _plain_name(key: str, name: str) -> Iterator[Broken]:
    if not name.isprintable():
        why = "has a character that cannot be shown"
        yield broken(key, why, "letters, digits and -_.+ are fine")
    elif len(name.encode()) > LONGEST_FILE_NAME:
        yield broken(key, f"is too long for a file's name: at most {LONGEST_FILE_NAME} bytes")


def no_secret(settings: Settings) -> Iterator[Broken]:
    """A configuration is written down, sent to W&B and compared by others."""
    known = secrets()
    for key, value in flat({**settings, "stages": {}}):
        texts = list(value) if isinstance(value, list) else [value]
        if key == "run.dir":
            texts += str(value or "").split("/")  # the last part names the run, and others may name a sweep
        what = next((found for text in texts if isinstance(text, str) and (found := secret_in(text, known))), None)
        if what:
            why = f"holds {what}, and configurations are written down"
            yield broken(key, why, "leave it in the environment")


def machines(settings: Settings) -> Iterator[Broken]:
    nodes, rank = settings["hardware"]["nodes"] or 1, settings["hardware"]["node_rank"]
    if rank is not None and rank >= nodes:
        yield broken("hardware.node_rank", f"counts from 0 to {nodes - 1}: hardware.nodes={nodes}")
    pool, processes = settings["hardware"]["pool"], settings["hardware"]["processes"] or 1
    if pool is not None and len(set(pool)) < max(processes, len(pool)):
        why = f"must be different numbers, at least {processes}: hardware.processes"
        yield broken("hardware.pool", why)


def rollouts(settings: Settings) -> Iterator[Broken]:
    """Completions that the policy samples while it trains: whether the objective wants them, and all the rest does."""
    rollout, objective = settings["rollout"], settings["objective"]
    if None in (rollout["completions"], rollout["reward"]) or objective.get("method") not in parameters():
        return
    made = objective_of(objective)
    name, least, many = objective.get("name"), made.needs.rollouts, rollout["completions"]
    if many < least:
        why = f"objective={name} learns from at least {least} completions of its own for each prompt"
        yield broken("rollout.completions", why, "rollout.completions=8")
    if not many:
        return
    if "rollout" not in {kind.value for kind in made.views}:
        why = f"objective={name} takes no completions of its own"
        yield broken("rollout.completions", why, "rollout.completions=0")
    rows, prompts = settings["train"]["batch_size"], rollout["prompts"]
    if rows is not None and prompts is not None and prompts % rows:
        yield broken("rollout.prompts", f"must be a multiple of train.batch_size={rows}")
    weights = [weight for weight in rollout["reward"].values() if weight is not None]
    if any(weight < 0 for weight in weights) or sum(weights) > 1 + 1e-9:
        yield broken("rollout.reward", "its weights must be at least 0 and add up to at most 1: scores lie in [0, 1]")
    plain = (rollout["temperature"], rollout["top_k"], rollout["top_p"]) == (1.0, 0, 1.0)
    if objective.get("sampler_cap") is not None and not plain:
        why = "log-probs of the sampler are those of the policy at temperature 1 without filters only"
        yield broken("objective.sampler_cap", why, "rollout.temperature=1 rollout.top_k=0 rollout.top_p=1")
    if settings["hardware"]["sharding"] == "full" and rollout["engine"] != "own":
        yield broken("rollout.engine", "cannot sample from a sharded model", "rollout.engine=own")
    if rollout["engine"] == "vllm" and find_spec("vllm") is None:
        yield broken("rollout.engine", "needs vLLM, which is not installed", "pip install 'uft-lm[vllm]'")
    if rollout["truncated"] == "mask" and hasattr(made, "own"):
        why = f"leaves one side of a pair empty, and objective={name} learns from pairs"
        yield broken("rollout.truncated", why, "rollout.truncated=keep")
    if rollout["refill"] and many == 1:
        yield broken("rollout.refill", "replaces groups of equal scores, as every group of one is", "rollout.refill=0")
    if rollout["refill"] and settings["data"]["exhaustion"] == "first":
        yield broken("rollout.refill", "draws further rows, and data.exhaustion=first ends where they do")
    if rollout["refill"] and settings["train"]["steps"] is None:
        yield broken("rollout.refill", "draws further rows, so that passes say nothing", "train.steps=...")


def objective(settings: Settings) -> Iterator[Broken]:
    """The keys of an objective that contradict each other, by its own `problems`, and a teacher that is not there."""
    if settings["objective"].get("method") not in parameters():
        return
    made = objective_of(settings["objective"])
    for key, why in made.problems():
        yield broken(f"objective.{key}", why)
    if settings["teacher"]["path"] is None and made.needs.teacher:
        why, advice = "names the model to learn from, and is not given", "teacher.path=some/model"
        yield broken("teacher.path", why, f"{advice}   (a folder or a hub id)")


def rewards(settings: Settings) -> Iterator[Broken]:
    """The run's reward and the checkers of its sources, each by its own `problems`."""
    from uft.rewards import problems_with

    named = {f"data.sources.{name}.checker": s.get("checker") for name, s in settings["data"]["sources"].items()}
    yield from problems_with(settings["reward"], named)


def tracking(settings: Settings) -> Iterator[Broken]:
    tracker = settings["tracking"]["tracker"]
    if tracker in ("tensorboard", "trackio") and find_spec(tracker) is None:
        yield broken("tracking.tracker", f"{tracker} is not installed", f"pip install 'uft-lm[{tracker}]'")


RULES: tuple[Callable[[Settings], Iterator[Broken]], ...]
RULES = (numbers, adapters, mixture, sources, names, no_secret, machines, tracking, rollouts, objective, rewards)
