"""One way to run a federation: from checked settings to results in `output_dir`, on the runtime that they name."""

from __future__ import annotations

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig

from conf.compose import encode_conf
from conf.schema import SimulateConf
from fedofa.types.errors import ConfigError
from server.federation import build_parts
from server.grid import InProcessGrid, available_cores
from server.server_app import app


def run_federation(conf: SimulateConf) -> None:
    """Run the ServerApp in this process and the ClientApp in worker processes.

    Raises:
        ConfigError, DatasetError, CheckpointError: for settings that are refused, before any process starts where
            that can be known.
    """
    if conf.runtime.name != "in_process":
        raise ConfigError(f"runtime.name: expected 'in_process', found {conf.runtime.name!r}")
    build_parts(conf)  # bad settings and missing data show before any process starts; what it loads is cached
    run_config: UserConfig = {"config": encode_conf(conf)}
    workers = conf.runtime.num_workers or available_cores()
    with InProcessGrid(num_nodes=conf.fleet.num_clients, run_config=run_config, num_workers=workers) as grid:
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
        app(grid, context)
