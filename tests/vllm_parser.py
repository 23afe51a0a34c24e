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
from functools import cache
from typing import Any
from unittest.mock import patch

from conftest import ROOT

Question = Sequence[str] | Mapping[str, Mapping[str, Any]]
ANSWER = "answer: "


def ask_vllm(questions: Sequence[Question]) -> list[str]:
    """One answer a question, `ok` or vLLM's complaint, from a process that all tests share: it takes 12 s to start."""
    process = _start()
    assert process.stdin is not None
    assert process.stdout is not None
    answers = []
    for question in questions:
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        answers.append(next((line for line in process.stdout if line.startswith(ANSWER)), ""))  # vLLM prints lines, too
        assert answers[-1], f"{__file__} ended"
    return [answer.removeprefix(ANSWER).rstrip("\n") for answer in answers]


@cache
def _start() -> subprocess.Popen[str]:
    """Start the process. It ends with this one, which closes its standard input."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


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
            with patch.dict(os.environ, values):
                for name in values:
                    environment_variables[name]()

    for line in sys.stdin:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                answer(json.loads(line))
            told = "ok"
        except SystemExit:
            told = said.getvalue().strip().splitlines()[-1]
        except (TypeError, ValueError, KeyError) as error:
            told = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(f"{ANSWER}{told}", flush=True)


if __name__ == "__main__":
    main()
