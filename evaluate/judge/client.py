"""The judge's endpoint: chat completions, one reply a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpkd.evaluate.judge.verdicts import Reply
from dpkd.evaluate.options.judge import KEY_VARIABLE, JudgeConfig
from dpkd.teacher_cache.engines.openai import client
from dpkd.teacher_cache.engines.openai.messages import to_count

Messages = Sequence[dict[str, str]]


def read_key(config: JudgeConfig) -> str:
    """The key from the environment, or an empty text; raises `UserError` if it cannot be used or must not be sent."""
    return client.read_key(
        config.api_key_env,
        KEY_VARIABLE,
        config.judge_url,
        "--judge-url",
        allow_plain_http=config.allow_plain_http,
        to_allow="give --allow-plain-http",
    )


class JudgeClient(client.EndpointClient):
    """Asks the judge of `config`, as `EndpointClient` posts."""

    def __init__(self, config: JudgeConfig, key: str) -> None:
        self._config = config
        super().__init__(
            client.Endpoint(
                name="judge",
                url=config.judge_url,
                key=key,
                key_variable=config.api_key_env or KEY_VARIABLE,
                timeout_s=config.timeout_s,
                tries=config.tries,
                retry_delay_s=config.retry_delay_s,
                kept="The verdicts so far are kept",
                missing="Give --judge-url with the path before /chat/completions (often /v1) and a --judge-model it "
                "has",
            )
        )

    async def ask(self, messages: Messages) -> Reply:
        """The judge's reply; raises as `post` does."""
        body = self._config.request_body() | {"messages": list(messages)}
        return await self.post("/chat/completions", body, self._reply, "chat completion")

    def _reply(self, body: Any) -> Reply:
        choice = body["choices"][0]
        content = choice["message"].get("content")
        if content is not None and not isinstance(content, str):
            raise TypeError("`content` is not text")
        usage = body.get("usage") or {}
        return Reply(
            # a reply may be empty if all tokens went into reasoning
            self.clean(content or ""),
            self._text(choice.get("finish_reason")),
            self._text(body.get("model")),
            to_count(usage.get("prompt_tokens")),
            to_count(usage.get("completion_tokens")),
        )

    def _text(self, value: object) -> str | None:
        return self.clean(value) if isinstance(value, str) else None
