"""What vLLM's CPU communicator lacks for experts that data-parallel ranks share.

vLLM spreads the tokens of all ranks with `all_gatherv` and adds up what experts made
of them with `reduce_scatterv`; it has both for GPUs and XPUs alone. As one of vLLM's
general plugins, `mend` reaches the workers of a server (`path_with_plugin`).
"""

import os
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def path_with_plugin(folder: Path) -> str:
    """`PYTHONPATH` of processes that are to be mended; `folder` is for its metadata."""
    info = folder / "cpu_gatherv-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-gatherv\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ncpu_gatherv = cpu_gatherv:mend\n"
    )
    paths = [str(TESTS), str(folder), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


def mend() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: Any = None) -> Any:
    import torch
    import torch.distributed as dist

    if isinstance(input_, list):
        return [all_gatherv(self, each, dim, sizes) for each in input_]
    assert dim == 0
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])  # gloo wants one size
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=self.cpu_group)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def reduce_scatterv(self: Any, input_: Any, dim: int = -1, sizes: Any = None) -> Any:
    import torch.distributed as dist

    assert dim == 0 and sizes is not None
    summed = input_.clone()
    dist.all_reduce(summed, group=self.cpu_group)
    return summed.split(sizes)[self.rank_in_group].clone()
