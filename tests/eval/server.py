"""A stub of an OpenAI-compatible server: answers by a function, and fails as it is told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any] | bytes | int | float


@contextmanager
def serving(reply: Callable[[str, dict[str, Any], dict[str, str]], Reply]) -> Iterator[str]:
    """Serve until the block ends; gives the URL up to /v1.

    reply: (path, body, headers) -> a JSON reply, raw bytes, a status of an error, or seconds to wait before hanging up.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = reply(self.path.removeprefix("/v1/"), body, dict(self.headers))
            if isinstance(said, float):
                time.sleep(said)
                self.close_connection = True
                return
            content = (
                json.dumps(said).encode() if isinstance(said, dict) else said if isinstance(said, bytes) else b"no"
            )
            self.send_response(said if isinstance(said, int) else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str, tokens: int, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish}], "usage": {"prompt_tokens": tokens}}
