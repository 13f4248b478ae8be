"""The HTTP server: mlx-lm's handler of OpenAI's API, with what it lacks.

A request is checked before mlx-lm sees it: route, key, size, JSON, fields, the model's name. Its prompt is rendered
here, as training rendered it, and goes on as tokens: no path, no Hub id and no address of an image gets any further.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import socket
import time
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm.server import APIHandler, CompletionRequest, get_system_fingerprint

from stages.params import schema
from stages.serving.generation import Generation, Provider
from stages.serving.requests import Refusal, for_mlx_lm, read_request

MAX_BODY = 4 * 2**20  # bytes of a request
_MAX_DRAINED = 256 * 2**20  # of a body that is too large, read so that its sender hears why
_SILENCE_SECONDS = 60  # after which a client that sends or takes nothing is let go
_CHAT = ("/v1/chat/completions", "/chat/completions")
_COMPLETION = "/v1/completions"

log = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """Takes connections from the start, and answers once it is told to serve, which the models must be there for.

    Raises:
        OSError: the address cannot be had.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, host: str, port: int, provider: Provider, options: schema.Generate, key: str | None) -> None:
        self.provider, self.options, self.key = provider, options, key
        self.rendering = Lock()
        self.fingerprint = get_system_fingerprint()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.generation = Generation(provider)

    def server_bind(self) -> None:
        # HTTPServer's own asks the name service who the host is.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note what went wrong with one client, such as its leaving: the others are served on."""
        log.info("%s: connection ended", client_address[0], exc_info=True)


class Handler(APIHandler):
    """One request."""

    server: Server
    path: str
    timeout = _SILENCE_SECONDS
    server_version, sys_version = "lorabuild", ""

    def __init__(self, request: Any, client_address: Any, server: Server) -> None:
        super().__init__(server.generation, request, client_address, server, system_fingerprint=server.fingerprint)

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def _answered(self, answer: Any) -> None:
        self.path = urlsplit(self.path).path
        try:
            answer()
        except Refusal as refusal:
            self._send(refusal.status, refusal.body)

    def _get(self) -> None:
        if self.path == "/health":
            return self.handle_health_check()
        self._check_key()
        models = [
            {"id": name, "object": "model", "created": self.created, "owned_by": "lorabuild"} for name in self._names
        ]
        if self.path == "/v1/models":
            return self._send(200, json.dumps({"object": "list", "data": models}).encode())
        if self.path.startswith("/v1/models/"):
            name = self._known(unquote(self.path.removeprefix("/v1/models/")))
            return self._send(200, json.dumps(models[self._names.index(name)]).encode())
        raise Refusal(404, f"there is no {self.path} here")

    def _post(self) -> None:
        raw = self._body()
        if self.path not in (*_CHAT, _COMPLETION):
            raise Refusal(404, f"there is no {self.path} here")
        self._check_key()
        fields = read_request(raw, chat=self.path != _COMPLETION)
        fields["model"] = self._known(fields.get("model", self._names[0]))
        fields = for_mlx_lm(fields, self.server.options, vocabulary=self.server.provider.vocabulary)
        fields["prompt"] = ids = self._prompt(fields)
        if (most := self.server.provider.models.context_tokens) is not None:
            fields["max_tokens"] = min(fields["max_tokens"], most - len(ids))
        if not self.server.generation.is_healthy:
            raise Refusal(503, "the model no longer answers; the server has to be started again")
        checked = json.dumps(fields | ({"messages": []} if "messages" in fields else {})).encode()
        self.rfile = io.BytesIO(checked)
        self.headers.replace_header("Content-Length", str(len(checked)))
        super().do_POST()

    def handle_chat_completions(self) -> CompletionRequest:
        request = super().handle_chat_completions()
        request.prompt = self.body["prompt"]
        return request

    def _body(self) -> bytes:
        """The request's body.

        Raises:
            Refusal: its size is not told, or too large.
        """
        told = self.headers.get("Content-Length", "")
        if not (told.isascii() and told.isdigit()):
            raise Refusal(411, "Content-Length must say how many bytes the body has")
        if (size := int(told)) > MAX_BODY:
            self._drain(size)
            raise Refusal(413, f"the body has {size:,} bytes; {MAX_BODY:,} is the most")
        return self.rfile.read(size)

    def _drain(self, size: int) -> None:
        left, end = min(size, _MAX_DRAINED), time.monotonic() + _SILENCE_SECONDS
        while left > 0 and time.monotonic() < end and (block := self.rfile.read(min(left, 2**16))):
            left -= len(block)

    def _check_key(self) -> None:
        if self.server.key is None:
            return
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode("latin-1"), self.server.key.encode()
        ):
            raise Refusal(401, "the key is missing or wrong; send it as: Authorization: Bearer KEY", "invalid_api_key")

    @property
    def _names(self) -> tuple[str, ...]:
        return self.server.provider.models.names

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise Refusal(404, f"no model {name[:80]!r} here; there are: {', '.join(self._names)}", "model_not_found")
        return name

    def _prompt(self, fields: dict[str, Any]) -> list[int]:
        """The tokens of a request's prompt.

        Raises:
            Refusal: the chat template rejects it, or it is too long.
        """
        models, prompt = self.server.provider.models, fields.get("prompt")
        ids: list[int]
        try:
            with self.server.rendering:  # tokenizer and template are not made for several threads
                if "messages" in fields:
                    asked: dict[str, Any] = {name: fields[name] for name in ("messages", "tools") if name in fields}
                    ids = models.prompts.of_conversation(asked).ids
                else:
                    ids = models.prompts.of_text(prompt).ids if isinstance(prompt, str) else list(prompt or ())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(400, " ".join(str(error).split()) or type(error).__name__) from None
        if not ids:
            raise Refusal(400, "the prompt is empty")
        if beyond := [token for token in ids if token >= self.server.provider.vocabulary]:
            raise Refusal(400, f"prompt: {beyond[0]} is no token; they go to {self.server.provider.vocabulary - 1}")
        try:
            models.check_length(len(ids))
        except ValueError as error:
            raise Refusal(400, str(error), "context_length_exceeded") from None
        return ids

    def _send(self, status: int, body: bytes) -> None:
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself, such as another method, in OpenAI's form."""
        self._send(code, Refusal(code, message or "refused").body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name of http.server
        log.info(format, *args)
