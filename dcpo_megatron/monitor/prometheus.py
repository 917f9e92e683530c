"""The last metrics of a run for Prometheus: text at http://127.0.0.1:PORT/metrics, from a daemon thread of rank 0. Off
unless ``logging.prometheus_port`` is set.

It binds to the loopback interface only and has no other page. Every metric is a gauge ``dcpo_NAME``; those of
evaluations are ``dcpo_eval_NAME``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dcpo_megatron.monitor.metrics import METRICS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsEndpoint:
    """Serves what :meth:`update` was given last. Raises OSError where the port cannot be had."""

    def __init__(self, port: int):
        self._values: dict[str, float] = {}
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.endpoint = self
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics endpoint", daemon=True)
        self._thread.start()

    def update(self, values: Mapping[str, float], prefix: str = "") -> None:
        """Replaces the values of these metrics; ``prefix`` is "eval_" for an evaluation's."""
        self._values = self._values | {prefix + name: float(value) for name, value in values.items()}

    def text(self) -> str:
        """The exposition format, version 0.0.4."""
        lines = []
        for name, value in sorted(self._values.items()):
            declared = METRICS.get(name)
            if declared is not None:
                meaning = declared.of + (f", divided by: {declared.denominator}" if declared.denominator else "")
                lines.append(f"# HELP dcpo_{name} " + meaning.replace("\\", "\\\\").replace("\n", " "))
            lines += [f"# TYPE dcpo_{name} gauge", f"dcpo_{name} {_number(value)}"]
        return "\n".join([*lines, ""])

    def close(self) -> None:
        """Stops serving; safe to call twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(timeout=5)
        self._server.server_close()


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    endpoint: MetricsEndpoint


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # a client that says nothing does not keep a thread

    def do_GET(self) -> None:
        if self.path.split("?")[0] != "/metrics":
            self.send_error(404, "the metrics are at /metrics")
            return
        body = self.server.endpoint.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The console belongs to the run."""
