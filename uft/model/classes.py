"""transformers' model code, without what language models have no use for."""

from __future__ import annotations

from typing import Any


def auto_model() -> Any:
    """transformers' AutoModelForCausalLM.

    The losses of object detectors come with every model. Where scipy is installed they import its optimisers, which
    every start of a run would pay for with half a second and 35 MB; so it is not there while they are imported.
    """
    from transformers import AutoModelForCausalLM, utils

    real = utils.is_scipy_available
    utils.is_scipy_available = lambda: False
    try:
        import transformers.modeling_utils  # noqa: F401
    finally:
        utils.is_scipy_available = real
    return AutoModelForCausalLM
