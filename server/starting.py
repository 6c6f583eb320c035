"""Where a run starts: settings that contradict each other are refused, and weights are known by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedofa.types.errors import ConfigError
from server.weights import files_of

_MARKERS = ("checkpoints", "rounds.jsonl", "steps.jsonl", "summary.json")


def holds_run(output_dir: Path) -> bool:
    """Whether a run left anything in the folder."""
    return any((output_dir / marker).exists() for marker in _MARKERS)


def check_start(output_dir: Path, supernet_weights: str | None, *, resume: bool, at: int | None, name: str) -> None:
    """Refuse a start that the run itself would take away, and a checkpoint that nobody asked to go on from.

    Args:
        output_dir: of the run; what an earlier run left there is moved aside.
        supernet_weights: where the run's weights come from, if not from itself.
        resume: whether the run goes on from a checkpoint.
        at: the checkpoint that is asked for, if any.
        name: of the setting that asks for it.

    Raises:
        ConfigError: naming the setting.
    """
    if at is not None and not resume:
        raise ConfigError(f"{name}: expected resume=true beside {name}={at}, found false: the run would start anew")
    if supernet_weights is None or resume or not holds_run(output_dir):
        return
    source = Path(supernet_weights).resolve()
    if source.is_relative_to(output_dir.resolve()):
        raise ConfigError(
            f"supernet_weights: {source} lies in output_dir ({output_dir}), whose content is moved aside when the run "
            "starts; give the run another output_dir"
        )


def fingerprint(supernet_weights: str | None) -> str | None:
    """What tells the weights that a run starts from, and their normalisation, from others; None without any.

    A run goes on only with those that it began with, wherever they lie by then.
    """
    if supernet_weights is None:
        return None
    content = hashlib.sha256()
    for path in files_of(Path(supernet_weights)):
        if not path.is_file():
            return f"nothing at {path}"
        content.update(path.read_bytes())
    return content.hexdigest()[:16]
