"""Ask the installed vLLM whether it knows arguments: its own parsers, signatures and table of environment variables.

A question is one of:
  `["serve", *words]`, `["bench", *words]`     the words after `vllm serve` and `vllm bench serve`
  `{"EngineArgs": {name: value}}`              keyword arguments; also `SpeculativeConfig` and `KVTransferConfig`
  `{"environ": {name: value}}`                 environment variables, whose values are read too
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from conftest import ROOT

Question = Sequence[str] | Mapping[str, Mapping[str, Any]]


def ask_vllm(questions: Sequence[Question]) -> list[str]:
    """One answer a question, `ok` or vLLM's complaint, from a process of its own."""
    result = subprocess.run(
        [sys.executable, __file__], input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    return result.stdout.splitlines()[-len(questions) :]


def main() -> None:
    from serve.vllm_main import answer_for_vllm_version

    answer_for_vllm_version()
    from vllm.benchmarks.serve import add_cli_args
    from vllm.config import KVTransferConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.envs import environment_variables
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsers = {"serve": make_arg_parser(FlexibleArgumentParser()), "bench": FlexibleArgumentParser()}
    add_cli_args(parsers["bench"])
    classes = {kind.__name__: kind for kind in (EngineArgs, KVTransferConfig, SpeculativeConfig)}

    def answer(question: Any) -> None:
        if isinstance(question, list):
            parsers[question[0]].parse_args(question[1:])
            return
        for kind, values in question.items():
            if kind != "environ":
                inspect.signature(classes[kind]).bind(**values)
                continue
            for name, value in values.items():
                os.environ[name] = value
                environment_variables[name]()

    for line in sys.stdin:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                answer(json.loads(line))
            print("ok", flush=True)
        except SystemExit:
            print(said.getvalue().strip().splitlines()[-1], flush=True)
        except (TypeError, ValueError, KeyError) as error:
            print(f"{type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
