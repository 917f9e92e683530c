"""Stands for the server environment's interpreter: notes how it was started beside this run's logs, and answers health
checks."""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


def end_with_the_launcher():
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    words = sys.argv[2:]
    port = int(words[words.index("--port") + 1])
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "SGLANG_MEMORY_SAVER_CUDA_GRAPH")
    seen = {"words": words, **{name: os.environ.get(name) for name in names}}
    Path(os.environ["DCPO_TEST_SEEN"], f"{port}.json").write_text(json.dumps(seen))
    threading.Thread(target=end_with_the_launcher, daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
