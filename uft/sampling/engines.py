"""Engines: what samples the completions of a rollout (`rollout.engine`).

`own` is :mod:`uft.sampling.generate`, the default and the one that the others are measured by: only its completions
are a function of weights, prompt and number. `transformers` is its continuous batching, in this process. `vllm` is vLLM
in a child process, which gets the weights as a safetensors file before every rollout; this file is that child's program
too: `python -m uft.sampling.engines SETTINGS`.

No engine's log-probs stand in a loss: the trainer computes its own (`old`), and their distance from those recorded here
is logged as `objective/sampler_gap`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from uft.config.schema import Rollout
from uft.data.chat import Renderer
from uft.errors import FAILED, Problem, UftError, first_line
from uft.heartbeat import beat
from uft.model.load import pad_id
from uft.model.policy import DTYPES, Policy, evaluating, preserved_rng
from uft.rewards.isolation import Child
from uft.sampling.generate import Interrupted, Reply, Sampling, complete

MEMORY_SHARE = 0.3
"""Of a GPU's memory, that vLLM may have: the trainer is on the same one."""
PAGE, BATCH_TOKENS = 64, 2048
"""Of transformers: tokens of a page of its cache, and of a forward pass."""


@dataclass(frozen=True)
class EngineContext:
    """The model, the settings and the stop condition of an engine."""

    policy: Policy
    renderer: Renderer
    rollout: Rollout
    seed: int
    longest: int  # tokens of the longest prompt with its completion
    should_stop: Callable[[], bool]

    @property
    def sampling(self) -> Sampling:
        return Sampling.of(self.rollout)

    def seed_of(self, number: int) -> int:
        """For generators of 32 bits. Another one for every completion, as `numbers` are."""
        return (self.seed * 1_000_003 + number) % 2**32


@dataclass
class Engine:
    """Samples the completions of rollouts."""

    context: EngineContext

    def complete(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Reply]:
        """One completion of each prompt by the policy as it is now; `numbers` name them for the randomness.

        Raises Interrupted when told to stop, UftError where the engine fails.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End what runs beside this process."""


def make_engine(context: EngineContext) -> Engine:
    return ENGINES[context.rollout.engine](context)


class Own(Engine):
    """The program's own sampler (:func:`uft.sampling.generate.complete`)."""

    def complete(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Reply]:
        context = self.context
        return complete(
            context.policy,
            prompts,
            context.sampling,
            seed=context.seed,
            stop_ids=context.renderer.stop_ids,
            pad_id=pad_id(context.renderer.tokenizer),
            batch_size=context.rollout.batch_size,
            should_stop=context.should_stop,
            numbers=numbers,
        )


