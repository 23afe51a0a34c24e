"""Have vLLM's own parser read commands: one JSON list of words a line on stdin, one line `ok` or its complaint each."""

from __future__ import annotations

import contextlib
import io
import json
import sys

from serve.vllm_main import answer_for_vllm_version

answer_for_vllm_version()

from vllm.entrypoints.launchers.cli_args import make_arg_parser  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

parser = make_arg_parser(FlexibleArgumentParser())
for line in sys.stdin:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(json.loads(line))
        print("ok", flush=True)
    except SystemExit:
        print(said.getvalue().strip().splitlines()[-1], flush=True)
