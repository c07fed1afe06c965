"""`Workers`: the processes that train one exit layer together.

One rule: what is added up is the same in all of them afterwards, so that each takes the
same step. A batch is shared out, so their number decides nothing but the time.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

SAID_EVERY = 20  # steps
# What decides how a process runs, and must be the same in the workers.
PASSED_ON = (
    "PYTHONPATH",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "CUBLAS_WORKSPACE_CONFIG",
)


class Workers(Protocol):
    """Attributes:
    rank: Of this one, from 0.
    num: Of all.
    """

    rank: int
    num: int

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sums over all workers, in place."""
        ...


class Alone:
    """One process."""

    rank, num = 0, 1

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """It is the sum."""


class TogetherByTorch:
    """The process group that torch has been told of."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.num = torch.distributed.get_world_size()

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """One message for all of them."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        at = 0
        for tensor in tensors:
            tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()


def run_by_ray(num: int, job: Any, directory: Path) -> None:
    """Runs `train` in `num` workers of Ray Train, each with a GPU where there are.

    They are in the cluster of `RAY_ADDRESS`, or on this machine.

    Args:
        num: Workers.
        job: A `Job`, whose directories all of them see.
        directory: For what Ray Train notes.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = torch.cuda.is_available()
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    was_connected = ray.is_initialized()
    ray.init(runtime_env={"env_vars": environment}, ignore_reinit_error=True)
    try:
        TorchTrainer(
            _train,
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=num, use_gpu=on_gpu),
            run_config=RunConfig(storage_path=str(directory.resolve())),
        ).fit()
    finally:
        if not was_connected:
            ray.shutdown()


def _train(config: dict[str, Any]) -> None:
    """In each worker; Ray shows what the first prints."""
    from vllm_selfspec.training.trainer import train

    workers = TogetherByTorch()

    def say(trainer: Any) -> None:
        done, of = trainer.step, trainer.num_steps
        if workers.rank == 0 and done % SAID_EVERY == 0:
            print(f"step {done} of {of}: loss {trainer.curve[-1]:.3f}", flush=True)

    train(config["job"], workers, say)
