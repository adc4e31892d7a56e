"""A filter in front of vLLM's server, which loads it by name: no path but `/health` answers without the key.

vLLM itself asks for its key under `/v1` only.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dpkd.teacher_cache.engines.server.http import KEY_VARIABLE

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


class KeyFilter:
    """ASGI middleware; the key is the one in `VLLM_API_KEY` of the server's process. Raises `KeyError` without one."""

    def __init__(self, app: _App) -> None:
        self._app = app
        self._expected = f"bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        kind = scope["type"]
        if kind == "lifespan" or (kind == "http" and scope["path"] == "/health") or self._has_key(scope):
            await self._app(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = b'{"error": "Unauthorized"}'
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _has_key(self, scope: _Message) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return secrets.compare_digest(scheme.lower() + b" " + key, self._expected)
