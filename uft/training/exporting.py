"""Export of a model: its folder with its card, compared with the policy that was trained; and what other programs read.

At the end of a run, and by `uft export` of a run or of any checkpoint.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from uft.config.frozen import to_config
from uft.config.schema import Config, Model
from uft.config.stages import without_stages
from uft.data.chat import Renderer, Tokens
from uft.data.rows import Message
from uft.errors import Problem, UftError
from uft.model.export import export, older_reader
from uft.model.gguf import modelfile, require_described, write_gguf
from uft.model.load import (
    checkpoint_config,
    checkpoint_policy,
    load_policy,
    load_tokenizer,
    locate,
    model_config,
    pad_id,
    with_template,
)
from uft.model.policy import DTYPES, Policy
from uft.model.reload import compare
from uft.runs import Run, WeightsSource, checkpoints_of, shown
from uft.tracking.metrics import read_samples
from uft.training.card import ModelCard
from uft.training.dataset import make_renderer
from uft.training.setup import Say

CHECKED, CHECKED_TOKENS = 12, 512  # sequences on which an exported model is tried, and the tokens of each at most
QUESTIONS = {"What is the capital of France?": "Paris.", "Count to three.": "one two three"}


def export_checked(
    policy: Policy,
    renderer: Renderer,
    config: Config,
    rows: Sequence[Tokens],
    folder: Path,
    dtype: torch.dtype,
    card: ModelCard | None,
    say: Say,
) -> None:
    """Write the model to `folder` if plain transformers says on `rows` what the policy in memory says.

    `train.check_model=false` leaves the comparison out. The tokenizer has the template that was trained with.
    Raises UftError where the folder is not the policy.
    """
    template = "plain" if renderer.name == "plain" else config.data.template  # as it was trained, plain has none
    tokenizer = with_template(copy.deepcopy(renderer.tokenizer), template)
    tried = [row for row in rows if row.prompt_length < CHECKED_TOKENS][:CHECKED]
    tried = [replace(r, ids=r.ids[:CHECKED_TOKENS], supervised=r.supervised[:CHECKED_TOKENS]) for r in tried]

    def problem(beside: Path) -> str:
        if not config.train.check_model:
            return ""
        remote, name = config.model.trust_remote_code, "float32" if dtype == torch.float32 else "bfloat16"
        why, unknown = compare(policy, beside, tried, pad_id(tokenizer), dtype=name, trust_remote_code=remote)
        if unknown:
            say(f"the exported model was not wholly compared with the one in memory: {unknown}")
        return why

    text = card.text if card else None
    export(policy, tokenizer, folder, dtype, stop_ids=renderer.stop_ids, problem=problem, card=text)


@dataclass(frozen=True)
class Export:
    """Options of `uft export`."""

    to: Path
    dtype: str = "float32"  # float32, bfloat16, or model: that of the model it was trained from
    adapter: bool = False  # the LoRA adapter alone, for PEFT
    gguf: bool = False
    ollama: bool = False


def export_run(source: WeightsSource, wanted: Export, say: Say) -> None:
    """Write the weights of a run to a new folder, check them, and tell what was made.

    Raises UftError, before anything is written, where the folder is there already or the weights cannot be exported in
    this form, and where what was written is not what was trained.
    """
    run, to = source.run, wanted.to
    assert run is not None
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        advice = ("another folder, or remove this one",)
        raise UftError(Problem(f"--to {shown(to)}", "is there already, and is not replaced", advice=advice))
    if wanted.adapter and (wanted.gguf or wanted.ollama):
        raise UftError(Problem("--adapter", "is a part of a model, and GGUF holds a whole one", "command line"))
    described = wanted.gguf or wanted.ollama
    if described and find_spec("gguf") is None:
        advice = ("pip install 'uft-lm[gguf]'",)
        raise UftError(Problem("--gguf", "needs the package gguf, which is not installed", advice=advice))
    config, policy = trained_policy(source)
    if wanted.adapter and not policy.has_adapter:
        raise UftError(Problem("--adapter", f"{source.name} was trained without one", advice=("leave --adapter out",)))
    renderer = make_renderer(load_tokenizer(config.model), config.data)
    if described:  # before anything is written
        require_described(policy.base.config, renderer.tokenizer)
    dtype = DTYPES.get(wanted.dtype) or getattr(model_config(config.model), "dtype", None) or torch.float32
    card = ModelCard(run, config, int(source.step or 0), renderer.name != "plain")
    say(f"{source.name}: exporting to {shown(to)}")
    rows = conversations(run, renderer)
    export_checked(policy, renderer, config, rows, to, dtype, card, say)
    if config.train.check_model:
        what = f"log-probs of {min(len(rows), CHECKED)} conversations and greedy answers"
        say(f"read back with plain transformers: {what} are those of the run, up to rounding")
    if wanted.adapter:  # it stands beside the merged model, which goes
        for path in [*to.glob("*.safetensors*"), to / "config.json", to / "generation_config.json"]:
            path.unlink(missing_ok=True)
        for path in (to / "adapter").iterdir():
            shutil.move(str(path), to / path.name)
        (to / "adapter").rmdir()
    elif why := older_reader(to):
        say(f"transformers 4.57 may read it as another model: {why}")
    file = to / f"{to.resolve().name}.gguf"
    if described:
        try:
            difference = write_gguf(to, file)
        except UftError:
            say(f"the Hugging Face folder is whole: {shown(to)}")
            raise
        say(f"{shown(file)}: read back with transformers, log-probs differ by {difference:.1g} at most")
    if wanted.ollama:
        stops = [str(renderer.tokenizer.decode([token])) for token in sorted(renderer.stop_ids)]
        text, missing = modelfile(file.name, load_tokenizer(Model(name="", path=str(to))), stops)
        (to / "Modelfile").write_text(text, encoding="utf-8")
        note = f"   ({missing})" if missing else ""
        say(f"serve it:  cd {shown(to)} && ollama create {file.stem} -f Modelfile{note}")


def trained_policy(source: WeightsSource) -> tuple[Config, Policy]:
    """(configuration, the policy on the CPU as it was trained): the adapter is apart where there is a checkpoint."""
    assert source.run is not None
    place = next((c for c in reversed(checkpoints_of(source.run)) if c.step == source.step), source)
    device = torch.device("cpu")
    if place.is_checkpoint:
        trusted = Model(path=place.path, trust_remote_code=True)
        config = checkpoint_config(locate(trusted), trusted)
        return config, checkpoint_policy(config.model, Path(place.path), device)
    config = to_config(without_stages(source.config) | {"model": source.model})
    return config, load_policy(config.model, device, 0)


def conversations(run: Run, renderer: Renderer) -> list[Tokens]:
    """Conversations that the export is tried on: answers of the run to held-out prompts, and two questions."""
    last = list(read_samples(run).values())[-1:]
    answered = [one for samples in last for one in samples if one["prompt"] and one["reply"].strip()]
    pairs = {one["prompt"]: one["reply"] for one in answered} | QUESTIONS
    turns = (((Message("user", prompt),), (Message("assistant", reply),)) for prompt, reply in pairs.items())
    return [tokens for prompt, reply in turns if (tokens := renderer.encode(prompt, reply)).targets]
