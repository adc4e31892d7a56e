"""The endpoint of the engine `openai`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from dpkd.core.settings import Address, Settings
from dpkd.teacher_cache.engines.engine import EndpointApi


class EndpointOptions(Settings):
    """A teacher behind an endpoint, and what may be spent on it."""

    title: ClassVar[str] = "Endpoint (--engine openai)"

    teacher_url: Address | None = Field(
        None, description="base URL of the endpoint, such as https://HOST/v1; --teacher is then the model's tokenizer"
    )
    teacher_model: str | None = Field(None, min_length=1, description="name of the teacher at the endpoint")
    teacher_api: EndpointApi = Field(
        "completions",
        description="what to ask: completions, with prompts by --template; or chat, with the endpoint's own template",
    )
    api_key_env: str | None = Field(
        None, min_length=1, description="environment variable with the API key; none: DPKD_TEACHER_API_KEY if it is set"
    )
    timeout_s: float = Field(300.0, gt=0, description="longest wait for an answer, in seconds")
    tries: int = Field(8, ge=1, description="attempts per answer before the job stops")
    max_cost: float | None = Field(
        None, gt=0, description="stop before this run costs more, in the currency of the prices; none: no limit"
    )
    price_in: float | None = Field(None, ge=0, description="price of a million prompt tokens; none: not counted")
    price_out: float | None = Field(None, ge=0, description="price of a million answered tokens; none: not counted")

    @field_validator("teacher_url")
    @classmethod
    def _base_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} is not an address of the form https://HOST/v1")
        return value.rstrip("/").removesuffix("/completions").removesuffix("/chat")
