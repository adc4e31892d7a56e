"""Requests to servers on this machine avoid proxies, and keys are not sent in plain text to others."""

from __future__ import annotations

import asyncio
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from support.commands import free_port

from dpkd.core.errors import UserError
from dpkd.teacher_cache.engines.server.http import KEY_VARIABLE, Server, base_urls


class Echo(BaseHTTPRequestHandler):
    """Answers with the key that it got."""

    def do_GET(self) -> None:
        body = self.headers.get("Authorization", "").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.9"])
def test_a_server_on_this_machine_is_asked_without_the_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = f"http://127.0.0.1:{free_port()}"  # a proxy that would refuse
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, nothing)
    monkeypatch.setenv(KEY_VARIABLE, "a-key")
    with ThreadingHTTPServer((host, 0), Echo) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        (url,) = base_urls([f"http://{host}:{server.server_port}"])

        async def ask() -> bytes:
            asked = Server(url)
            async with asked.client:
                return await asked.ask("GET", "/health")

        try:
            assert asyncio.run(ask()) == b"Bearer a-key"
        finally:
            server.shutdown()


def test_a_key_goes_to_another_host_over_https_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_urls(["http://other:8000"]) == ["http://other:8000"]
    monkeypatch.setenv(KEY_VARIABLE, "a-key")
    assert base_urls(["https://other", "http://127.0.0.9:1"]) == ["https://other", "http://127.0.0.9:1"]
    with pytest.raises(UserError, match=r"would be sent in plain text: found http://other, expected https://"):
        base_urls(["http://other:8000"])
