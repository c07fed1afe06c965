"""The driver half: says that it is active and what its target is called."""

from typing import Any, NoReturn

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


def _unreachable() -> NoReturn:
    raise RuntimeError("the Triton stub runs nothing: set TRITON_INTERPRET=1")


class Driver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        _unreachable()

    def get_benchmarker(self) -> Any:
        _unreachable()
