"""The recipe: one YAML that says everything about a pipeline, checked before anything starts.

Sections `target, serve, synth, dump, train, export, bench`; facts that several stages share live only in `target`.
Precedence: flag > `--set a.b=c` > recipe > its `base` > default. Unknown keys are errors that name the nearest key.
`base` names another recipe, from the folder of the one that names it; all other relative paths are taken from where the
command runs.

Fields marked operational (ports, time-outs, concurrency) may differ when a run goes on; all others may not.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from contracts.errors import UserError


def _operational(*, default: Any, **kwargs: Any) -> Any:
    return Field(default=default, json_schema_extra={"operational": True}, **kwargs)


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def settings(self) -> dict[str, Any]:
        """The fields that decide what comes out, as plain values."""
        operational = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational")
        }
        return self.model_dump(mode="json", exclude=operational)


Purpose = Literal["synth", "dump", "bench", "production"]
Args = dict[str, str | int | float | bool]
"""vLLM's flags without the dashes."""


class FactsSection(Section):
    """What is known of a target without its files. Where these are, it is checked; where they are not, it stands in.

    Names and meanings are those of transformers' configs.
    """

    architecture: str
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    vocab_size: int = Field(gt=0, description="rows of the embedding")
    rope_theta: float = Field(gt=0)
    final_norm: Literal["rms", "gemma", "layer"] = "rms"
    highest_token_id: int = Field(gt=0, description="of the tokenizer, added tokens included")
    sparse_block_size: int | None = Field(default=None, gt=0, description="of the attention's blocks, if it is sparse")


class TargetSection(Section):
    path: Path = Field(description="folder of the target: config, safetensors, tokenizer, chat template")
    max_model_len: int = Field(default=8192, gt=0, description="tokens of prompt and reply together, in every stage")
    thinking_mode_name: str = Field(default="thinking_mode", description="the chat template's variable for the mode")
    thinking_mode_values: dict[str, str | int | bool | None] = Field(
        default={}, description="what the template is told for each mode, if not its name; null: nothing"
    )
    thinking_tags: tuple[str, str] = Field(
        default=("<mm:think>", "</mm:think>"), description="around a thought, in the text"
    )
    num_aux_layers: int = Field(default=5, gt=0, description="captured layers, spread by DFlash's rule")
    aux_layers: list[int] | None = Field(default=None, description="captured layers, 0-based, instead of the rule's")
    mask_token_id: int | None = Field(
        default=None, description="default: the first row above the tokenizer's highest id"
    )
    training_template: Path | None = Field(
        default=None, description="renders as the target's chat template does, with {% generation %} tags"
    )
    training_template_sha256: str | None = Field(default=None, description="of that file")
    facts: FactsSection | None = Field(
        default=None, description="checked against the target's files, if these are here"
    )


class VariantSection(Section):
    """The target in one precision."""

    path: str = Field(description="folder or hub name of these weights")
    memory_gb: float = Field(gt=0, description="GPU memory that it needs, weights and some KV cache (GB of 1e9 bytes)")
    hardware: list[str] = Field(default=[], description="the only ones that it runs on; []: any")
    args: Args = {}
    env: dict[str, str] = {}
    speculative: Args = Field(default={}, description="over serve.speculative")


class PurposeSection(Section):
    args: Args = {}
    env: dict[str, str] = {}


class HeadSection(Section):
    """A published draft that is not ours."""

    path: str = Field(description="folder or hub name")
    method: str
    num_speculative_tokens: int = Field(gt=0)


class ServeSection(Section):
    host: str = _operational(default="127.0.0.1")
    port: int | None = _operational(default=None, ge=1, le=65535, description="default: a free one")
    startup_timeout_s: float = _operational(default=600.0, gt=0)
    env: dict[str, str] = _operational(default={}, description="environment of every vLLM process")
    backend: Literal["vllm", "sglang"] = Field(default="vllm", description="sglang: for synthesis only")
    args: Args = Field(default={}, description="vLLM's flags without the dashes")
    sglang_args: Args = Field(default={}, description="SGLang's flags, where it is the backend")
    speculative: Args = Field(default={}, description="into the speculative config of every draft")
    variant: str | None = Field(default=None, description="one of serve.variants; default: target.path as it is")
    hardware: str | None = Field(default=None, description="the node: h100, h200, b200, b300, gb200, gb300 or mi355x")
    variants: dict[str, VariantSection] = Field(default={}, description="precisions that it is served in, by name")
    purposes: dict[Purpose, PurposeSection] = Field(
        default={}, description="flags of one purpose, over the variant's; the dump's are dump.args"
    )
    heads: dict[str, HeadSection] = _operational(
        default={}, description="published drafts, by the name that --draft takes"
    )
    image: str = _operational(default="vllm/vllm-openai:v0.32.0", description="of `serve command --format docker`")


