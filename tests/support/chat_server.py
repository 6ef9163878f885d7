"""A small server that answers requests for chat completions by a script."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def error(status, message="no", **headers):
    return status, headers, json.dumps({"error": {"message": message}}).encode()


@contextmanager
def serving(*script):
    """A server that answers its requests by `script`, the last entry for ever; yields its URL and what it was asked.

    An entry is (status, headers, body), or a function of the handler that returns one, or None if it answered itself.
    """
    asked = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            with lock:
                number = len(asked)
                self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append({"path": self.path, "key": self.headers["Authorization"], "time": time.monotonic()})
                asked[-1]["body"] = self.body
            step = script[min(number, len(script) - 1)]
            if callable(step):
                step = step(self)
            if step is None:
                return
            status, headers, content = step
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
