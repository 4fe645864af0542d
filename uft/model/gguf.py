"""GGUF and Ollama: an exported folder as one file in llama.cpp's layout, and the Modelfile that serves it.

Described are Llama, Mistral, Qwen2 and Qwen3 with a byte-level BPE tokenizer; a model that GGUF cannot describe is
refused. The file is read back with transformers, and its logits are compared with those of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uft.data.template import MARK
from uft.errors import Problem, UftError
from uft.heartbeat import activity
from uft.runs import shown, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""transformers' model_type: the name in the `gguf` package."""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {QWEN_SPLIT: "qwen2", QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"): "llama-bpe"}
"""How a tokenizer splits text into words before the merges: its regular expression -> llama.cpp's name."""
TOLERANCE = 1e-3
"""Largest difference of log-probs between the folder and the file read back, by unit of their size, both in float32."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


def require_described(config: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as the content of tokenizer.json. Raises UftError where GGUF does not describe the model."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    backend = {"model": {"type": "slow"}} if fast is None else json.loads(fast.to_str())
    if why := obstacle(config, backend):
        advice = ("leave --gguf and --ollama out",)
        raise UftError(Problem("--gguf", f"GGUF does not describe this model: {why}", advice=advice))
    return backend


@activity("the GGUF file was written", moving=True)
def write_gguf(folder: Path, out: Path) -> float:
    """Write the model in `folder`, as `export` leaves it, to the file `out`; the largest difference of log-probs when
    it is read back. Raises UftError, before anything is written, where GGUF does not describe the model."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config, backend = model.config, require_described(model.config, tokenizer)
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    beside = out.with_name(f".{out.name}.tmp")  # what has its name is whole, and was read back
    writer: Any = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[architecture])
    dtype = next(model.parameters()).dtype
    describe(writer, config, gguf.LlamaFileType.ALL_F32 if dtype == torch.float32 else gguf.LlamaFileType.MOSTLY_BF16)
    add_tokenizer(writer, tokenizer, backend, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, ending = name.rpartition(".")
        rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = rotated.get(stem.rpartition(".")[2])
        if heads and architecture == gguf.MODEL_ARCH.LLAMA:  # its rotation wants the halves of every head interleaved
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if tensor.dtype == torch.bfloat16 and tensor.ndim > 1:
            data, kind = tensor.contiguous().view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
        else:
            data, kind = tensor.float().contiguous().numpy(), None
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", data, raw_dtype=kind)
    try:
        with writing(out, sum(p.numel() * p.element_size() for p in model.parameters())):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        difference = _difference(model, beside)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return difference


def obstacle(config: Any, backend: dict[str, Any]) -> str:
    """The parts of a model that GGUF, or this program, cannot express; "" where there are none."""
    if config.model_type not in ARCHITECTURES:
        return f"its architecture is {config.model_type}; described are {', '.join(ARCHITECTURES)}"
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        return f"its rotary embeddings are scaled ({rope['rope_type']})"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < config.max_position_embeddings:
        return f"its attention has a window of {window} tokens"
    if backend["model"]["type"] != "BPE" or splitting(backend) is None:
        return "its tokenizer is no byte-level BPE whose splitting llama.cpp has a name for"
    return ""


def splitting(backend: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer (content of tokenizer.json) splits text before its merges; None: none."""
    whole = backend.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", [whole])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    first, splits = steps[:-1], steps[-1].get("use_regex", True)
    if not first:
        return "gpt-2" if splits else None
    if len(first) == 1 and first[0]["type"] == "Digits" and splits:
        return "smollm" if first[0].get("individual_digits") else None
    if len(first) == 1 and first[0]["type"] == "Split" and not splits:
        return SPLITS.get(first[0]["pattern"].get("Regex"))
    return None


def describe(writer: Any, config: Any, file_type: int) -> None:
    """The sizes of the model."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", 10_000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, backend: dict[str, Any], embeddings: int) -> None:
    """Tokens, their kinds, merges, special tokens and the chat template."""
    added = {token["id"]: token for token in backend["added_tokens"]}
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    kinds = [
        (CONTROL if added[n]["special"] else USER_DEFINED) if n in added else NORMAL if n in words else UNUSED
        for n in range(embeddings)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(backend))
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(embeddings)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)  # the chat template writes it
    if tokenizer.chat_template:
        # marks of what is learned, which other programs do not know, as comments
        writer.add_chat_template(MARK.sub(r"{#\1 \2#}", str(tokenizer.chat_template)))


