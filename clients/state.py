"""A client's state in the form in which Flower keeps it: a record of the node's context."""

from __future__ import annotations

from dataclasses import asdict

from flwr.app import ConfigRecord, RecordDict

from fedofa.types.client import ClientState
from fedofa.types.errors import CheckpointError

_RECORD = "fedofa.client_state"


def load_client_state(records: RecordDict, client_id: str) -> ClientState:
    """The client's state, a fresh one where it has none.

    Raises:
        CheckpointError: when the record is another client's or not one of ours.
    """
    record = records.get(_RECORD)
    if record is None:
        return ClientState(client_id)
    try:
        state = ClientState(**dict(record))  # type: ignore[arg-type]
    except TypeError as error:
        raise CheckpointError(f"the state kept for client {client_id!r} is not understood: {error}") from error
    if state.client_id != client_id:
        raise CheckpointError(f"client {client_id!r} holds the state of {state.client_id!r}; it is not used")
    return state


def save_client_state(records: RecordDict, state: ClientState) -> None:
    """Put the state into the context; the runtime decides when it is committed."""
    records[_RECORD] = ConfigRecord(asdict(state))
