"""Settings of where a run starts: those that contradict each other are refused before anything is read or moved."""

from __future__ import annotations

from pathlib import Path

from fedofa.types.errors import ConfigError


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
    if supernet_weights is None:
        return
    source = Path(supernet_weights).resolve()
    if source.is_relative_to(output_dir.resolve()):
        raise ConfigError(
            f"supernet_weights: {source} lies in output_dir ({output_dir}), whose content is moved aside when the run "
            "starts; give the run another output_dir"
        )
