"""What a client may ask: the fields of OpenAI's requests that are read here, each with its type and limits.

A field that would change the answer and cannot be had is refused; others that are not known are passed over.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn

import pydantic
from pydantic import Field

from stages.params import schema

_LEAST_TEMPERATURE = 1e-3  # below it logits divided by it may overflow: what it means is 0
NonEmpty = Annotated[str, Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Token = Annotated[int, Field(ge=0)]


class Refusal(Exception):  # noqa: N818  no error of this program
    """A request that is not answered: the HTTP status, and OpenAI's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def body(self) -> bytes:
        """In OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()


class _Fields(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class _StreamOptions(_Fields):
    include_usage: bool = False


class _ResponseFormat(_Fields):
    type: Literal["text"]


class _Request(_Fields):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = None
    stop: Annotated[list[NonEmpty], Field(max_length=16)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=10)] | None = None
    n: Literal[1] | None = None
    response_format: _ResponseFormat | None = None
    # Of mlx-lm's server: a path that it would open, and what its own rendering of the chat template takes.
    adapters: None = None
    draft_model: None = None
    role_mapping: None = None
    chat_template_kwargs: None = None

    @pydantic.field_validator("stop", mode="before")
    @classmethod
    def one_string_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class _Chat(_Request):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None


class _Completion(_Request):
    prompt: NonEmpty | Annotated[list[Token], Field(min_length=1)]


def read_request(raw: bytes, *, chat: bool) -> dict[str, Any]:
    """The fields that a request's body gives, checked.

    Raises:
        Refusal: it is no JSON object, or a field is wrong.
    """
    try:
        fields = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise Refusal(400, "the body is nested too deep") from None
    except ValueError as error:  # of UTF-8 and of JSON
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Refusal(400, "the body must be a JSON object")
    try:
        request = (_Chat if chat else _Completion).model_validate(fields)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise Refusal(400, f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None
    return request.model_dump(exclude_none=True)


def for_mlx_lm(fields: dict[str, Any], defaults: schema.Generate, *, vocabulary: int) -> dict[str, Any]:
    """The fields as mlx-lm's handler reads them, what the request leaves open as `defaults` say.

    Raises:
        Refusal: a token of logit_bias is not in the vocabulary.
    """
    given = defaults.model_dump(exclude={"seed", "batch_size"}) | fields
    given["max_tokens"] = given.pop("max_completion_tokens", given["max_tokens"])
    if given["temperature"] < _LEAST_TEMPERATURE:
        # The likeliest token needs no seed, and without one requests share a batch.
        given["temperature"] = 0.0
        given.pop("seed", None)
    if "seed" in given:
        given["seed"] %= 2**64
    if given["repetition_penalty"] == 1:
        given["repetition_penalty"] = 0.0  # mlx-lm's word for none
    if given["top_k"] >= vocabulary:
        given["top_k"] = 0
    for token in given.get("logit_bias", ()):
        if not (token.isascii() and token.isdigit() and int(token) < vocabulary):
            raise Refusal(400, f"logit_bias: {token!r} is no token; they go from 0 to {vocabulary - 1}")
    return given


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
