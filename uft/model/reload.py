"""The exported folder is the policy: what plain transformers makes of it is compared with the policy in memory.

    python -m uft.model.reload FOLDER < request.json > answers.json

`answers` imports nothing of uft: neither its attention, nor its head, nor its merging of adapters has a part in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from uft.data.batch import Batch
    from uft.data.chat import Tokens
    from uft.model.policy import Policy
    from uft.objectives.base import ForwardOutput

NEW_TOKENS = 16  # of every greedy answer
OWN_PROCESS = 20_000_000
"""Parameters from which the folder is loaded in a process of its own: of a smaller model, imports would cost more."""
RELOAD_TIMEOUT = 3600.0  # seconds, for a large model on the CPU

TOLERANCE = {"float32": (5e-4, 2e-4), "bfloat16": (5e-2, 3e-2)}
"""Largest and mean difference of log-probs, each by unit of their own largest and mean size; by the narrowest precision
of the forward, the policy's weights and the folder: rounding, no more."""
ROUNDING = 3
"""How many times the difference that bfloat16 makes to plain transformers itself, on these rows, may be that of a
policy or a folder in bfloat16: it grows with the number of layers, and no constant bounds it."""
AS_LIKELY = 4  # times the first of them: difference of two tokens' log-probs of which either may be the greedy one


def answers(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of the targets of every row, and the greedy answer to every prompt, by transformers alone in float32.

    `request`: rows of {"ids", "targets" (positions)}, prompts of ids, trust_remote_code, and whether to tell log-probs
    in bfloat16 as well (`rounded`). `error`: an answer that transformers could not generate.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    result: dict[str, Any] = {"greedy": [], "rounded": [], "error": ""}
    options = {"local_files_only": True, "trust_remote_code": request["trust_remote_code"]}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)
    model.eval()

    def log_probs_of(row: dict[str, Any]) -> list[float]:
        ids, targets = torch.tensor([row["ids"]]), torch.tensor(row["targets"])
        log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        return log_probs[targets - 1, ids[0, targets]].tolist()

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        result["log_probs"] = [log_probs_of(row) for row in request["rows"]]
        eos = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig()  # its own, as a penalty of repetitions, would be laid under ours
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=request["new_tokens"], eos_token_id=eos, pad_token_id=request["pad_id"]
        )
        try:
            for prompt in request["prompts"]:
                ids = torch.tensor([prompt])
                answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
                result["greedy"].append(answer[0, len(prompt) :].tolist())
        except Exception as error:  # of a model whose cache plain transformers cannot handle either
            result["error"] = f"{type(error).__name__}: {error}"
        if request["narrow"]:
            model.to(torch.bfloat16)
            result["rounded"] = [log_probs_of(row) for row in request["rows"]]
    return result