class SynthSection(Section):
    thinking_modes: list[str] = Field(
        default=[], description='row i takes mode i modulo their number; "enabled:2" stands twice; []: none is sent'
    )
    temperature: float | list[float] | None = Field(
        default=None, description="several: one conversation each; default: the target's generation_config"
    )
    top_p: float | None = Field(default=None, gt=0, le=1, description="default: the target's generation_config")
    top_k: int | None = Field(default=None, ge=1, description="default: the target's generation_config")
    max_tokens: int = Field(default=2048, gt=0, description="tokens of one reply at most")
    num_samples: int = Field(default=1, gt=0, description="conversations of each prompt and temperature")
    seed: int = Field(default=0, description="each row's seed follows from this and its id")
    supervise_end: bool = Field(default=True, description="whether the end-of-turn token is in the loss spans")
    output_format: Literal["oai", "sharegpt"] = Field(default="oai", description="of the turns beside the token ids")
    loop_tokens: int = Field(default=128, gt=0, description="a stretch of so many repeating tokens marks a loop")
    endpoints: list[str] = _operational(default=[], description="running servers' URLs; []: one is started")
    concurrency: int | None = _operational(
        default=None, gt=0, description="conversations in flight; default: as the server keeps up"
    )
    min_concurrency: int = _operational(default=16, gt=0, description="floor of the concurrency that follows")
    max_concurrency: int = _operational(default=512, gt=0, description="its ceiling")
    max_attempts: int = _operational(default=6, gt=0, description="tries of one request")
    backoff_s: float = _operational(default=1.0, ge=0, description="wait before the second try; doubles, jittered")
    request_timeout_s: float = _operational(default=1800.0, gt=0)
    patience_s: float = _operational(default=600.0, ge=0, description="how long to wait for a server to come back")
    drain_timeout_s: float = _operational(default=20.0, ge=0, description="for what is in flight at Ctrl-C or SIGTERM")
    max_failed_fraction: float = _operational(default=0.05, ge=0, le=1, description="above it the stage exits 1")
    max_failures_in_row: int = _operational(default=50, gt=0, description="so many without a success exit 1")

    @field_validator("thinking_modes")
    @classmethod
    def _modes_have_weights(cls, modes: list[str]) -> list[str]:
        names = [_mode_and_weight(mode)[0] for mode in modes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} stands there twice; write {name}:2 to have it twice as often")
        return modes

    @property
    def modes_in_turn(self) -> list[str]:
        """The modes that rows take in turn, each as often as it weighs."""
        return [name for name, weight in map(_mode_and_weight, self.thinking_modes) for _ in range(weight)]

    @field_validator("temperature")
    @classmethod
    def _temperatures_are_not_negative(cls, value: float | list[float] | None) -> float | list[float] | None:
        if value == [] or any(t < 0 for t in (value if isinstance(value, list) else [value or 0])):
            raise ValueError("temperature is a number from 0, or a list of such")
        return value

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> SynthSection:
        if self.min_concurrency > self.max_concurrency:
            raise ValueError("min_concurrency is above max_concurrency")
        return self


class DumpSection(Section):
    backend: Literal["vllm", "server", "hf"] = Field(
        default="vllm", description="vLLM in this process, servers of it (dump.endpoints), or transformers"
    )
    dtype: Literal["bfloat16", "float32", "fp8_e4m3"] = Field(
        default="bfloat16", description="of the stored states; fp8: one scale a token and layer"
    )
    include_truncated: bool = Field(default=False, description="whether conversations with a cut reply are dumped")
    include_loops: bool = Field(default=False, description="whether conversations that fell into a loop are dumped")
    truncate: bool = Field(default=False, description="cut over-length samples instead of leaving them out")
    args: Args = Field(default={}, description="vLLM's engine arguments, over serve.args")
    env: dict[str, str] = _operational(default={}, description="environment of the engine, over serve.env")
    endpoints: list[str] = _operational(
        default=[], description="servers with extraction on (`serve command --extract`)"
    )
    requests_in_flight: int = _operational(default=64, gt=0, description="samples that a server works on at a time")
    staging_dir: Path | None = _operational(
        default=None, description="default: local memory if there is any, else the store"
    )
    staging_gib: float = _operational(default=8.0, gt=0, description="states that wait to be stored, at most")
    writers: int = _operational(default=2, gt=0, description="threads that store samples")
    max_reject_fraction: float = _operational(default=0.01, ge=0, le=1, description="above it the stage exits 1")


