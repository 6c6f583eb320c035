"""Checkpoints: after every round the whole run on disk, whole or not at all, and refused when damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedofa.types.errors import CheckpointError
from fedofa.types.state import SharedState

_FORMAT = 1
_TENSORS, _MANIFEST = "state.safetensors", "checkpoint.json"
_KEPT = 2


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the rounds so far; time and memory over all processes of the run.

    Training rounds with their evaluations; introductions, planning, writing the checkpoint and the clients' own
    evaluation at the end are apart.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run after a round.

    Args:
        round: the last round that is done; 0 before the first.
        state: what the server knows.
        client_states: simulated client (partition) -> its serialised state.
        totals: sums over the rounds so far.
        run: what identifies the run; a checkpoint of another run is refused.
        fleet: digest of the clients that take part.
        log_bytes: length of `rounds.jsonl` with this round's line; a longer file holds rounds that did not finish.
    """

    round: int
    state: SharedState
    client_states: Mapping[int, bytes]
    totals: Totals
    run: Mapping[str, Any]
    fleet: str
    log_bytes: int


class CheckpointStore:
    """The checkpoints of one run in `folder`, the newest two; each is a folder "round-000012" of two files.

    `unit` is what the run counts: "round", or "step" where it trains on one machine.
    """

    def __init__(self, folder: Path, unit: str = "round") -> None:
        self.folder = folder
        self.unit = unit

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        prefix = f"{self.unit}-"
        names = (item.name.removeprefix(prefix) for item in self.folder.iterdir() if item.name.startswith(prefix))
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint under a temporary name, flush it to disk, rename it; then drop all but the newest two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self._path(checkpoint.round)
        temporary = self.folder / f".writing-{checkpoint.round:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        tensors = save_tensors(_flatten(checkpoint))
        manifest = {
            "format": _FORMAT,
            "round": checkpoint.round,
            "version": checkpoint.state.version,
            "totals": asdict(checkpoint.totals),
            "run": dict(checkpoint.run),
            "fleet": checkpoint.fleet,
            "log_bytes": checkpoint.log_bytes,
            "tensors_bytes": len(tensors),
            "tensors_xxh3_128": xxhash.xxh3_128_hexdigest(tensors),
        }
        sealed = json.dumps({"manifest": manifest, "xxh3_128": _seal(manifest)}, indent=1, sort_keys=True)
        write_durably(temporary / _TENSORS, tensors)
        write_durably(temporary / _MANIFEST, sealed.encode())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush_folder(self.folder)
        for old in self.rounds()[:-_KEPT]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def drop_after(self, round_number: int) -> None:
        """Forget checkpoints of later rounds, which a run that goes on from here makes anew."""
        for later in self.rounds():
            if later > round_number:
                shutil.rmtree(self._path(later))

    def load(self, run: Mapping[str, Any], round_number: int | None = None) -> Checkpoint | None:
        """The checkpoint of that round, by default the newest; None when there is none at all.

        Raises:
            CheckpointError: for a round without a checkpoint, a damaged one (an intact older one is then offered) or
                one of another run (the settings that differ are named).
        """
        rounds = self.rounds()
        if not rounds and round_number is None:
            return None
        wanted = rounds[-1] if round_number is None else round_number
        if wanted not in rounds:
            raise CheckpointError(f"{self.folder}: no checkpoint of {self.unit} {wanted}; there are {rounds}")
        try:
            checkpoint = self._read(wanted)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {self._offer(wanted)}") from error
        _check_run(checkpoint, run, self._path(wanted))
        return checkpoint

    def newest_intact(self, run: Mapping[str, Any]) -> Checkpoint | None:
        """The newest checkpoint of this run that can be read, for runs that may as well start over."""
        for number in reversed(self.rounds()):
            try:
                return self.load(run, number)
            except CheckpointError:
                continue
        return None

    def _offer(self, damaged: int) -> str:
        for older in reversed([number for number in self.rounds() if number < damaged]):
            try:
                self._read(older)
            except CheckpointError:
                continue
            return f"The one before it is intact: go on from there with resume=true resume_{self.unit}={older}"
        return "There is no intact one before it: start again without resume"

    def _path(self, round_number: int) -> Path:
        return self.folder / f"{self.unit}-{round_number:06d}"

    def _read(self, round_number: int) -> Checkpoint:
        path = self._path(round_number)
        try:
            manifest = _read_manifest(path / _MANIFEST)
            data = (path / _TENSORS).read_bytes()
            size, checksum = manifest["tensors_bytes"], manifest["tensors_xxh3_128"]
        except (OSError, KeyError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error!r}") from error
        if len(data) != size:
            where = f"checkpoint {path / _TENSORS} is truncated"
            raise CheckpointError(f"{where}: expected {size:,} bytes, found {len(data):,}")
        if xxhash.xxh3_128_hexdigest(data) != checksum:
            raise CheckpointError(f"checkpoint {path / _TENSORS} is damaged: its checksum does not match")
        try:
            return _unflatten(load_tensors(data), manifest)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error!r}") from error


