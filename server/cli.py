"""The command line: federations, sweeps, comparisons, central training, and subnets for a measured device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

USAGE = """usage: fedofa COMMAND [SETTING=VALUE ... | FOLDER ...]

commands:
  simulate    run a federation on this machine, e.g. fedofa simulate rounds=20 fleet.num_clients=50 data=cifar10
              with -m once for every combination of swept settings: fedofa simulate -m seed=0,1,2 finetune=full,bias
  sweep       search settings with Optuna, e.g. fedofa sweep 'finetune.learning_rate=tag(log,interval(0.01,0.3))'
              study.trials=20 'study.objectives=[accuracy.largest,bytes_up]' study.name=rates
  compare     put runs side by side in a table and a picture, e.g. fedofa compare runs/simulate runs/sweeps/seed
  shrink      train a supernet here, on the whole training set, e.g. fedofa shrink shrinking=progressive
  profile     measure this device, e.g. fedofa profile engine=onnxruntime output=runs/board.json validate=true
  predictor   train an accuracy predictor, e.g. fedofa predictor pairs=runs/pairs.jsonl supernet=small in_channels=1
  search      find the best subnet for a device, e.g. fedofa search device=runs/board.json latency_ms=20 bytes_up=4e6
  settings    print every setting with its value, as simulate would use it; `settings shrink ...` those of shrink,
              and so for profile, predictor and search

Settings are Hydra overrides; groups (data, partition, fleet, supernet, finetune, aggregation, shrinking, runtime,
tracking; for shrink data, supernet, shrinking, optimiser) take the name of a file under conf/."""

_MULTIRUN = {"-m", "--multirun"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `fedofa` command; returns the exit status: 0 done, 1 failed on bad input, 2 wrong usage."""
    from fedofa.types.errors import FedofaError

    command, *overrides = list(sys.argv[1:] if arguments is None else arguments) or ["help"]
    if command in ("help", "-h", "--help") or {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0
    actions = {
        "simulate": simulate,
        "sweep": sweep,
        "compare": compare,
        "shrink": shrink,
        "profile": profile,
        "predictor": predictor,
        "search": search,
        "settings": print_settings,
    }
    if command not in actions:
        print(f"fedofa: unknown command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        actions[command](overrides)
    except FedofaError as error:
        return _fail(str(error))
    except OSError as error:  # a full disk, a folder without permission
        return _fail(f"{error}; what was whole stays whole: mend it, then go on with the same command and resume=true")
    except KeyboardInterrupt:
        print("stopped; go on with the same command, and resume=true unless it is of a sweep", file=sys.stderr)
        return 130
    return 0


def _fail(reason: str) -> int:
    Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(reason)}", highlight=False, soft_wrap=True)
    return 1


def sweep(overrides: Sequence[str]) -> None:
    """Search settings with Optuna."""
    _set_environment()
    from server.study import run_study

    run_study(overrides)


def _set_environment() -> None:
    """Before anything imports numpy, torch or flwr."""
    from server.environment import ONE_THREAD, SILENT_FLOWER, adopt

    adopt(ONE_THREAD, SILENT_FLOWER)


def compare(folders: Sequence[str]) -> None:
    """Put runs side by side."""
    from server.compare import compare_runs

    compare_runs([Path(folder) for folder in folders])


def print_settings(overrides: Sequence[str]) -> None:
    """Print the composed settings as YAML."""
    from omegaconf import OmegaConf

    from conf import compose

    composers = {
        "shrink": compose.compose_shrink_conf,
        "profile": compose.compose_profile_conf,
        "predictor": compose.compose_predictor_conf,
        "search": compose.compose_search_conf,
    }
    command = overrides[0] if overrides else ""
    if command in composers:
        conf = OmegaConf.structured(composers[command](overrides[1:]))
    else:
        conf = OmegaConf.structured(compose.compose_conf(overrides))
    print(OmegaConf.to_yaml(conf), end="")


def simulate(overrides: Sequence[str]) -> None:
    """Run one federation, or with -m one for every combination of the swept settings."""
    _set_environment()
    if _MULTIRUN & set(overrides):
        from server.sweeps import run_sweep

        run_sweep([item for item in overrides if item not in _MULTIRUN])
        return
    from conf.compose import compose_conf

    conf = compose_conf(overrides)
    from server.results import print_results
    from server.runtimes import run_federation

    run_federation(conf)
    print_results(Path(conf.output_dir))


def shrink(overrides: Sequence[str]) -> None:
    """Train a supernet centrally, and print its subnets' accuracy."""
    from server.environment import ONE_THREAD, adopt

    adopt(ONE_THREAD)  # torch's own number of threads is a setting
    from conf.compose import compose_shrink_conf
    from server.results import print_shrinking
    from server.shrink import run_shrinking

    conf = compose_shrink_conf(overrides)
    run_shrinking(conf)
    print_shrinking(Path(conf.output_dir))


def profile(overrides: Sequence[str]) -> None:
    """Measure this device, and print what was found."""
    from conf.compose import compose_profile_conf

    conf = compose_profile_conf(overrides)
    from server.environment import ONE_THREAD, adopt

    if conf.threads == 1:
        adopt(ONE_THREAD)
    from server.profile import run_profile, summary_lines

    console = _console()
    for line in summary_lines(run_profile(conf)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"the profile is in {conf.output}", highlight=False, soft_wrap=True)


def predictor(overrides: Sequence[str]) -> None:
    """Train an accuracy predictor, and print how it ranks held-out subnets."""
    _set_environment()
    from conf.compose import compose_predictor_conf
    from server.predictor import run_predictor

    conf = compose_predictor_conf(overrides)
    held_out = run_predictor(conf)
    _console().print(
        f"trained on {held_out.num_train} pairs; on {held_out.num_held_out} held-out ones: rank correlation "
        f"{held_out.rank_correlation:.3f}, mean absolute error {held_out.mean_absolute_error:.4g}. "
        f"The predictor is in {conf.output}",
        highlight=False,
        soft_wrap=True,
    )


def search(overrides: Sequence[str]) -> None:
    """Find the best subnet for a device."""
    _set_environment()
    from conf.compose import compose_search_conf
    from server.search import print_found, run_search

    conf = compose_search_conf(overrides)
    print_found(conf, run_search(conf), _console())


def _console() -> Console:
    from server.progress import wide_console

    return wide_console()
