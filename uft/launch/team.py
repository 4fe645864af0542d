"""What torch's launcher is told: how many processes, on how many machines, and where they meet."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from typing import Any

from uft.errors import Problem, UftError

GRACE = 600
"""Seconds that processes have for their checkpoint once they were asked to stop."""

OPTIONS = (
    "--max-restarts=0",  # restarting in place hangs too often; `uft resume` starts fresh processes
    "--monitor-interval=0.1",
    f"--shutdown-timeout={GRACE}",
    "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2",
)


def team(hardware: Mapping[str, Any]) -> list[str]:
    """Options of `torch.distributed.run` for the configuration's `hardware`; none for a single process."""
    processes, nodes = hardware.get("processes", 1), hardware.get("nodes", 1)
    if processes * nodes == 1:
        return []
    here = [f"--nproc-per-node={processes}", *OPTIONS]
    if nodes == 1:
        return [*here, "--standalone"]
    meeting = hardware["rendezvous"] or first_of_slurm()
    name = os.environ.get("SLURM_JOB_ID", meeting)
    return [
        *here,
        f"--nnodes={nodes}",
        f"--node-rank={node_rank(hardware)}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting}",
        f"--rdzv-id={name}",
        f"--rdzv-conf=is_host={str(node_rank(hardware) == 0).lower()}",
    ]


def node_rank(hardware: Mapping[str, Any]) -> int:
    """Which of the machines this is: 0 makes the run, the others join it. Raises UftError where nobody says."""
    if hardware.get("nodes", 1) == 1:
        return 0
    given = hardware.get("node_rank")
    if given is None and "SLURM_NODEID" not in os.environ:
        why = "which of the machines is this? Nobody says"
        raise UftError(Problem("hardware.node_rank=null", why, advice=("0 on the first, 1 on the second, ...",)))
    return int(os.environ["SLURM_NODEID"]) if given is None else int(given)


def first_of_slurm() -> str:
    """HOST:PORT where the machines of this Slurm job meet; the port is a function of the job alone."""
    names, job = os.environ.get("SLURM_JOB_NODELIST"), os.environ.get("SLURM_JOB_ID")
    if names is None or job is None:
        why = "where do the machines meet? This is no job of Slurm"
        raise UftError(Problem("hardware.rendezvous=null", why, advice=("HOST:PORT of the first machine",)))
    listed = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True)
    return f"{listed.stdout.split()[0]}:{20000 + int(job) % 20000}"
