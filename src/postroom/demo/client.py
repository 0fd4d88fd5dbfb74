"""The little HTTP a program needs to hand in work: any language could do the same."""

from __future__ import annotations

import http.client
import json
import mimetypes
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the gateway said."""

    status: int
    body: Any
    """Decoded JSON, or ``None``."""
    seconds: float
    """From connecting to the last byte."""


class Client:
    """Talks to one gateway; a connection a request. Methods raise ``OSError`` or ``http.client.HTTPException``."""

    def __init__(self, host: str, port: int, *, timeout: float = 60.0) -> None:
        self.url = f"http://{host}:{port}"
        self._host, self._port, self._timeout = host, port, timeout

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self._send("GET", path, None, headers or {})

    def post(self, path: str, body: Any = None) -> Answer:
        """``body``: sent as JSON."""
        return self._send("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def upload(self, path: str, fields: Mapping[str, object], parameter: str, name: str, data: bytes) -> Answer:
        """A form with a file in it, as a browser or ``curl -F`` sends it."""
        boundary = uuid.uuid4().hex
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'.encode()
            for field, value in fields.items()
        ]
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        quoted = name.replace("\\", "%5C").replace('"', "%22")
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{parameter}"; filename="{quoted}"\r\n'
        parts += [head.encode(), f"Content-Type: {kind}\r\n\r\n".encode(), data, f"\r\n--{boundary}--\r\n".encode()]
        content_type = f"multipart/form-data; boundary={boundary}"
        return self._send("POST", path, b"".join(parts), {"Content-Type": content_type})

    def _send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        begin = time.perf_counter()
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        is_json = "json" in (response.headers.get("Content-Type") or "")
        return Answer(response.status, json.loads(content) if is_json else None, time.perf_counter() - begin)
