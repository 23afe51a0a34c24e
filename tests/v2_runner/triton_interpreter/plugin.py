"""A vLLM plugin for tests that makes Triton's interpreter faster, and lets it run more of vLLM's kernels."""

from __future__ import annotations

import os
from typing import Any


def register() -> None:
    if os.environ.get("TRITON_INTERPRET"):
        interpret_without_copies()
        keep_masks_boolean()
        interpret_log1p()


def interpret_without_copies() -> None:
    """Reduce a step of DFlash from 0.27 s to 0.15.

    The interpreter patches triton.language anew for every launch, and copies each argument's storage before and after.
    Arguments are CPU tensors here and nothing is ever compiled, so one patch that stays and no copies give the same.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    class Lasting:
        def restore(self) -> None:
            pass

    patch, lasting, patched = interpreter._patch_lang, Lasting(), set[int]()

    def patch_once(function: Any) -> Lasting:
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if modules - patched:
            patch(function)
            patched.update(modules)
        return lasting

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None


def keep_masks_boolean() -> None:
    """Let a comparison of scalars mask a block: DFlash2's and LiLiCorr's walk through the candidates loads so.

    The interpreter gives such a comparison the type of its left side, and makes a block of integers of it, which it
    then refuses as a mask.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    splat = InterpreterBuilder.create_splat

    def create_splat(self: Any, kind: Any, scalar: Any) -> Any:
        block = splat(self, kind, scalar)
        return TensorHandle(block.data.astype(bool), block.dtype) if scalar.data.dtype == bool else block

    InterpreterBuilder.create_splat = create_splat


def interpret_log1p() -> None:
    """Let vLLM resample a token whose sampled draft was rejected: CUDA's library has no code for the interpreter."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def log1p(x: Any) -> Any:
        with np.errstate(divide="ignore"):  # log1p(-1): the token is never resampled
            return tl.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)

    libdevice.log1p = log1p
