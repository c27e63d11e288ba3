"""Serves /metrics of one agent with prometheus-client's own server."""

import errno
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from elastic_pt.errors import ConfigError
from elastic_pt.telemetry.catalogue import Metrics


def serve_metrics(
    metrics: Metrics, address: str, port: int, node_address: str
) -> tuple[WSGIServer, str]:
    """Serve on `address:port` (0 takes a free port); returns the server and its URL. Agent process.

    The URL of a server on all addresses (0.0.0.0, ::) names `node_address`, where others can reach it.
    """
    try:
        server, _ = start_http_server(port, addr=address, registry=metrics.registry)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(
                f"telemetry.metrics_port = {port}: {error.strerror} on {address}; expected a free port or 0"
            ) from error
        raise ConfigError(
            f"telemetry.metrics_address = {address!r}: {getattr(error, 'strerror', None) or error}; "
            "expected an address of this machine"
        ) from error
    reachable = node_address if address in ("", "0.0.0.0", "::") else address
    host = f"[{reachable}]" if ":" in reachable else reachable
    return server, f"http://{host}:{server.server_port}/metrics"
