"""Flower's Ray simulation engine as a runtime: the one module that knows Ray (ADR 7)."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

from flwr.app import Context, Message
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from conf.compose import encode_conf
from conf.schema import SimulateConf
from fedofa.types.errors import ConfigError, RuntimeUnavailableError
from server.environment import KEPT_PAGES, ONE_THREAD, SILENT_FLOWER, adopt
from server.resources import available_cores
from server.serving import error_reply, serve

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # What Ray prints of processes that end, the engine's own at the end of a run among them.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Task ClientAppActor.terminate failed|A worker died or was killed",
}
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on any system: this machine's Ray listens on loopback only
# One client at a time on a core. A process that dies is started again; without a second try, messages that reach it
# meanwhile would fail with it. A client whose process dies is thus asked twice.
_ACTOR = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": 1}


_CONNECT_SECONDS = 5.0


class ConfiguredClientApp(ClientApp):
    """The real ClientApp with the run's settings, which this engine leaves out of a node's context.

    It is pickled to the actors, so that it holds strings only and imports the app where it runs. A message that is not
    done within its TTL, which counts from sending, ends the actor's process: the engine would wait for it for ever.
    """

    def __init__(self, client_app: str, run_config: UserConfig) -> None:
        super().__init__()
        self._client_app = client_app
        self._run_config = json.dumps(run_config)

    def __call__(self, message: Message, context: Context) -> Message:
        own = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config=context.node_config,
            state=context.state,
            run_config=json.loads(self._run_config),
        )
        seconds_left = message.metadata.created_at + message.metadata.ttl - time.time()
        if seconds_left <= 0:
            return error_reply(message, TimeoutError("its time was over before it began"))
        watchdog = threading.Timer(seconds_left, os._exit, [1])
        watchdog.daemon = True
        watchdog.start()
        try:
            reply = serve(self._real, message, own)
        finally:
            watchdog.cancel()
        if not reply.has_error():
            context.state = own.state
        return reply

    def _real(self, message: Message, context: Context) -> Message:
        """The app itself; one that cannot be imported is this client's failure."""
        return resolve_name(self._client_app)(message, context)


def run_on_ray(
    conf: SimulateConf, server_app: str = "server.server_app:app", client_app: str = "clients.client_app:app"
) -> None:
    """Run the federation on Ray: on an instance of this machine's own or, with `runtime.address`, on a cluster.

    Raises:
        ConfigError: Ray is not installed.
        RuntimeUnavailableError: Ray cannot be started, or the cluster cannot be reached.
    """
    run_config: UserConfig = {"config": encode_conf(conf)}
    address = conf.runtime.address
    adopt(ONE_THREAD, KEPT_PAGES, SILENT_FLOWER, _QUIET, _LOOPBACK if _is_here(address) else {})
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # failures are in rounds.jsonl, each with its reason
    outer = ServerApp()

    @outer.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config = run_config
        resolve_name(server_app)(grid, context)

    with _ray(address, conf.runtime.num_workers or available_cores()):
        from flwr.simulation import run_simulation

        run_simulation(
            server_app=outer,
            client_app=ConfiguredClientApp(client_app, run_config),
            num_supernodes=conf.fleet.num_clients,
            backend_config={"client_resources": dict(_ACTOR)},
        )


def _is_here(address: str | None) -> bool:
    """Whether Ray is this process's own or a cluster whose head is on loopback."""
    return not address or _host_and_port(address)[0] in ("127.0.0.1", "localhost")


def _host_and_port(address: str) -> tuple[str, str]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return host, port


@contextmanager
def _ray(address: str | None, num_workers: int) -> Iterator[None]:
    """A connection to Ray for as long as the block runs; Flower's engine uses the one that it finds."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("runtime=ray needs Ray, which is not installed; pip install 'fedofa[ray]'") from error
    search_path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    variables = {**ONE_THREAD, **KEPT_PAGES, "PYTHONPATH": search_path}
    own = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False, "num_cpus": num_workers}
    where: dict[str, Any] = {"address": address} if address else own
    if address:
        _check_reachable(address)
    try:
        ray.init(runtime_env={"env_vars": variables}, log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise _unavailable(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Find out in seconds what Ray itself tries for minutes."""
    host, port = _host_and_port(address)
    if not host:
        return  # "auto" and the like name no host
    if not port.isdecimal():
        raise ConfigError(f"runtime.address: expected 'auto', 'host:port' or 'ray://host:port', found {address!r}")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unavailable(address, error) from error


def _unavailable(address: str | None, error: Exception) -> RuntimeUnavailableError:
    reason = " ".join(str(error).split())[:200]
    if address:
        what = f"the Ray cluster at {address!r} cannot be reached: {reason}; start it (`ray start --head`), check "
        return RuntimeUnavailableError(f"runtime.address: {what}the address, or leave it out to use this machine alone")
    return RuntimeUnavailableError(f"runtime=ray: Ray cannot be started here: {reason}; its logs are in /tmp/ray")
