"""Server settings that change a stage's output, which a resume must not change.

Flags of other purposes and variants, ports, names, logs, time-outs and memory sizes may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe.recipe import Recipe
from recipe.serve import Purpose
from serve.flags import find_variant, layer_flags, normalize, speculative_overrides, uses_sglang
from target.section import TargetSection
from target.target import Target

NEUTRAL_FLAGS = frozenset(
    {
        # Address, security and names.
        "host", "port", "uds", "root-path", "served-model-name", "api-key", "grpc", "grpc-port",
        "ssl-certfile", "ssl-keyfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers", "enable-ssl-refresh",
        "allow-credentials", "allowed-headers", "allowed-methods", "allowed-origins", "middleware",
        "allowed-local-media-path", "allowed-media-domains", "h11-max-header-count", "h11-max-incomplete-event-size",
        "api-server-count", "renderer-num-workers", "headless", "master-addr", "master-port",
        "data-parallel-address", "data-parallel-rpc-port", "data-parallel-backend", "data-parallel-rank",
        "data-parallel-start-rank", "data-parallel-size-local", "data-parallel-external-lb",
        "data-parallel-hybrid-lb", "data-parallel-multi-port-external-lb", "nnodes", "node-rank",
        "distributed-executor-backend", "device-ids", "numa-bind", "numa-bind-cpus", "numa-bind-nodes",
        # Logs, metrics and documentation.
        "disable-log-stats", "disable-log-requests", "enable-log-requests", "enable-log-outputs", "enable-log-deltas",
        "aggregate-engine-logging", "max-log-len", "log-level", "log-config-file", "log-error-stack", "logging-config",
        "uvicorn-log-level", "disable-uvicorn-access-log", "disable-access-log-for-endpoints",
        "otlp-traces-endpoint", "collect-detailed-traces", "show-hidden-metrics-for-version", "kv-cache-metrics",
        "kv-cache-metrics-sample", "cudagraph-metrics", "enable-mfu-metrics", "custom-histogram-buckets",
        "enable-logging-iteration-details", "enable-layerwise-nvtx-tracing", "enable-per-request-metrics",
        "enable-server-load-tracking", "enable-prompt-tokens-details", "enable-request-id-headers",
        "enable-force-include-usage", "enable-tokenizer-info-endpoint", "disable-fastapi-docs", "enable-offline-docs",
        "profiler-config", "use-tqdm-on-load", "jit-monitor-mode", "jit-monitor-verbose",
    }
)  # fmt: skip
"""vLLM's flags that change neither the model's output nor its speed."""

SPEED_FLAGS = frozenset(
    {
        # Time-outs, loading and memory.
        "shutdown-timeout", "sse-keep-alive-interval", "distributed-timeout-seconds",
        "cpu-distributed-timeout-seconds", "fail-on-environ-validation", "stream-interval", "hf-token", "download-dir",
        "max-parallel-loading-workers", "safetensors-load-strategy", "safetensors-prefetch-num-threads",
        "safetensors-prefetch-block-size", "gpu-memory-utilization", "device-memory-utilization",
        "kv-cache-memory-bytes", "num-gpu-blocks-override", "cpu-offload-gb", "kv-offloading-size",
        "kv-offloading-backend", "enable-sleep-mode", "enable-cumem-allocator",
        # Scheduling: which requests run together.
        "max-num-seqs", "max-num-batched-tokens", "max-num-scheduled-tokens", "max-num-active-seqs",
        "max-num-queued-reqs", "max-num-queued-tokens", "max-num-partial-prefills", "max-long-partial-prefills",
        "long-prefill-token-threshold", "async-scheduling", "scheduling-policy", "prefill-schedule-interval",
        "enable-prefix-caching", "prefix-caching-hash-algo", "enable-chunked-prefill",
        # Parallelism and graphs: they change the rounding, as other batches do.
        "tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size", "enable-expert-parallel", "tp",
        "pp-size", "dp-size", "enforce-eager", "cudagraph-capture-sizes", "max-cudagraph-capture-size",
        # Parsers: the stages that resume use token ids.
        "enable-auto-tool-choice", "tool-call-parser", "tool-parser-plugin",
    }
)  # fmt: skip
"""Flags that may change the model's speed and rounding, but not its output otherwise."""


def measured_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a resumed measurement must not change: `output_settings` and those that change speed."""
    return {
        **output_settings(recipe, "bench", NEUTRAL_FLAGS),
        "speculative": speculative_overrides(recipe.serve),
        "max_model_len": recipe.target.max_model_len,
    }


def output_settings(
    recipe: Recipe, purpose: Purpose, ignored: frozenset[str] = NEUTRAL_FLAGS | SPEED_FLAGS
) -> dict[str, Any]:
    """Return the settings that a resumed stage must not change: backend, weights, flags for `purpose`.

    A variant's weights are compared by fingerprint, or by name if on the hub. The target's own are an input of the
    stage.
    """
    section = recipe.serve
    variant = find_variant(section)
    return {
        "backend": "sglang" if uses_sglang(section, purpose) else "vllm",
        "weights": _identify(variant.path) if variant else "the target's",
        "flags": _select(layer_flags(recipe, purpose), ignored),
    }


def engine_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the flags that a resumed dump with its own engine must not change. Variants and nodes are for servers."""
    flags = {**normalize(recipe.serve.args), **normalize(recipe.dump.args)}
    return {"flags": _select(flags, NEUTRAL_FLAGS | SPEED_FLAGS)}


def _select(flags: Mapping[str, Any], ignored: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in sorted(flags.items()) if name not in ignored}


def _identify(path: str) -> str:
    return Target.here(TargetSection(path=Path(path))).fingerprint if Path(path).is_dir() else path
