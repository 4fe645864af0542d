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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from uft.data.chat import Tokens
    from uft.model.policy import Policy

NEW_TOKENS = 16  # of every greedy answer
OWN_PROCESS = 20_000_000
"""Parameters from which the folder is loaded in a process of its own: of a smaller model, imports would cost more."""
PATIENCE = 3600.0  # seconds, for a large model on the CPU

TOLERANCE = {"float32": (2e-3, 1e-3), "bfloat16": (0.5, 0.05)}
"""Largest and mean difference of a token's log-prob by the precision of forward or folder: rounding, no more."""


def answers(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of the targets of every row, and the greedy answer to every prompt, by transformers alone in float32.

    `request`: rows of {"ids", "targets" (positions)}, prompts of ids, trust_remote_code. `error`: an answer that
    transformers could not generate.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    found: dict[str, Any] = {"log_probs": [], "greedy": [], "error": ""}
    options = {"local_files_only": True, "trust_remote_code": request["trust_remote_code"]}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for row in request["rows"]:
            ids, targets = torch.tensor([row["ids"]]), torch.tensor(row["targets"])
            log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
            found["log_probs"].append(log_probs[targets - 1, ids[0, targets]].tolist())
        eos = model.generation_config.eos_token_id
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
    from uft.data.batch import Batch, sequence_batch
    from uft.distributed import ranks
    from uft.model.policy import idle_adapters
    from uft.objectives.base import ForwardRequest

    tolerance = TOLERANCE["bfloat16" if "bfloat16" in (policy.dtype, dtype, *stored(policy)) else "float32"]
    request = {
        "rows": [{"ids": one.ids.tolist(), "targets": (one.supervised[1:].nonzero()[0] + 1).tolist()} for one in rows],
        "prompts": [one.ids[: one.prompt_length].tolist() for one in rows[:2]],
        "new_tokens": NEW_TOKENS,
        "pad_id": pad_id,
        "trust_remote_code": trust_remote_code,
    }
    alone = sum(parameter.numel() for parameter in policy.module.parameters()) >= OWN_PROCESS
    found = ranks().on_rank0(lambda: _answered(folder, request, alone))
    if found.get("broken"):
        return f"transformers cannot load it: {found['broken']}", ""
    if "log_probs" not in found:
        return "", found["error"]

    def batch_of(ids: list[int], supervised: Sequence[bool]) -> Batch:
        sequence = (np.asarray(ids, np.int32), np.asarray(supervised, bool))
        return sequence_batch([sequence], pad_id, policy.layout).to(policy.device)

    training = policy.module.training
    policy.eval()
    try:
        with torch.no_grad():
            for number, (row, theirs) in enumerate(zip(rows, found["log_probs"], strict=True)):
                batch = batch_of(row.ids.tolist(), row.supervised.tolist())
                difference = (policy(batch).log_probs.float().cpu() - torch.tensor(theirs)).abs()
                if difference.max() <= tolerance[0] and difference.mean() <= tolerance[1]:
                    continue
                idle = ", ".join(idle_adapters(policy, batch)[:3])
                return (
                    f"log-probs of row {number + 1} of {len(rows)} differ by up to {float(difference.max()):.2g}, "
                    f"{float(difference.mean()):.2g} on average"
                    + (f" (the model does not call layers that have an adapter: {idle})" if idle else "")
                ), ""
            for number, answer in enumerate(found["greedy"]):
                prompt: list[int] = rows[number].ids[: rows[number].prompt_length].tolist()
                mask = [False] * len(prompt) + [True] * len(answer)
                output = policy(batch_of(prompt + answer, mask), ForwardRequest(argmax=True))
                assert output.argmax is not None
                best = output.argmax.tolist()
                place = next((i for i, (a, b) in enumerate(zip(best, answer, strict=True)) if a != b), None)
                if place is None:
                    continue
                # another token than the policy's best one: rounding, if the two are as likely
                other = policy(batch_of(prompt + answer[:place] + [best[place]], mask[: len(prompt) + place + 1]))
                gap = float(other.log_probs[-1] - output.log_probs[place])
                if gap > tolerance[0]:
                    return f"a greedy answer differs at its token {place + 1}, by {gap:.2g} in log-prob", ""
    finally:
        policy.module.train(training)
    return "", found["error"]


def stored(policy: Policy) -> set[str]:
    return {str(parameter.dtype).removeprefix("torch.") for parameter in policy.module.parameters()}


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
    deadline, pipe = time.monotonic() + PATIENCE, subprocess.PIPE
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
                    return {"error": f"it took more than {PATIENCE:.0f} seconds"}
    if process.returncode < 0:
        return {"error": f"its process was killed by signal {-process.returncode}, perhaps for its memory"}
    if process.returncode:
        raise RuntimeError((errors.strip().splitlines() or ["no word"])[-1])
    return json.loads(out.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(answers(sys.argv[1], json.load(sys.stdin))))
