"""Loaded once by the fork server: what every session would import."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import peft  # noqa: F401
import safetensors.numpy
import safetensors.torch  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import uft.launch.worker
import uft.training.jobs
import uft.training.session  # noqa: F401
