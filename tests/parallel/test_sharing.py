"""Who takes which row; and alone, nothing is asked of anybody."""

from __future__ import annotations

import random

import pytest
import torch

from uft.distributed import ALONE, all_reduce_gradients, balanced_shards
from uft.errors import UftError
from uft.launch.process import GRACE, node_rank, torchrun_arguments


def test_shares_are_whole_balanced_and_keep_owners_together() -> None:
    for count in (1, 2, 3, 8):
        draw = random.Random(count)
        sizes = [draw.randint(1, 200) for _ in range(40)]
        owners = [draw.randrange(25) for _ in sizes]
        taken = balanced_shards(sizes, owners, count)
        assert sorted(position for share in taken for position in share) == list(range(40))
        assert all(share == sorted(share) for share in taken)
        assert sum(len({owners[position] for position in share}) for share in taken) == len(set(owners))
        loads = [sum(sizes[position] for position in share) for share in taken]
        largest = max(sum(s for s, o in zip(sizes, owners, strict=True) if o == owner) for owner in owners)
        assert max(loads) - min(loads) <= largest
        assert balanced_shards(sizes, owners, count) == taken
    assert balanced_shards([5], [0], 3) == [[0], [], []]
    assert balanced_shards([1, 9], [0, 1], 4) == [[1], [0], [], []]


def test_alone_everything_stays_as_it_is() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    all_reduce_gradients([parameter])
    assert parameter.grad is None
    assert ALONE.gather_objects("x") == ["x"]
    assert ALONE.map_shards([1, 2, 3], lambda things: [2 * thing for thing in things]) == [2, 4, 6]
    assert ALONE.on_rank0(lambda: 7) == 7
    with pytest.raises(KeyError):
        ALONE.map_shards([1], lambda things: [{}[thing] for thing in things])


def test_what_the_launcher_of_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NODEID", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_arguments({}) == torchrun_arguments({"processes": 1, "nodes": 1}) == []
    assert {"--standalone", "--nproc-per-node=8", "--max-restarts=0"} <= set(torchrun_arguments({"processes": 8}))
    assert GRACE >= 600
    several = {"processes": 4, "nodes": 3, "node_rank": 2, "rendezvous": "first:29500"}
    options = set(torchrun_arguments(several))
    assert {"--nnodes=3", "--node-rank=2", "--rdzv-endpoint=first:29500", "--rdzv-conf=is_host=false"} <= options
    with pytest.raises(UftError, match="which of the machines"):
        node_rank({"nodes": 2, "node_rank": None})
    with pytest.raises(UftError, match="where do the machines meet"):
        torchrun_arguments({**several, "rendezvous": None})
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert node_rank({"nodes": 2, "node_rank": None}) == 1
