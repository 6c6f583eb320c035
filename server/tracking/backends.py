"""The trackers by name: which packages each needs, and how it is opened."""

from __future__ import annotations

import os
from importlib.util import find_spec

from conf.schema import TrackingConf
from fedofa.types.errors import ConfigError, TrackingError
from server.tracking.tracker import RunFacts, Tracker

DIARY = "jsonl"
"""No tracker: the run's diary alone."""

_PACKAGES: dict[str, tuple[str, ...]] = {
    DIARY: (),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
_MODES = ("offline", "online")
# Read when the packages are first imported: neither reports its use or its errors to its maker.
_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}


def check_tracking(conf: TrackingConf) -> None:
    """Refuse a tracker that does not exist or whose package is missing, before anything is opened.

    Raises:
        ConfigError: naming the setting.
    """
    if conf.name not in _PACKAGES:
        raise ConfigError(f"tracking.name: expected one of {sorted(_PACKAGES)}, found {conf.name!r}")
    if conf.mode not in _MODES:
        raise ConfigError(f"tracking.mode: expected one of {list(_MODES)}, found {conf.mode!r}")
    if conf.uri and conf.uri.startswith("sqlite:///") and not conf.uri.startswith("sqlite:////"):
        raise ConfigError(f"tracking.uri: expected an absolute path, sqlite:////..., found {conf.uri!r}")
    missing = [package for package in _PACKAGES[conf.name] if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"tracking.name: {conf.name!r} needs {', '.join(missing)}, which is not installed; "
            f"pip install 'fedofa[{conf.name}]', or choose tracking={DIARY}"
        )


def open_tracker(conf: TrackingConf, facts: RunFacts) -> Tracker:
    """The chosen tracker's run, as far as it got before.

    Raises:
        TrackingError: when it cannot be opened, whatever the reason.
    """
    os.environ.update(_ENVIRONMENT)
    try:
        if conf.name == "mlflow":
            from server.tracking.mlflow_store import open_run
        elif conf.name == "tensorboard":
            from server.tracking.tensorboard_files import open_run
        else:
            from server.tracking.wandb_run import open_run
        return open_run(conf, facts)
    except Exception as error:
        raise TrackingError(
            f"tracking={conf.name}: run {facts.name!r} cannot be opened: {type(error).__name__}: {error}; "
            f"correct the tracking settings, or choose tracking={DIARY}"
        ) from error
