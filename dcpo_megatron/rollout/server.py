"""One SGLang server, spoken to over HTTP: small control requests, one at a time from any thread. Sampling has a client
of its own.

    Server(url).post("/pause_generation", {"mode": "retract"})      a dict, or ServerError: what happened, at which
                                                                    server, in which request, what to do

Nothing here retries: whoever asks knows whether asking twice is harmless. Every request has a deadline.
"""

from __future__ import annotations

import threading

import httpx

from dcpo_megatron.rollout.protocol import RolloutError

# Below uvicorn's own 5 s, so that no request goes out on a connection which the server is closing.
KEEPALIVE_SECONDS = 2.0


_ANOTHER = "another service (or another version of SGLang) is there: give the address of an SGLang server"
# In the errors of connections that were made: to something that speaks no HTTP, or HTTP without TLS.
_NOT_HTTP = ("illegal status line", "[SSL")
# Statuses below 500 that pass by themselves.
_PASSING = (408, 425, 429)


class ServerError(RolloutError):
    """A server refused a request or did not answer it. ``url``: the server; ``path``: the request; ``status``: the HTTP
    status, None without an answer; ``final``: who answers there is no server of ours (another key, another service),
    and will not become one by waiting."""

    def __init__(self, message: str, url: str, path: str, status: int | None = None, final: bool = False):
        super().__init__(message)
        self.url, self.path, self.status, self.final = url, path, status, final


