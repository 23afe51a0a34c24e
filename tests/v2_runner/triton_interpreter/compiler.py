"""Triton's interpreter as a backend named `cpu`, so that vLLM's V2 model runner starts without a GPU. For tests only.

The folder above on PYTHONPATH installs it: its entry points are in v2_runner-0.dist-info. Before vLLM loads plugins it
asks for a backend of that name with an active driver. Kernels run in the interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpreterBackend(BaseBackend):
    @staticmethod
    def supports_target(target: Any) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: Any) -> Any:
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    def add_stages(self, stages: Any, options: Any, language: Any) -> None:
        raise NotImplementedError

    def load_dialects(self, context: Any) -> None:
        pass

    def get_module_map(self) -> dict[str, Any]:
        return {}