def compare(
    policy: Policy,
    folder: Path,
    rows: Sequence[Tokens],
    pad_id: int,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> tuple[str, str]:
    """(what differs between the folder and the policy, why it could not be compared); "" each where there is nothing.

    `dtype`: the precision of the folder. All ranks call it; rank 0 loads the folder.
    """
    from uft.distributed import ranks

    positions = getattr(policy.base.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    rows = [one for one in rows if one.targets and one.prompt_length]
    short = [one for one in rows if one.prompt_length + NEW_TOKENS <= positions]
    narrow = dtype == "bfloat16" or (policy.dtype == "bfloat16" and not _can_widen(policy))
    request: dict[str, Any] = {
        "rows": [{"ids": one.ids.tolist(), "targets": (one.supervised[1:].nonzero()[0] + 1).tolist()} for one in rows],
        "prompts": [one.ids[: one.prompt_length].tolist() for one in short[:2]],
        "new_tokens": NEW_TOKENS,
        "pad_id": pad_id,
        "trust_remote_code": trust_remote_code,
        "narrow": narrow,
    }
    alone = policy.size >= OWN_PROCESS
    result = ranks().on_rank0(lambda: _answered(folder, request, alone))
    if result.get("broken"):
        return f"transformers cannot load it: {result['broken']}", ""
    if "log_probs" not in result:
        return "", result["error"]
    training = policy.module.training
    policy.eval()
    try:
        with _widened(policy):
            return _difference(policy, rows, request["prompts"], result, narrow), result["error"]
    finally:
        policy.train(training)


def _can_widen(policy: Policy) -> bool:
    """Whether the policy can multiply in float32: its weights are, no shard casts them, and its attention does."""
    plain = all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in policy.module.parameters())
    return plain and "flash" not in policy.attention


@contextmanager
def _widened(policy: Policy) -> Iterator[None]:
    """Within, a policy that can multiply in float32 does: what is compared is weights, and not how they are rounded."""
    kept = policy.dtype, policy.head
    if policy.dtype == "float32" or not _can_widen(policy):
        yield
        return
    policy.dtype, policy.head = "float32", policy.head and replace(policy.head, dtype=torch.float32)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would be compiled again
            yield
    finally:
        policy.dtype, policy.head = kept


@torch.no_grad()
def _difference(
    policy: Policy, rows: Sequence[Tokens], prompts: Sequence[list[int]], result: Mapping[str, Any], narrow: bool
) -> str:
    from uft.model.policy import idle_adapters

    pairs = zip(result["rounded"] or result["log_probs"], result["log_probs"], strict=True)
    rounding = [_statistics(one, other) for one, other in pairs]
    limits = TOLERANCE["bfloat16" if narrow else "float32"]
    least = [ROUNDING * max(of_rows) for of_rows in zip(*rounding, strict=True)] or [0.0, 0.0]
    for number, (row, theirs) in enumerate(zip(rows, result["log_probs"], strict=True), 1):
        batch = _batch(policy, row.ids, row.supervised)
        ours = policy(batch).log_probs.tolist()
        apart, sizes = _statistics(ours, theirs), _statistics(ours, [0.0] * len(ours))
        most = [max(limit * max(1.0, size), one) for limit, size, one in zip(limits, sizes, least, strict=True)]
        if not all(one <= limit for one, limit in zip(apart, most, strict=True)):  # nor where it is not a number
            why = f"log-probs of row {number} of {len(rows)} differ by up to {apart[0]:.2g}, {apart[1]:.2g} on average"
            idle = ", ".join(idle_adapters(policy, batch)[:3])
            return f"{why} (the model does not call layers that have an adapter: {idle})" if idle else why
    answers_of = zip(prompts, result["greedy"], strict=False)
    as_likely = AS_LIKELY * max(limits[0], least[0])
    return next(filter(None, (_other_answer(policy, *pair, as_likely) for pair in answers_of)), "")


def _statistics(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The largest and the mean difference."""
    apart = np.abs(np.subtract(ours, theirs))
    return float(apart.max()), float(apart.mean())


def _other_answer(policy: Policy, prompt: list[int], answer: list[int], as_likely: float) -> str:
    """Why a greedy answer is not the policy's: each of its tokens is its likeliest one, or as likely up to rounding."""
    from uft.objectives.base import ForwardRequest

    def output(ids: list[int], argmax: bool) -> ForwardOutput:
        supervised = [place >= len(prompt) for place in range(len(ids))]
        return policy(_batch(policy, ids, supervised), ForwardRequest(argmax=argmax))

    given = output(prompt + answer, argmax=True)
    assert given.argmax is not None
    best = given.argmax.tolist()
    place = next((i for i, (ours, theirs) in enumerate(zip(best, answer, strict=True)) if ours != theirs), None)
    if place is None:
        return ""
    other = output([*prompt, *answer[:place], best[place]], argmax=False)
    gap = float(other.log_probs[-1] - given.log_probs[place])
    return f"a greedy answer differs at its token {place + 1}, by {gap:.2g} in log-prob" if gap > as_likely else ""


def _batch(policy: Policy, ids: Any, supervised: Any) -> Batch:
    from uft.data.batch import sequence_batch

    sequence = (np.asarray(ids, np.int32), np.asarray(supervised, bool))
    return sequence_batch([sequence], 0, policy.layout).to(policy.device)  # one sequence is never padded


def _answered(folder: Path, request: dict[str, Any], alone: bool) -> dict[str, Any]:
    """`answers`, of a process of its own if `alone`; else `broken` says why the folder cannot be loaded, or `error` why
    there is no answer."""
    try:
        return _of_own_process(folder, request) if alone else answers(str(folder), request)
    except MemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        return {"broken": str(error) or type(error).__name__}


def _of_own_process(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    from uft.heartbeat import beat

    command = [sys.executable, "-P", "-m", "uft.model.reload", str(folder)]
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    own |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    deadline, pipe = time.monotonic() + RELOAD_TIMEOUT, subprocess.PIPE
    text: str | None = json.dumps(request)
    with subprocess.Popen(command, env=own, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        while True:
            try:
                out, errors = process.communicate(text, timeout=5)
                break
            except subprocess.TimeoutExpired:
                text = None  # it was sent
                beat()
                if time.monotonic() > deadline:
                    process.kill()
                    return {"error": f"it took more than {RELOAD_TIMEOUT:.0f} seconds"}
    if process.returncode < 0:
        return {"error": f"its process was killed by signal {-process.returncode}, perhaps for its memory"}
    if process.returncode:
        raise RuntimeError((errors.strip().splitlines() or ["no word"])[-1])
    return json.loads(out.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(answers(sys.argv[1], json.load(sys.stdin))))