class Server:
    """An SGLang server at ``url``. Thread-safe; keeps its connections.

    Args:
        url: ``http://host:port``.
        api_key: what the server was started with (``--api-key``); sent as a bearer token.
        timeout: seconds a request may take where the call does not say otherwise.

    Raises:
        ValueError: ``url`` is not an http(s) address.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 60.0):
        self.url = url.rstrip("/")
        check_url(self.url)
        self.api_key = api_key
        self.timeout = timeout
        # trust_env off: a proxy of the machine must not stand between the trainer and its servers.
        self._client = httpx.Client(
            base_url=self.url,
            headers=headers(api_key),
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS),
        )
        self._paths: frozenset[str] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Server({self.url!r})"

    def get(self, path: str, *, timeout: float | None = None) -> dict:
        """The JSON answer to GET ``path``. Raises ServerError as :meth:`post` does."""
        return self._request("GET", path, None, timeout)

    def post(self, path: str, body: dict | None = None, *, timeout: float | None = None) -> dict:
        """The JSON answer to POST ``path`` ({} for an empty one, {"message": text} for plain text).

        Raises:
            ServerError: no connection, no answer within ``timeout`` seconds, an HTTP error, or an answer with
                ``"success": false``.
        """
        return self._request("POST", path, body if body is not None else {}, timeout)

    def offers(self, path: str) -> bool:
        """Whether this server's version has the request ``path``; read from ``/openapi.json`` once in a server's life.
        Raises ServerError."""
        with self._lock:
            paths = self._paths
        if paths is None:
            paths = frozenset(self.get("/openapi.json").get("paths", {}))
            with self._lock:
                self._paths = paths
        return path in paths

    def alive(self, timeout: float = 5.0) -> bool:
        """Whether the server's HTTP process answers, paused or not. (SGLang's own ``/health`` samples a token, and
        waits 20 s for it while paused.)"""
        try:
            self.get("/model_info", timeout=timeout)
        except ServerError:
            return False
        return True

    def model(self, timeout: float | None = None) -> dict:
        """What the server says of its model: ``model_path``, ``weight_version``, ... Raises ServerError, ``final``
        where no server of ours is there."""
        path = "/model_info"
        answer = self.get(path, timeout=timeout)
        if "weight_version" not in answer:
            said = " ".join(str(answer.get("message", answer)).split())[:80]
            raise ServerError(
                f"GET {self.url}{path} was answered, but not by an SGLang server ({said!r}): {_ANOTHER}",
                self.url,
                path,
                final=True,
            )
        return answer

    def generates(self, timeout: float = 30.0) -> bool:
        """Whether the server samples a token within ``timeout`` seconds; false while it is starting or paused."""
        try:
            self.get("/health_generate", timeout=timeout)
        except ServerError:
            return False
        return True

    def weight_version(self) -> str:
        """The tag of the weights that the server holds now. Raises ServerError."""
        return str(self.model()["weight_version"])

    def pause(self, mode: str = "abort", timeout: float | None = None) -> None:
        """Stops sampling: ``abort`` ends what is running, ``in_place`` keeps its cache, ``retract`` lets it recompute
        its cache on resuming. Raises ServerError."""
        self.post("/pause_generation", {"mode": mode}, timeout=timeout)

    def resume(self, timeout: float | None = None) -> None:
        """Undoes :meth:`pause`; harmless where nothing is paused. Raises ServerError."""
        self.post("/continue_generation", {}, timeout=timeout)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _request(self, method: str, path: str, body: dict | None, timeout: float | None) -> dict:
        seconds = self.timeout if timeout is None else timeout
        what = f"{method} {self.url}{path}"
        try:
            response = self._client.request(method, path, json=body, timeout=seconds)
        except httpx.TimeoutException:
            raise ServerError(
                f"{what} was not answered within {seconds:g} s: the server hangs or is overloaded; look at its log",
                self.url,
                path,
            ) from None
        except (httpx.RequestError, UnicodeError) as error:  # the second: a name that can be none
            with self._lock:
                self._paths = None  # whoever answers next may be another version
            foreign = any(sign in str(error) for sign in _NOT_HTTP)
            why = (
                _ANOTHER
                if foreign
                else "the server is down or not reachable from here; restart it or correct its address"
            )
            raise ServerError(
                f"{what} failed ({type(error).__name__}: {error}): {why}", self.url, path, final=foreign
            ) from None
        status = response.status_code
        if status >= 300:
            raise ServerError(
                f"{what} was refused with status {status}: {refusal(response.content)}{advice(status)}",
                self.url,
                path,
                status,
                final=status < 500 and status not in _PASSING,
            )
        try:
            answer = _decode(response)
        except ValueError as error:
            raise ServerError(
                f"{what} was answered with what is not JSON ({error}): {_ANOTHER}", self.url, path, status, final=True
            ) from None
        if answer.get("success") is False:
            raise ServerError(f"{what} failed: {refusal(response.content)}", self.url, path, response.status_code)
        return answer


def check_url(url: str) -> None:
    """Raises ValueError where ``url`` is no server's address."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(
            f"server address {url!r} cannot be read ({error}): it has the form http://host:port, with an IPv6 address"
            " in brackets, such as http://[::1]:30000"
        ) from None
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 80) < 2**16:
        raise ValueError(f"server address {url!r} is not of the form http://host:port")


def advice(status: int) -> str:
    """What to do about a status, as the end of a sentence; "" where the server's own words say it."""
    if status in (401, 403):
        return "; the key is not the server's: give its own in servers.api_key_file, or in DCPO_SGLANG_API_KEY"
    if status in (407, 502, 504):
        return (
            "; something between (a proxy, a gateway) answers in the server's place: give the server's own address, and"
            " see that it runs"
        )
    if status == 503:
        return "; it, or something before it, is not ready"
    return f"; {_ANOTHER}" if status < 400 or status in (404, 405) else ""


def headers(api_key: str | None) -> dict[str, str]:
    """What every request to a server with ``api_key`` carries."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def refusal(content: bytes) -> str:
    """The server's own words in an error answer, one line, at most 500 characters."""
    text = content.decode("utf-8", errors="replace")
    return " ".join(text.split())[:500] or "no reason given"


def _decode(response: httpx.Response) -> dict:
    if not response.content:
        return {}
    if "json" not in response.headers.get("content-type", ""):
        return {"message": response.text}
    answer = response.json()
    return answer if isinstance(answer, dict) else {"answer": answer}
