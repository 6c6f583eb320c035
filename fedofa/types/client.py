"""What a client keeps between rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ClientState:
    """A client's own memory, never part of a delta. A simulation keeps it only when the round was folded.

    Args:
        client_id: whose it is; a state that turns up at another client is refused.
        version: the last round that was folded.
        num_rounds: rounds that were folded.
        last_loss: mean training loss of the last one, in nats.
    """

    client_id: str
    version: int = 0
    num_rounds: int = 0
    last_loss: float = 0.0

    def after_round(self, round_number: int, loss: float) -> ClientState:
        """The state after one more round of training."""
        return replace(self, version=round_number, num_rounds=self.num_rounds + 1, last_loss=loss)
