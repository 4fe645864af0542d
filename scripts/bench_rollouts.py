"""Seconds of a rollout: 64 prompts with 8 completions each, against transformers' own `generate` on the same model.

    python scripts/bench_rollouts.py                     30M parameters, prompts of 128 tokens, 64 new ones
    python scripts/bench_rollouts.py --prompt 32 --new 128 --rounds 3

Both sample at temperature 1 with no stop token, so that all completions are as long as they may be. The peer is tried
with a static and with a dynamic cache, and its better one counts; rounds are paired, ours and theirs in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from uft.model.policy import Policy
from uft.sampling.generate import Sampling, complete

MODEL = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (
        ("prompts", 64),
        ("completions", 8),
        ("prompt", 128),
        ("new", 64),
        ("batch", 512),
        ("rounds", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = parser.parse_args()
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(MODEL).eval()
    prompts = torch.randint(3, MODEL.vocab_size, (wanted.prompts, wanted.prompt))
    repeated = prompts.repeat_interleave(wanted.completions, 0)
    policy, sampling = Policy(module), Sampling(temperature=1.0, max_new_tokens=wanted.new)

    def ours() -> None:
        asked = [prompt.tolist() for prompt in repeated]
        complete(policy, asked, sampling, seed=0, stop_ids=(), pad_id=0, batch_size=wanted.batch)

    def theirs(cache: str) -> Callable[[], None]:
        options = {"do_sample": True, "max_new_tokens": wanted.new, "min_new_tokens": wanted.new, "pad_token_id": 0}

        def run() -> None:
            with torch.no_grad():
                for batch in repeated.split(wanted.batch):
                    module.generate(batch, cache_implementation=cache, disable_compile=True, **options)

        return run

    arms = {"uft": ours, "generate, static": theirs("static"), "generate, dynamic": theirs("dynamic")}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(wanted.rounds):
        for name, run in arms.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    tokens = wanted.prompts * wanted.completions * wanted.new
    for name, found in medians.items():
        print(f"{name:<18} {found:6.1f} CPU s  {tokens / found:8,.0f} tokens/s  {medians['uft'] / found:5.2f}")


if __name__ == "__main__":
    main()
