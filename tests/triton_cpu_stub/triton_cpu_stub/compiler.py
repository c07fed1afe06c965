"""The compiler half: abstract methods filled in, none of them ever called."""

from types import ModuleType
from typing import Any, NoReturn

from triton.backends.compiler import BaseBackend, GPUTarget, Language


def _unreachable() -> NoReturn:
    raise RuntimeError("the Triton stub compiles nothing: set TRITON_INTERPRET=1")


class Compiler(BaseBackend):
    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        _unreachable()

    def parse_options(self, options: dict[str, Any]) -> object:
        _unreachable()

    def add_stages(
        self, stages: dict[str, Any], options: object, language: Language
    ) -> None:
        _unreachable()

    def load_dialects(self, context: Any) -> None:
        _unreachable()

    def get_module_map(self) -> dict[str, ModuleType]:
        _unreachable()
