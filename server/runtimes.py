"""The three ways to run the same ServerApp and ClientApp, by the name of the runtime."""

from __future__ import annotations

from collections.abc import Callable

from conf.compose import encode_conf
from conf.schema import SimulateConf
from fedofa.types.errors import ConfigError
from server.federation import build_parts
from server.resources import available_cores


def run_federation(conf: SimulateConf) -> None:
    """Run a federation to its end; its results are in `conf.output_dir`.

    Raises:
        FedofaError: saying in one line what is wrong; bad settings and missing data show before any process starts.
    """
    if conf.runtime.name not in RUNTIMES:
        raise ConfigError(f"runtime.name: expected one of {sorted(RUNTIMES)}, found {conf.runtime.name!r}")
    build_parts(conf)  # what it loads is cached for those who load it again
    RUNTIMES[conf.runtime.name](conf)


def _run_in_process(conf: SimulateConf) -> None:
    """The ServerApp in this process, the ClientApp in worker processes."""
    from flwr.app import Context, RecordDict
    from flwr.app.user_config import UserConfig

    from server.grid import InProcessGrid
    from server.server_app import app

    run_config: UserConfig = {"config": encode_conf(conf)}
    workers = conf.runtime.num_workers or available_cores()
    with InProcessGrid(num_nodes=conf.fleet.num_clients, run_config=run_config, num_workers=workers) as grid:
        app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config))


def _run_on_ray(conf: SimulateConf) -> None:
    from server.ray_engine import run_on_ray

    run_on_ray(conf)


def _run_on_superlink(conf: SimulateConf) -> None:
    from server.superlink import run_on_superlink

    run_on_superlink(conf)


RUNTIMES: dict[str, Callable[[SimulateConf], None]] = {
    "in_process": _run_in_process,
    "ray": _run_on_ray,
    "superlink": _run_on_superlink,
}
