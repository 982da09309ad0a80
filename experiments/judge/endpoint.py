"""An OpenAI-compatible endpoint, asked again where that may help."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException

from ..inputs.errors import InputError

ATTEMPTS = 6  # for what may pass: too many requests, a server that is down, no answer in time


LONGEST = 60.0  # seconds between attempts


@dataclass
class Endpoint:
    """Where a judge can be asked: the address that ends before `/chat/completions`, the model's name, and the key, if
    one is needed.
    """

    url: str
    model: str
    key: str | None
    temperature: float | None = 0.0
    timeout: float = 120.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise InputError(
                f"'{self.url}' is no address of an endpoint; it begins with http:// or https://, as in"
                " https://api.openai.com/v1"
            )
        self._opener = urllib.request.build_opener(_Stay)

    def ask(self, content: list[dict]) -> str:
        """The model's reply. Tries again where that may help. Raises InputError that says what went wrong."""
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]} | (
            {} if self.temperature is None else {"temperature": self.temperature}
        )
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(ATTEMPTS):
            wait = min(LONGEST, 2.0**attempt)
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return _reply(response.read(), self.url)
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.reason}: {_said(error)}"
                if error.code in (401, 403):
                    raise InputError(
                        f"'{self.url}' refuses the key ({why}); check the key and what it may use"
                    ) from error
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise InputError(
                        f"'{self.url}' does not take the request ({why}); check --url and --model"
                    ) from error
                wait = min(LONGEST, _seconds(error.headers.get("Retry-After"), wait))
            except (OSError, HTTPException) as error:  # no connection, no answer in time, an answer that broke off
                why = str(error) or type(error).__name__
            if attempt + 1 < ATTEMPTS:
                self.sleep(wait)
        raise InputError(
            f"'{self.url}' gave no answer in {ATTEMPTS} attempts (the last: {why}); what is rated is kept, run the same"
            " command again to go on"
        )


class _Stay(urllib.request.HTTPRedirectHandler):
    """No redirects: the key is for the address that was given."""

    def redirect_request(self, *args, **kwargs):
        return None


def _seconds(value: str | None, default: float) -> float:
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):  # none, or a date
        return default


def _said(error: urllib.error.HTTPError) -> str:
    """What a server says of an error, in short."""
    try:
        return error.read(300).decode(errors="replace").strip()
    except (OSError, HTTPException):
        return ""


def _reply(body: bytes, url: str) -> str:
    try:
        said = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"'{url}' answered, but not as an OpenAI-compatible endpoint: {body[:200].decode(errors='replace')!r};"
            " check --url"
        ) from error
    return said if isinstance(said, str) else ""
