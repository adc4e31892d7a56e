"""HTTP endpoints on loopback for tests of the judge: one that fails as scripted, and one that counts requests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

#: status, headers, body
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Endpoint:
    """What came in: bodies, paths and headers of requests, in order of arrival, and how many were open at once."""

    answer: Callable[[dict[str, Any]], Answer]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[str]:
        """The first message of each request."""
        return [body["messages"][0]["content"] for body in self.bodies]


@contextlib.contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[Endpoint]:
    """An endpoint whose answers `answer` makes of the request's body; up inside of the block."""
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            except ValueError:
                return  # the client was killed while it wrote
            with endpoint.lock:
                endpoint.bodies.append(body)
                endpoint.paths.append(self.path)
                endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                endpoint.open += 1
                endpoint.most_open = max(endpoint.most_open, endpoint.open)
            try:
                status, headers, content = endpoint.answer(body)
            finally:
                with endpoint.lock:
                    endpoint.open -= 1
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                for name, value in ({"content-length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(content: str | None, **more: Any) -> Answer:
    """A chat completion of 10 prompt and 2 completion tokens, with other fields as given."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    body = {"model": "judge-0613", "choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}
    return 200, {"content-type": "application/json"}, json.dumps(body | more).encode()


def failure(status: int, message: str = "a fault", **headers: str) -> Answer:
    """An error as OpenAI words them; `retry_after` becomes the header `retry-after`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message}}).encode()


@contextlib.contextmanager
def counting(target: str) -> Iterator[Endpoint]:
    """An endpoint that hands every request on to the one at `target`."""
    with httpx.Client(timeout=120) as client:

        def hand_on(body: dict[str, Any]) -> Answer:
            answer = client.post(f"{target}/chat/completions", json=body)
            return answer.status_code, {"content-type": "application/json"}, answer.content

        with serving(hand_on) as endpoint:
            yield endpoint
