"""A collector on loopback that understands OTLP over HTTP as its protobuf says, and can be away."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """`spans` is what has come; `refusing` answers 503 instead, `hanging` nothing at all."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: list[str] = []
        self.refusing = False
        self.hanging = threading.Event()
        self.released = threading.Event()
        self.endpoint = ""

    def take(self, path: str, body: bytes) -> int:
        if self.hanging.is_set():
            self.released.wait()
        if self.refusing:
            return 503
        if path != "/v1/traces":
            return 404
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services += [
                one.value.string_value
                for one in group.resource.attributes
                if one.key == "service.name"
            ]
            for scope in group.scope_spans:
                self.spans += scope.spans
        return 200


@contextmanager
def collector() -> Iterator[Collector]:
    """One that serves as long as the block lasts."""
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = made.take(self.path, body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: the tests look at what came."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
