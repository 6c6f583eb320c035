"""The command line: `fedofa simulate` runs a federation on this machine, in process or on a SuperLink."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from conf.schema import SimulateConf

USAGE = """usage: fedofa COMMAND [SETTING=VALUE ...]

commands:
  simulate    run a federation on this machine, e.g. fedofa simulate rounds=20 fleet.num_clients=50 data=cifar10
  settings    print every setting with its value, as simulate would use it

Settings are Hydra overrides; groups (data, partition, fleet, supernet, finetune, aggregation, runtime) take the name
of a file under conf/."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `fedofa` command; returns the exit status: 0 done, 1 failed on bad input, 2 wrong usage."""
    from fedofa.types.errors import FedofaError

    command, *overrides = list(sys.argv[1:] if arguments is None else arguments) or ["help"]
    if command in ("help", "-h", "--help") or {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0
    actions = {"simulate": simulate, "settings": print_settings}
    if command not in actions:
        print(f"fedofa: unknown command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        actions[command](overrides)
    except FedofaError as error:
        text = f"[bold red]error:[/bold red] {escape(str(error))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        print("stopped; go on with the same command and resume=true", file=sys.stderr)
        return 130
    return 0


def print_settings(overrides: Sequence[str]) -> None:
    """Print the composed settings as YAML."""
    from omegaconf import OmegaConf

    from conf.compose import compose_conf

    print(OmegaConf.to_yaml(OmegaConf.structured(compose_conf(overrides))), end="")


def simulate(overrides: Sequence[str]) -> None:
    """Run the ServerApp and the ClientApp on the runtime that the settings name."""
    from server.environment import ONE_THREAD, QUIET_FLOWER

    os.environ.update({**ONE_THREAD, **QUIET_FLOWER})
    from conf.compose import compose_conf

    conf = compose_conf(overrides)
    from fedofa.types.errors import ConfigError
    from server.federation import build_parts
    from server.results import print_results
    from server.superlink import run_on_superlink

    runtimes = {"in_process": _run_in_process, "superlink": run_on_superlink}
    if conf.runtime.name not in runtimes:
        raise ConfigError(f"runtime.name: expected one of {sorted(runtimes)}, found {conf.runtime.name!r}")
    build_parts(conf)  # bad settings and missing data show before any process starts; what it loads is cached
    runtimes[conf.runtime.name](conf)
    print_results(Path(conf.output_dir))


def _run_in_process(conf: SimulateConf) -> None:
    """The ServerApp in this process, the ClientApp in worker processes."""
    from flwr.app import Context, RecordDict
    from flwr.app.user_config import UserConfig

    from conf.compose import encode_conf
    from server.grid import InProcessGrid, available_cores
    from server.server_app import app

    run_config: UserConfig = {"config": encode_conf(conf)}
    workers = conf.runtime.num_workers or available_cores()
    with InProcessGrid(num_nodes=conf.fleet.num_clients, run_config=run_config, num_workers=workers) as grid:
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
        app(grid, context)