@torch.no_grad()
def _difference(model: Any, out: Path) -> float:
    """The largest difference of log-probs on a few tokens. Raises UftError where it is more than rounding."""
    from transformers import AutoModelForCausalLM

    head = getattr(model.config, "head_dim", None)  # which transformers does not read from the file
    read: Any = AutoModelForCausalLM.from_pretrained(
        out.parent,
        gguf_file=out.name,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        **({} if head is None else {"head_dim": head}),
    )
    ids = (7919 * torch.arange(1, 33) % min(model.config.vocab_size, read.config.vocab_size))[None]
    ours, theirs = (one.eval()(ids).logits.log_softmax(-1) for one in (model.float(), read))
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        why = f"the GGUF file was read back, and its log-probs differ from the folder's by {difference:.2g}"
        raise UftError(Problem(shown(out.parent), why), code=1)
    return difference


# --- Ollama


def modelfile(file: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> tuple[str, str]:
    """(the Modelfile of a GGUF file, what it cannot say; "").

    The template is that of the tokenizer in Ollama's language, where a conversation is its turns one after another.
    """
    lines, missing = [f"FROM ./{file}"], ""
    if tokenizer.chat_template is None:
        lines.append("TEMPLATE {{ .Prompt }}")
    elif found := turn_pieces(
        lambda turns, more: str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=more))
    ):
        template, system = found
        lines.append(f'TEMPLATE """{template}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
    else:
        missing = "its chat template is more than turns one after another: write TEMPLATE by hand"
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n", missing


MARKS = {"system": "System Text 1", "user": "User Text 2", "assistant": "Assistant Text 3"}


def turn_pieces(render: Callable[[list[dict[str, str]], bool], str]) -> tuple[str, str] | None:
    """(Ollama's template, the default system text) of a template that writes every turn between a fixed begin and a
    fixed end; None where it does not."""

    def write(*roles: str, more: bool = False) -> str:
        return render([{"role": role, "content": MARKS[role]} for role in roles], more)

    try:
        asked, replied, told = write("user"), write("user", "assistant"), write("system", "user")
        header = write("user", more=True).removeprefix(asked)
        again = write("user", "assistant", "user")
        user = again.removeprefix(replied)
        assistant, before = replied.removeprefix(asked), asked.removesuffix(user)
        system = told.removesuffix(user)
        whole = write("system", "user", "assistant", "user", more=True)
    except Exception:  # a template of any origin may refuse a conversation: it is said by hand then
        return None
    prefix = before if system.startswith(before) else ""  # of every conversation: a token of its beginning
    system, before = system.removeprefix(prefix), before.removeprefix(prefix)
    pieces = {"system": system, "user": user, "assistant": assistant}
    regular = whole == prefix + system + user + assistant + user + header
    regular &= all(pieces[role].count(mark) == 1 for role, mark in MARKS.items())
    if not regular or '"""' in whole or "{{" in whole:
        return None
    begin, end = system.split(MARKS["system"])
    default = before.removeprefix(begin).removesuffix(end)
    if before and (not default or before != begin + default + end):
        return None
    branches = [f'eq .Role "{role}" }}}}{text.replace(MARKS[role], "{{ .Content }}")}' for role, text in pieces.items()]
    turns = "{{ if " + "{{ else if ".join(branches) + "{{ end }}"
    return f"{prefix}{{{{- range .Messages }}}}{turns}{{{{ end }}}}{header}", default
