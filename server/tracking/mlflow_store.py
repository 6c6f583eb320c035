"""MLflow: one MLflow run a run, the comparison nested in the main one; by default in an SQLite file on this machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from conf.schema import TrackingConf
from server.tracking.tracker import RunFacts, Tracker, recall_identity, remember_identity

_BACKEND = "mlflow"
_STORE, _ARTIFACTS = "mlflow.db", "mlflow_artifacts"
_PARENT = "mlflow.parentRunId"
_BATCH = 100  # parameters, or tags, that MLflow takes in one call
_EVERY_ROUND = "folded"  # a metric that every round has
# MLflow's own patience with a server that is gone is minutes a call, during which no round would run.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def open_run(conf: TrackingConf, facts: RunFacts) -> MlflowRun:
    """The run in MLflow's store; a run that must be replaced goes to MLflow's trash."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    shared = facts.main_folder.parent
    client = MlflowClient(tracking_uri=conf.uri or f"sqlite:///{shared / _STORE}")
    run_id = _known_run(client, facts)
    if run_id is None:
        experiment = _experiment(client, conf.project, None if _remote(conf.uri) else (shared / _ARTIFACTS).as_uri())
        run_id = client.create_run(experiment, run_name=facts.name).info.run_id
        remember_identity(facts.folder, _BACKEND, run_id)
    client.update_run(run_id, status="RUNNING")
    _describe(client, run_id, facts)
    return MlflowRun(client, run_id)


class MlflowRun(Tracker):
    """An MLflow run: settings as parameters, those that may change as tags, rounds as metrics by step.

    A round is one batch, which MLflow's database stores whole or not at all.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._last_round = _last_round(client, run_id)

    def last_round(self) -> int:
        """See Tracker."""
        return self._last_round

    def log_round(self, round_number: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        now_ms = int(time.time() * 1000)
        points = [Metric(name, value, now_ms, round_number) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=points)

    def log_results(self, round_number: int, figures: Mapping[str, float], files: Sequence[Path]) -> None:
        """See Tracker."""
        known = self._client.get_run(self._run_id).data.metrics
        self.log_round(round_number, {name: value for name, value in figures.items() if known.get(name) != value})
        for path in files:
            self._client.log_artifact(self._run_id, str(path))

    def close(self, *, finished: bool) -> None:
        """See Tracker."""
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


def _known_run(client: MlflowClient, facts: RunFacts) -> str | None:
    """The run to go on with, if this store has it; one that starts over or has rounds too many is not gone on with."""
    run_id = recall_identity(facts.folder, _BACKEND)
    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # it is in another store
            return None
        raise
    if run.info.lifecycle_stage != "active":
        return None
    if facts.last_round == 0 or _last_round(client, run_id) > facts.last_round:
        client.delete_run(run_id)
        return None
    return run_id


def _last_round(client: MlflowClient, run_id: str) -> int:
    return max((point.step for point in client.get_metric_history(run_id, _EVERY_ROUND)), default=0)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """The experiment's id; of several runs that start at once, one makes it."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
    return found.experiment_id


def _remote(uri: str | None) -> bool:
    """Whether a server decides where files go."""
    return uri is not None and uri.startswith(("http", "databricks"))


def _describe(client: MlflowClient, run_id: str, facts: RunFacts) -> None:
    parent = recall_identity(facts.main_folder, _BACKEND) if facts.is_comparison else None
    changeable = {**facts.changeable, **({_PARENT: parent} if parent else {})}
    params = [Param(name, str(value)) for name, value in facts.settings.items()]
    tags = [RunTag(name, str(value)) for name, value in changeable.items()]
    for start in range(0, max(len(params), len(tags)), _BATCH):
        part = slice(start, start + _BATCH)
        client.log_batch(run_id, params=params[part], tags=tags[part])
