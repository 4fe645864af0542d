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
from collections.abc import Mapping, Sequence
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
AS_LIKELY = 4  # times the first of them: difference of two tokens' log-probs of which either may be the greedy one


def answers(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of the targets of every row, and the greedy answer to every prompt, by transformers alone in float32.

    `request`: rows of {"ids", "targets" (positions)}, prompts of ids, trust_remote_code. `error`: an answer that
    transformers could not generate.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    found: dict[str, Any] = {"log_probs": [], "greedy": [], "error": ""}
    options = {"local_files_only": True, "trust_remote_code": request["trust_remote_code"]}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for row in request["rows"]:
            ids, targets = torch.tensor([row["ids"]]), torch.tensor(row["targets"])
            log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
            found["log_probs"].append(log_probs[targets - 1, ids[0, targets]].tolist())
        eos = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig()  # its own, as a penalty of repetitions, would be laid under ours
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=request["new_tokens"], eos_token_id=eos, pad_token_id=request["pad_id"]
        )
        try:
            for prompt in request["prompts"]:
                ids = torch.tensor([prompt])
                answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
                found["greedy"].append(answer[0, len(prompt) :].tolist())
        except Exception as error:  # of a model whose cache plain transformers cannot handle either
            found["error"] = f"{type(error).__name__}: {error}"
    return found


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
    request: dict[str, Any] = {
        "rows": [{"ids": one.ids.tolist(), "targets": (one.supervised[1:].nonzero()[0] + 1).tolist()} for one in rows],
        "prompts": [one.ids[: one.prompt_length].tolist() for one in short[:2]],
        "new_tokens": NEW_TOKENS,
        "pad_id": pad_id,
        "trust_remote_code": trust_remote_code,
    }
    parameters = list(policy.module.parameters())
    alone = policy.size >= OWN_PROCESS
    found = ranks().on_rank0(lambda: _answered(folder, request, alone))
    if found.get("broken"):
        return f"transformers cannot load it: {found['broken']}", ""
    if "log_probs" not in found:
        return "", found["error"]
    narrow = "bfloat16" in (policy.dtype, dtype) or any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    tolerance = TOLERANCE["bfloat16" if narrow else "float32"]
    training = policy.module.training
    policy.eval()
    try:
        return _difference(policy, rows, request["prompts"], found, tolerance), found["error"]
    finally:
        policy.train(training)


@torch.no_grad()
def _difference(
    policy: Policy,
    rows: Sequence[Tokens],
    prompts: Sequence[list[int]],
    found: Mapping[str, Any],
    tolerance: tuple[float, float],
) -> str:
    for number, (row, theirs) in enumerate(zip(rows, found["log_probs"], strict=True), 1):
        if why := _other_log_probs(policy, row, theirs, tolerance):
            return f"log-probs of row {number} of {len(rows)} {why}"
    answers_of = zip(prompts, found["greedy"], strict=False)
    differing = (_other_answer(policy, *pair, AS_LIKELY * tolerance[0]) for pair in answers_of)
    return next(filter(None, differing), "")


def _other_log_probs(policy: Policy, row: Tokens, theirs: list[float], tolerance: tuple[float, float]) -> str:
    from uft.model.policy import idle_adapters

    batch = _batch(policy, row.ids, row.supervised)
    ours = policy(batch).log_probs.float().cpu()
    difference, size = (ours - torch.tensor(theirs)).abs(), ours.abs()
    largest, mean = float(difference.max()), float(difference.mean())
    most = [limit * max(1.0, float(of)) for limit, of in zip(tolerance, (size.max(), size.mean()), strict=True)]
    if largest <= most[0] and mean <= most[1]:  # false for what is not a number
        return ""
    why = f"differ by up to {largest:.2g}, {mean:.2g} on average"
    idle = ", ".join(idle_adapters(policy, batch)[:3])
    return f"{why} (the model does not call layers that have an adapter: {idle})" if idle else why


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