class Continuous(Engine):
    """Continuous batching of transformers. It draws from torch's global generator, which is seeded for each rollout and
    put back afterwards."""

    def complete(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Reply]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        context, sampling = self.context, self.context.sampling
        policy, requests = context.policy, min(context.rollout.batch_size, len(prompts))
        settings = GenerationConfig(
            do_sample=True,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(context.renderer.stop_ids),
            pad_token_id=pad_id(context.renderer.tokenizer),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        batching = ContinuousBatchingConfig(
            return_logprobs=True,
            seed=context.seed_of(numbers[0]),
            max_requests_per_batch=requests,
            page_size=PAGE,  # with the number of blocks: else it takes most of the memory, which the trainer needs
            num_blocks=requests * (context.longest // PAGE + 1) + 1,
            max_batch_tokens=max(BATCH_TOKENS, requests),
            drop_unsupported_processors=False,
            # kernels of flash attention take no float32
            auto_switch_to_flash=next(policy.module.parameters()).dtype != torch.float32,
        )
        kernel = policy.attention_kernel
        with torch.no_grad(), preserved_rng(policy.device), evaluating(policy.module):
            policy.base.set_attn_implementation(policy.attention)  # of packed batches, which only the trainer has
            try:
                with policy.base.continuous_batching_context_manager(
                    generation_config=settings, continuous_batching_config=batching, warmup=policy.device.type == "cuda"
                ) as manager:
                    return self._replies(manager, prompts)
            except (Interrupted, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of a model or a cache that its paged attention does not know
                raise _failed("transformers", first_line(error)) from error
            finally:
                policy.base.set_attn_implementation(kernel)

    def _replies(self, manager: Any, prompts: Sequence[Sequence[int]]) -> list[Reply]:
        """Hand all prompts to transformers' manager and wait for the replies."""
        waiting, replies, most = dict[str, int](), dict[int, Reply](), self.context.sampling.max_new_tokens
        for place, prompt in enumerate(prompts):
            waiting[manager.add_request(list(prompt), max_new_tokens=most)] = place
        while len(replies) < len(prompts):
            beat()
            if self.context.should_stop():
                manager.stop(block=True, hard_stop=True)
                raise Interrupted
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running():
                raise RuntimeError("its thread ended")
            if output is not None and output.error is not None:
                raise RuntimeError(output.error)
            if output is not None and output.is_finished():
                reply = _reply(output.generated_tokens, output.logprobs, self.context.renderer.stop_ids)
                replies[waiting[output.request_id]] = reply
        return [replies[place] for place in range(len(prompts))]


@dataclass
class Vllm(Engine):
    """vLLM in a child process. Lines of JSON go in and come out; the child ends when its input does."""

    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="uft-vllm-")
    )
    child: Child | None = None

    def complete(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Reply]:
        from uft.model.export import plain_model

        context, policy = self.context, self.context.policy
        plain_model(policy, DTYPES[policy.dtype], policy.base.state_dict()).save_pretrained(self.folder.name)
        started = self.child is not None
        if self.child is None:
            self._start()
        request = {
            "reload": started,  # the file is read anew
            "prompts": [list(map(int, prompt)) for prompt in prompts],
            "seeds": [context.seed_of(number) for number in numbers],
            "stop": sorted(context.renderer.stop_ids),
            **asdict(context.sampling),
        }
        return [_reply(ids, log_probs, context.renderer.stop_ids) for ids, log_probs in self._ask(request)]

    def close(self) -> None:
        self._end_child()
        self.folder.cleanup()

    def _start(self) -> None:
        policy = self.context.policy
        settings = {
            "model": self.folder.name,
            "skip_tokenizer_init": True,
            "dtype": policy.dtype,
            "max_model_len": self.context.longest,
            "max_num_seqs": self.context.rollout.batch_size,
            "gpu_memory_utilization": MEMORY_SHARE,
            "logprobs_mode": "processed_logprobs",  # under temperature and filters, as ours
            "generation_config": "vllm",  # nothing of the model's own
            "seed": self.context.seed_of(0),
        }
        search = os.pathsep.join(os.path.abspath(place) for place in sys.path if place)
        env = {**os.environ, "PYTHONPATH": search, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if policy.device.type == "cuda":
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            number = policy.device.index or 0
            env["CUDA_VISIBLE_DEVICES"] = shown.split(",")[number] if shown else str(number)
        words = [sys.executable, "-m", "uft.sampling.engines", json.dumps(settings)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=env, bufsize=0, start_new_session=True)
        self.child = Child(process)

    def _ask(self, request: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        """The child's answer; UftError with its words where it fails."""
        child = self.child
        assert child is not None
        child.send(json.dumps(request).encode() + b"\n")
        while b"\n" not in child.unread:
            if self.context.should_stop():
                self._end_child()
                raise Interrupted
            if not child.receive(1.0):
                self.child, status = None, child.process.wait()
                raise _failed("vllm", f"its process ended with status {status}; what it said is above")
        line, _, child.unread = child.unread.partition(b"\n")
        answer = json.loads(line)
        if isinstance(answer, str):
            self._end_child()
            raise _failed("vllm", answer)
        return [(ids, log_probs) for ids, log_probs in answer]

    def _end_child(self) -> None:
        """End the child, if any, with what it works on; the next rollout starts another."""
        if self.child is not None:
            self.child.close()
            self.child = None


ENGINES: dict[str, type[Engine]] = {"own": Own, "transformers": Continuous, "vllm": Vllm}


def _reply(ids: Sequence[int], log_probs: Sequence[float], stop_ids: frozenset[int]) -> Reply:
    reply = Reply()
    for token, log_prob in zip(ids, log_probs, strict=True):
        reply.add(int(token), float(log_prob), stop_ids)
    return reply


def _failed(engine: str, why: str) -> UftError:
    return UftError(Problem(f"rollout.engine={engine}", f"failed: {why}", advice=("rollout.engine=own",)), code=FAILED)


# --- The child of vLLM: everything here is its interface.


def answer_request(llm: Any, request: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    """(ids with the token that ended them, log-prob of each) for every prompt of a request."""
    from vllm import SamplingParams

    if request["reload"]:
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()  # of the weights before
    each = [
        SamplingParams(
            temperature=request["temperature"],
            top_k=request["top_k"],
            top_p=request["top_p"],
            max_tokens=request["max_new_tokens"],
            stop_token_ids=request["stop"],
            ignore_eos=True,  # of the model's own settings: the template's tokens end a reply
            seed=seed,
            logprobs=0,  # that of the token alone
            detokenize=False,
        )
        for seed in request["seeds"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    answers = []
    for output in llm.generate(prompts, each, use_tqdm=False):
        (one,) = output.outputs
        ids = list(one.token_ids)
        log_probs = [place[token].logprob for token, place in zip(ids, one.logprobs, strict=True)]
        if one.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"a completion ended by {one.finish_reason}")
        if (one.finish_reason == "stop") != (ids[-1] in request["stop"]):
            raise RuntimeError("a completion lacks the token that ended it")
        answers.append((ids, log_probs))
    return answers


def main(settings: dict[str, Any]) -> None:
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes where their warnings go
    llm: Any = None
    for line in sys.stdin.buffer:
        try:
            if llm is None:
                from vllm import LLM

                llm = LLM(**settings)
            found: Any = answer_request(llm, json.loads(line))
        except Exception as error:
            found = f"{type(error).__name__}: {first_line(error)}"
        stdout.write(json.dumps(found).encode() + b"\n")
        stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
