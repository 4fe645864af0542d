"""Choosing rows of a mixture: the work of the job `select` and of stages that do it, by uft/sampling/select.py.

`scores.jsonl` has a line for every candidate: `source`, `index`, `score`, `rank` (1 is the best; null: not kept) and
`picked`. `past.npz` is what a later selection must not choose again: the prompts of this one and of those before it,
and for active_dpo the features of their pairs, which V remembers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from uft.config.schema import Config
from uft.data.chat import Renderer, Tokens
from uft.data.rows import Row
from uft.data.sources import LoadedSource, load_sources
from uft.data.table import prompt_words
from uft.data.tokens import tokenize
from uft.errors import Problem, UftError
from uft.heartbeat import activity
from uft.model.load import load_tokenizer
from uft.runs import write_atomically
from uft.sampling.select import TAKES, Picked, active_dpo, count_of, pair_features, pds, pick, random_scores, top_scores
from uft.training.dataset import make_renderer
from uft.training.setup import Work, loaded_policy
from uft.training.trainer import tokens_per_pass

PAST_FILE = "past.npz"


@activity("rows were chosen", moving=True)
def choose_rows(work: Work, sources: Sequence[LoadedSource], out: Path) -> tuple[list[Row], dict[str, int]]:
    """(the rows that `config.select` chooses of the training rows of `sources`, in their order; counts of candidates).

    Writes `scores.jsonl` of all candidates and `past.npz` for a later selection into the folder `out`, by rename.
    Raises UftError about the rows and what a method needs, and Interrupted when told to stop.
    """
    config, settings, by = work.config, work.config.select, str(work.config.select.by)
    rows = [row for source in sources for row in source.rows]
    past = read_past(settings.past, settings.dim)
    known = set(past["prompts"].tolist())
    fresh = [row for row, word in zip(rows, prompt_words(rows), strict=True) if word not in known]
    renderer = make_renderer(load_tokenizer(config.model), config.data) if by in TAKES else None
    taken, tokens = taken_by(by, fresh, renderer, config) if renderer else (fresh, [])
    counts = {"candidates": len(taken), "chosen_before": len(rows) - len(fresh), "unfit": len(fresh) - len(taken)}
    work.say(f"select.by={by}: " + ", ".join(f"{name} {number:,}" for name, number in counts.items()))
    if not taken:
        why = "none of the rows is a candidate: active_dpo takes pairs and scored completions, pds good completions"
        raise UftError(Problem(f"select.by={by}", why, advice=("uft data ... shows the kinds of the rows",)))
    count = count_of(settings.rows, len(taken))
    if renderer:
        picked = picked_by_model(work, renderer, tokens, past["phi"], count)
    else:
        picked = pick(random_scores(taken, settings.seed) if by == "random" else top_scores(taken), count)
    rank = {place: number for number, place in enumerate(picked.places, 1)}
    lines = [
        {"source": row.source, "index": row.index, "score": float(score), "rank": rank.get(n), "picked": n in rank}
        for n, (row, score) in enumerate(zip(taken, picked.scores, strict=True))
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "scores.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    chosen = [taken[place] for place in sorted(rank)]
    phi = past["phi"] if picked.features is None else np.concatenate([past["phi"], picked.features])
    prompts, file = np.concatenate([past["prompts"], np.array(prompt_words(chosen), np.uint64)]), io.BytesIO()
    np.savez(file, prompts=prompts, phi=phi)
    write_atomically(out / PAST_FILE, file.getvalue())
    return chosen, counts


def taken_by(
    by: str, rows: Sequence[Row], renderer: Renderer, config: Config
) -> tuple[list[Row], list[tuple[Tokens, ...]]]:
    """The rows of which a method takes something, and the tokens of that. Longer ones than `train.max_length` are told
    as an error, cut or left out by `data.too_long`."""
    found = [row for row in rows if TAKES[by](row)]
    shown = [replace(row, completions=tuple(row.completions[p.completion] for p in TAKES[by](row))) for row in found]
    encoded = tokenize("rows", shown, renderer, config.train.max_length, config.data.too_long).encoded
    return [found[place] for place in encoded.numbers], list(encoded)


def picked_by_model(
    work: Work, renderer: Renderer, rows: Sequence[tuple[Tokens, ...]], past: np.ndarray, count: int
) -> Picked:
    """The choice of a method that runs the model."""
    config, settings = work.config, work.config.select
    if config.model.adapter == "lora":
        work.say("caution: a fresh adapter sees the input through random numbers alone; better:  model.adapter=none")
    policy = loaded_policy(config, work.device, renderer.tokenizer)
    if settings.by == "active_dpo":
        phi = pair_features(policy, [(one, other) for one, other in rows], settings, work.stop)
        return active_dpo(phi, past, settings, count)
    name = str(settings.dev)
    (dev,) = load_sources(replace(config.data, sources={name: config.data.sources[name]}))
    _, trusted = taken_by("pds", dev.rows[: settings.batch], renderer, config)
    if not trusted:
        why = f"none of its first {settings.batch} rows has a good completion"
        raise UftError(Problem(f"select.dev={name}", why))
    return pick(pds(policy, rows, trusted, settings, tokens_per_pass(config), work.stop), count)


def read_past(folder: str | None, dim: int) -> dict[str, np.ndarray]:
    """`prompts` (p,) uint64 of earlier picks and `phi` (q, dim) float32, of a folder that a selection wrote."""
    if folder is None:
        return {"prompts": np.zeros(0, np.uint64), "phi": np.zeros((0, dim), np.float32)}
    try:
        with np.load(Path(folder) / PAST_FILE, allow_pickle=False) as found:
            past = {name: found[name] for name in ("prompts", "phi")}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UftError(Problem(f"select.past={folder}", f"holds no selection: {error}")) from error
    if len(past["phi"]) and past["phi"].shape[1] != dim:
        raise UftError(Problem(f"select.dim={dim}", f"the selection in {folder} was made with {past['phi'].shape[1]}"))
    return past if len(past["phi"]) else past | {"phi": np.zeros((0, dim), np.float32)}
