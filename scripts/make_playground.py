"""Train the playground's base model: `python scripts/make_playground.py [--out DIR] [--steps N]`.

One seed, one thread: on the same machine and library versions a second run gives the same bytes. It took about 50 s on
one CPU core. The model is a LlamaForCausalLM of 0.3M parameters over whole words; it learns the old tasks of
`uft.playground.world` in a chatty style and never sees a new task nor a test prompt.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uft.playground import world

PAD, UNKNOWN, USER, ASSISTANT, END = "<pad>", "<unk>", "<user>", "<assistant>", "<end>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ '<assistant> ' }}{% generation %}{{ message.content + ' <end>' }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ '<user> ' + message.content + ' <end> ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
LEARNING_RATE, WARMUP, BATCH = 2e-3, 50, 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; what is not a word of the world is unknown."""
    special = [PAD, UNKNOWN, USER, ASSISTANT, END]
    words = {word: number for number, word in enumerate([*special, *world.vocabulary()])}
    backend = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Three layers of 96, fresh weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_batch(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Right-padded conversations, (B, L) each; the labels are the reply and its end, -100 elsewhere."""
    sides = [(f"{USER} {prompt} {END} {ASSISTANT}", f"{said} {END}") for prompt, said in pairs]
    texts = [(tokenizer(prompt)["input_ids"], tokenizer(said)["input_ids"]) for prompt, said in sides]
    length = max(len(prompt) + len(said) for prompt, said in texts)
    ids = torch.full((len(texts), length), tokenizer.pad_token_id)
    labels = torch.full((len(texts), length), -100)
    for row, (prompt, said) in enumerate(texts):
        end = len(prompt) + len(said)
        ids[row, :end] = torch.tensor(prompt + said)
        labels[row, len(prompt) : end] = torch.tensor(said)
    mask = (torch.arange(length) < torch.tensor([[len(p) + len(s)] for p, s in texts])).long()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> list[float]:
    """AdamW, warm-up and cosine; the losses in nats per token."""
    stream = world.conversations(Random(f"playground/base/{seed}"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    for step in range(steps):
        rate = min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        loss = model(**make_batch(tokenizer, [next(stream) for _ in range(BATCH)])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}/{steps}  loss {losses[-1]:.3f}", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=world.model_dir(), help="folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, arguments.seed)
    train(model, tokenizer, arguments.steps, arguments.seed)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