def _seal(manifest: Mapping[str, Any]) -> str:
    """Checksum of a manifest in its canonical form."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose checksum and format are right."""
    try:
        sealed = json.loads(path.read_bytes())
        manifest, seal = sealed["manifest"], sealed["xxh3_128"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged: {error!r}") from error
    if _seal(manifest) != seal:
        raise CheckpointError(f"checkpoint {path} is damaged: its checksum does not match")
    if manifest["format"] != _FORMAT:
        found = f"expected format {_FORMAT}, found {manifest['format']}"
        raise CheckpointError(f"checkpoint {path}: {found}; use the release that made it")
    return manifest


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in place whole: written beside it, flushed, renamed."""
    temporary = path.with_name(f".{path.name}.writing")
    write_durably(temporary, data)
    temporary.replace(path)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flatten(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    state = checkpoint.state
    flat = {f"tensor/{name}": value for name, value in state.tensors.items()}
    flat |= {f"ordering/{name}": value for name, value in state.ordering.items()}
    flat |= {f"moment/{kind}/{name}": value for kind, items in state.moments.items() for name, value in items.items()}
    flat |= {
        f"client/{partition}": np.frombuffer(value, np.uint8) for partition, value in checkpoint.client_states.items()
    }
    return {name: np.asarray(value, order="C") for name, value in flat.items()}


def _unflatten(flat: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> Checkpoint:
    tensors, ordering, clients = {}, {}, {}
    moments: dict[str, dict[str, np.ndarray]] = {}
    for key, value in flat.items():
        kind, name = key.split("/", 1)
        if kind == "tensor":
            tensors[name] = value.copy()  # writable, as torch wants it
        elif kind == "ordering":
            ordering[name] = value
        elif kind == "moment":
            moment, name = name.split("/", 1)
            moments.setdefault(moment, {})[name] = value
        else:
            clients[int(name)] = value.tobytes()
    state = SharedState(int(manifest["version"]), tensors, ordering, moments)
    totals = Totals(**manifest["totals"])
    return Checkpoint(
        manifest["round"], state, clients, totals, manifest["run"], manifest["fleet"], manifest["log_bytes"]
    )


def _check_run(checkpoint: Checkpoint, run: Mapping[str, Any], path: Path) -> None:
    then, now = ({key: repr(value) for key, value in settings.items()} for settings in (checkpoint.run, run))
    differing = [
        f"{key}: {then.get(key, 'no such setting')} then, {now.get(key, 'no such setting')} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if differing:
        version = "" if then.keys() == now.keys() else " and the version of fedofa"
        raise CheckpointError(
            f"checkpoint {path} belongs to a run with other settings: {'; '.join(differing[:5])}. "
            f"Resume with the settings{version} it was made with, or start anew in another output_dir"
        )
