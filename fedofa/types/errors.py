"""The errors that fedofa raises on bad input; each message says what, where, expected, found and what to do."""

from collections.abc import Iterable


class FedofaError(Exception):
    """Base of every error that fedofa raises on purpose."""


class SpaceError(FedofaError, ValueError):
    """A subnet configuration lies outside its search space, or belongs to another family."""


class ConfigError(FedofaError, ValueError):
    """A setting is unknown, of the wrong type or contradicts another."""


class DatasetError(FedofaError, ValueError):
    """A dataset is missing, damaged or cannot be partitioned as asked."""


class WireError(FedofaError, ValueError):
    """A packed buffer is truncated, damaged or not one of ours."""


class DeltaError(FedofaError, ValueError):
    """A client's delta failed verification; it never reaches the fold."""


class FoldError(FedofaError, ArithmeticError):
    """Sums would leave the fixed-point range, or two sums do not belong together."""


class DivergenceError(FedofaError, ArithmeticError):
    """A training's loss is no longer finite."""


class CheckpointError(FedofaError, ValueError):
    """A checkpoint is truncated, tampered with or belongs to another run."""


class MisfitError(CheckpointError):
    """A file's entries are not those of the network that is to take them.

    Attributes:
        problems: every entry that does not fit, in words; the message shows the first ones.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class InfeasibilityError(FedofaError, ValueError):
    """No subnet and plan fit a device's budgets, or no subnet has the MACs that were asked for.

    Attributes:
        nearest: the `SubnetConfig` that comes closest to the budgets, where it was sought.
    """

    def __init__(self, message: str, nearest: object = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class QuorumError(FedofaError, RuntimeError):
    """Too few clients gave usable answers, round after round."""


class RuntimeUnavailableError(FedofaError, RuntimeError):
    """What runs the clients cannot be started or reached, or ended in the middle of a run."""


class TrackingError(FedofaError, RuntimeError):
    """A tracker cannot be opened."""


class SweepError(FedofaError, RuntimeError):
    """Runs of a sweep failed; the others are done."""


class ProfileError(FedofaError, ValueError):
    """A device profile or a latency table is damaged, of another device or family, or too noisy to be used."""
