"""The schema of params.yaml: one class a section, with each value's type and limits."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(pydantic.BaseModel):
    """A section: no unknown keys, no string where a number belongs, no NaN; values are fixed once read."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    source: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(min_length=1)] | None
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    trust_remote_code: bool
    cpu_kernels: bool
    cache_frozen: Literal["auto", "on", "off"]
    numerics: Literal["portable", "native"]


class Prepare(Section):
    seed: int
    dataset: Annotated[str, Field(min_length=1)] | None
    columns: dict[str, str]
    template: Annotated[str, Field(min_length=1)] | None
    valid_fraction: Fraction | None
    valid_rows: Positive | None
    test_fraction: Fraction | None
    test_rows: Positive | None
    group_by: Annotated[str, Field(min_length=1)] | None
    carry: list[Annotated[str, Field(min_length=1)]]
    normalize: Literal["NFC", "NFKC"] | None
    duplicates: Literal["keep", "exact", "normalized"]
    leaks: Literal["drop", "error"]
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None
    max_chars: Positive | None
    preferences: Literal["error", "chosen"]
    labels: Literal["error", "drop_false", "ignore"]
    on_bad_row: Literal["error", "skip"]

    @pydantic.model_validator(mode="after")
    def check_split_sizes(self) -> Prepare:
        for name in ("valid", "test"):
            if (getattr(self, f"{name}_fraction") is None) == (getattr(self, f"{name}_rows") is None):
                raise ValueError(_one_of(f"prepare.{name}_fraction", f"prepare.{name}_rows"))
        if (self.valid_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise ValueError("valid_fraction and test_fraction together must be less than 1")
        return self


def _check_date(value: Any) -> str:
    """A date as text, as 2026-01-31; YAML makes a date of it where it stands without quotes."""
    try:
        return date.fromisoformat(value if isinstance(value, str) else value.isoformat()[:10]).isoformat()
    except (AttributeError, ValueError):
        raise ValueError(f"must be a date, such as 2026-01-31, not {value!r}") from None


class Tokenize(Section):
    max_length: Annotated[int, Field(ge=8)]
    over_length: Literal["truncate", "drop", "split", "error"]
    overlap: Annotated[int, Field(ge=0)]
    train_on: Literal["all", "completion", "assistant", "last_assistant"]
    answer_marker: Annotated[str, Field(min_length=1)] | None
    question_marker: Annotated[str, Field(min_length=1)] | None
    chat_template: Annotated[str, Field(min_length=1)] | None
    date: Annotated[str, pydantic.PlainValidator(_check_date, json_schema_input_type=str)]
    thoughts: Literal["train", "mask", "drop"]
    special_in_content: Literal["text", "error", "allow"]
    add_eos: bool
    on_bad_row: Literal["error", "skip"]

    @pydantic.model_validator(mode="after")
    def check_overlap(self) -> Tokenize:
        if self.over_length == "split" and self.overlap > self.max_length // 2:
            raise ValueError(f"overlap ({self.overlap}) must not exceed half of max_length ({self.max_length})")
        return self

    @pydantic.model_validator(mode="after")
    def check_markers(self) -> Tokenize:
        if self.question_marker is not None and self.answer_marker is None:
            raise ValueError(
                "question_marker says where an answer ends: set answer_marker too, which says where it begins"
            )
        return self


def _check_layers(value: Any) -> int | str | list[int]:
    """Check `lora.layers`: the last N, all, or a list. (Of a union, pydantic reports an error for each member.)"""
    if value == "all" or (type(value) is int and value >= 1):
        return value
    if (
        isinstance(value, list)
        and value
        and all(type(index) is int and index >= 0 for index in value)
        and len(set(value)) == len(value)
    ):
        return value
    raise ValueError(
        f"must be how many of the last layers, 'all', or a list of different indices from 0, not {value!r}"
    )


class Lora(Section):
    type: Literal["lora", "dora"]
    rank: Positive
    alpha: Annotated[float, Field(gt=0)] | None
    scale: Annotated[float, Field(gt=0)] | None
    rank_stabilized: bool
    dropout: Fraction
    targets: Annotated[list[str], Field(min_length=1)]
    layers: Annotated[
        int | str | list[int],
        pydantic.PlainValidator(_check_layers, json_schema_input_type=Positive | Literal["all"] | list[int]),
    ]

    @pydantic.model_validator(mode="after")
    def check_scaling(self) -> Lora:
        if (self.alpha is None) == (self.scale is None):
            raise ValueError(_one_of("lora.alpha", "lora.scale"))
        if self.rank_stabilized and self.alpha is None:
            raise ValueError("rank_stabilized divides alpha: set alpha in place of scale, or rank_stabilized to false")
        return self


class Train(Section):
    epochs: Positive | None
    iters: Positive | None
    init_adapter: Annotated[str, Field(min_length=1)] | None
    batch_size: Positive | None
    batch_tokens: Positive | None
    grad_accumulation: Positive
    optimizer: Literal["adamw", "adam", "sgd", "adafactor", "lion", "muon"]
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    bias_correction: bool
    weight_decay: Annotated[float, Field(ge=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Annotated[int, Field(ge=0)]
    final_learning_rate: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    grad_checkpoint: bool
    fused_loss: bool
    compile: Literal["auto", "on", "off"]
    steps_per_report: Positive
    steps_per_eval: Positive
    val_batches: Annotated[int, Field(ge=-1)]
    keep: Literal["best", "last"]
    patience: Positive | None

    @pydantic.model_validator(mode="after")
    def check_duration(self) -> Train:
        if (self.epochs is None) == (self.iters is None):
            raise ValueError(_one_of("train.epochs", "train.iters"))
        return self

    @pydantic.model_validator(mode="after")
    def check_batch_size(self) -> Train:
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise ValueError(_one_of("train.batch_size", "train.batch_tokens"))
        return self

    @pydantic.model_validator(mode="after")
    def check_weight_decay(self) -> Train:
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError("optimizer adam knows no weight_decay: set it to 0, or use adamw")
        return self


class Evaluate(Section):
    batch_size: Positive
    answers: Annotated[int, Field(ge=0)]
    slice_by: Annotated[str, Field(min_length=1)] | None
    max_forgetting: Annotated[float, Field(gt=0)] | None


class MergedAdapter(Section):
    path: Annotated[str, Field(min_length=1)]
    weight: float


class Quantize(Section):
    bits: Literal[2, 3, 4, 5, 6, 8]
    group_size: Literal[32, 64, 128]


class Merge(Section):
    adapters: Annotated[list[MergedAdapter], Field(min_length=1)] | None
    dequantize: bool
    quantize: Quantize | None
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    check_rows: Positive
    min_survival: Annotated[float, Field(le=1)]

    @pydantic.model_validator(mode="after")
    def _one_packing(self) -> Merge:
        if self.quantize and not self.dequantize:
            raise ValueError(
                "dequantize: false keeps the base's quantisation, and quantize makes another; set dequantize to true, "
                "or quantize to null"
            )
        return self


class Generate(Section):
    max_tokens: Positive
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0)]
    min_p: Fraction
    repetition_penalty: Annotated[float, Field(gt=0)]
    presence_penalty: Annotated[float, Field(ge=-2, le=2)]
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)]
    stop: list[Annotated[str, Field(min_length=1)]]
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    batch_size: Positive


class Runtime(Section):
    """Settings that change no result: no stage depends on them."""

    steps_per_save: Positive
    cache_gb: Annotated[float, Field(ge=0)]


def _one_of(first: str, second: str) -> str:
    return f"set exactly one of {first} and {second}, and the other to null: --set {first}=null or --set {second}=null"


class Params(Section):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0)]
    model: Model
    prepare: Prepare
    tokenize: Tokenize
    lora: Lora
    train: Train
    evaluate: Evaluate
    merge: Merge
    generate: Generate
    runtime: Runtime
