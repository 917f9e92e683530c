"""A stand-in for an SGLang server, for the faults that a real one cannot be brought to show: wrong tags, broken JSON,
answers cut off. Everything else is tested on real servers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dcpo_megatron.rollout.server import Server


def finished(index: int, tokens: list[int], tag: str, reason: str = "length") -> dict:
    """The event of a finished response."""
    return {
        "index": index,
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[-0.5, token, None] for token in tokens],
            "weight_version": tag,
            "weight_versions": [{"version": tag, "start": 0, "end": len(tokens)}],
        },
    }


def ordinary(tag: str):
    """Answers every sample with as many tokens 1 as are wanted."""

    def answer(body: dict) -> list:
        wanted = [params["max_new_tokens"] for params in body["sampling_params"]]
        return [finished(index, [1] * count, tag) for index, count in enumerate(wanted)]

    return answer


class StandIn:
    """``answer(body)`` gives the events of a /generate request, lines to send as they are, or an HTTP status.
    ``asked``: the bodies so far.

    ``works``, ``running``: what it says of itself, whether it samples and how many requests it holds."""

    def __init__(self, answer):
        self.asked: list[dict] = []
        self.works, self.running = True, 1
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path == "/v1/loads" or outer.works else 503)
                self.end_headers()
                if self.path == "/v1/loads":
                    self.wfile.write(
                        json.dumps({"loads": [{"num_running_reqs": outer.running, "num_waiting_reqs": 0}]}).encode()
                    )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                events = []
                if self.path == "/generate":
                    outer.asked.append(body)
                    events = answer(body)
                self.send_response(events if isinstance(events, int) else 200)
                self.end_headers()
                for event in [] if isinstance(events, int) else events:
                    line = event if isinstance(event, str) else json.dumps(event)
                    self.wfile.write(f"data: {line}\n\n".encode())

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.server = Server(f"http://127.0.0.1:{self._http.server_port}")
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()
        self.server.close()