class TrainSection(Section):
    method: Literal["dflash", "eagle3"] = "dflash"
    block_size: int = Field(default=8, ge=2, description="anchor included: 8 drafts 7 tokens (EAGLE3: in evaluation)")
    ttt_steps: int = Field(default=7, gt=0, description="EAGLE3: steps that training unrolls")
    ttt_decay: float = Field(default=0.8, gt=0, le=1, description="EAGLE3: step i weighs decay^i")
    draft_vocab_size: int | None = Field(
        default=None, gt=0, description="EAGLE3: the most frequent tokens that the draft knows; default: all"
    )
    objective: Literal["tokens", "distill"] = Field(
        default="tokens", description="cross-entropy on the generated tokens, or on the target's own distribution"
    )
    slot_weights: Literal["decay", "dpace"] = Field(default="dpace", description="DFlash: D-PACE's, or static")
    dpace_smoothing: float = Field(default=0.5, ge=0, le=1, description="D-PACE: a of q~ = (1-a)*q + a")
    schedule: Literal["cosine", "linear", "wsd"] = Field(
        default="cosine", description="after the warm-up; wsd: constant, then linear over the last fifth"
    )
    accumulate: int = Field(default=1, gt=0, description="batches of one optimizer step")
    held_out_fraction: float = Field(
        default=0.0, ge=0, lt=0.5, description="conversations kept from training, for the best checkpoint"
    )
    gradient_checkpointing: bool = _operational(default=False)
    compile: bool = _operational(default=False, description="torch.compile, layer by layer; for GPUs")
    parallel: Literal["ddp", "fsdp2"] = _operational(default="ddp", description="under torchrun with several processes")
    evaluate_every: int = _operational(default=0, ge=0, description="steps between looks at held-out rows; 0: never")
    num_layers: int = Field(default=5, gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(default=128, gt=0)
    intermediate_size: int = Field(gt=0)
    num_anchors: int = Field(default=512, gt=0, description="blocks drawn in each sample at a step, at most")
    batch_samples: int = Field(default=2, gt=0, description="samples of one step, of all processes together")
    max_samples: int | None = Field(default=None, gt=0, description="only the store's first so many samples")
    num_steps: int = Field(gt=0)
    learning_rate: float = Field(default=1.2e-3, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    loss_decay: float = Field(default=4.0, gt=0, description="gamma: slot k weighs exp(-(k-1)/gamma)")
    yarn: bool = Field(default=True, description="train with the rope scaling that export writes")
    seed: int = 0
    checkpoint_every: int = _operational(default=100, gt=0)
    keep_checkpoints: int = _operational(default=2, gt=0)
    threads: int | None = _operational(default=None, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> TrainSection:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self


class YarnSection(Section):
    """YaRN: `factor * original_max_position_embeddings` positions (arXiv 2309.00071, as transformers computes it)."""

    factor: float = Field(gt=1)
    original_max_position_embeddings: int = Field(gt=0, description="the training length")


class ExportSection(Section):
    yarn: YarnSection | None = None
    max_position_embeddings: int | None = Field(
        default=None, gt=0, description="the served context length, YaRN's whole window; default: target.max_model_len"
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class LayoutSpace(Section):
    """One layout of the target on its GPUs, and the concurrencies to measure: doubling from start, end included."""

    tp: int = Field(default=1, gt=0, description="GPUs")
    ep: int = Field(default=1, gt=0, description="experts over as many GPUs: 1 or tp")
    dp_attn: bool = Field(default=False, description="attention as tp replicas (data parallel), experts over all GPUs")
    conc_start: int = Field(gt=0)
    conc_end: int = Field(gt=0)

    @model_validator(mode="after")
    def _layout_is_possible(self) -> LayoutSpace:
        if self.ep not in (1, self.tp):
            raise ValueError(f"ep is 1 or tp ({self.tp}): vLLM spreads experts over all GPUs or none")
        if self.dp_attn and self.ep == 1:
            raise ValueError("dp_attn needs ep = tp > 1: the experts go over all replicas")
        if self.conc_end < self.conc_start:
            raise ValueError("conc_end is below conc_start")
        return self

    @property
    def concurrencies(self) -> list[int]:
        """conc_start, its doubles below conc_end, conc_end."""
        doubles = [self.conc_start]
        while doubles[-1] < self.conc_end:
            doubles.append(min(2 * doubles[-1], self.conc_end))
        return doubles


class ScenarioSection(Section):
    """Tokens in and out of a request, and the layouts to measure it on."""

    isl: int = Field(gt=0, description="input sequence length (tokens), at most")
    osl: int = Field(gt=0, description="output sequence length (tokens), at most")
    search_space: list[LayoutSpace] = Field(min_length=1)


class SweepSection(Section):
    scenarios: list[ScenarioSection] = _operational(default=[], description="points are kept one by one")
    range_ratio: float = Field(
        default=0.8, gt=0, le=1, description="lengths are uniform from this share of isl and osl to all of it"
    )
    dataset: str = Field(
        default="random", description="random tokens, or a JSONL of prompts (rows with prompt, turns or messages)"
    )
    ignore_eos: bool = Field(default=True, description="replies of full length; false: they end where the target does")
    seed: int = 0


class BenchSection(Section):
    concurrency: list[int] = Field(default=[1, 8], min_length=1)
    num_prompts: dict[int, int] = Field(default={}, description="by concurrency: only the first n prompts")
    sweep: SweepSection = _operational(default=SweepSection(), description="of `bench plan` and `bench sweep` alone")


def _mode_and_weight(text: str) -> tuple[str, int]:
    """`"enabled:2"` as ("enabled", 2); without a weight it is 1. Raises ValueError for anything else."""
    name, separator, weight = text.partition(":")
    if not name.strip() or (separator and not (weight.isdecimal() and int(weight) > 0)):
        raise ValueError(f"{text!r} is neither a mode nor mode:weight with a whole weight above 0")
    return name.strip(), int(weight) if separator else 1


class Recipe(Section):
    target: TargetSection
    serve: ServeSection = ServeSection()
    synth: SynthSection = SynthSection()
    dump: DumpSection = DumpSection()
    train: TrainSection
    export: ExportSection = ExportSection()
    bench: BenchSection = BenchSection()

    def to_yaml(self) -> str:
        """The resolved recipe: every field, defaults filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, lay `--set` overrides ("a.b=c", YAML values) and flags ({"a.b": value}) over it, check it.

    Raises UserError for a missing file, broken YAML, an unknown key or a value that does not fit. Flags that are None
    were not given.
    """
    values, _ = read_values(path, overrides, flags)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(path, error) from None


def read_values(
    path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], set[str]]:
    """The recipe's values as `load_recipe` takes them, unchecked; and the dotted keys that --set or a flag gave."""
    values: dict[str, Any] = {}
    for _, above in reversed(read_files(path)):
        values = _lay_over(values, above)
    given = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}", found="no '='", expected="section.key=value", fix="Write it so.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(
                f"--set {override}", found=f"broken YAML {text!r}", expected="a YAML value", fix="Mend or quote it."
            ) from None
        _put(values, key.strip(), value, f"--set {override}")
        given.add(key.strip())
    for key, value in (flags or {}).items():
        if value is not None:
            _put(values, key, value, key)
            given.add(key)
    return values, given


def read_files(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe's file and what it says, then its base's, and so on. Raises UserError for one that cannot be read."""
    files: list[tuple[Path, dict[str, Any]]] = []
    while True:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                path, found=error.strerror or "no file", expected="a recipe", fix="Correct the path."
            ) from None
        except yaml.YAMLError as error:
            raise UserError(
                path, found=f"broken YAML ({error})", expected="a recipe", fix="Mend the indentation or the quotes."
            ) from None
        if not isinstance(values, dict):
            raise UserError(path, found=type(values).__name__, expected="sections", fix="See recipes/Tiny-DFlash.")
        base = values.pop("base", None)
        files.append((path, values))
        if base is None:
            return files
        path = path.parent / str(base)
        if any(path.samefile(known) for known, _ in files if path.exists()):
            raise UserError(f"{files[-1][0]} (base)", found=str(base), expected="another recipe", fix="Correct it.")


def _lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section; what is no section, or is null, replaces."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _lay_over(merged[key], value) if both else value
    return merged


def _put(values: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *parents, last = dotted.split(".")
    place: Any = values
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise UserError(where, found=f"no section at {dotted!r}", expected="section.key=value", fix="Correct the key.")
    place[last] = value


def _explain(path: Path, error: ValidationError) -> UserError:
    """The first thing wrong with a recipe, told with the nearest known key where a key is unknown."""
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    where = f"{path} ({'.'.join(keys) or 'recipe'})"
    more = f" ({error.error_count() - 1} more after this.)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.0)
        return UserError(
            where,
            found=f"unknown key {keys[-1]!r}",
            expected=f"one of {', '.join(known)}",
            fix=f"Did you mean {near[0]!r}? Rename or remove it.{more}" if near else f"Remove it.{more}",
        )
    found = "nothing" if first["type"] == "missing" else repr(first["input"])
    message = "a value" if first["type"] == "missing" else first["msg"]
    return UserError(where, found=found, expected=message, fix=f"Correct the recipe or pass --set.{more}")


def _keys_at(keys: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for key in keys:
        if key not in model.model_fields:  # a place in a list, or a name in a dictionary of sections
            continue
        annotation = model.model_fields[key].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
