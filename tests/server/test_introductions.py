"""A client's introduction: taken when it is proper, refused with a reason when not, never a crash."""

import json

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from clients.records import facts_content
from fedofa.types.errors import DeltaError
from server.carrier import assume_identity
from server.introductions import MAX_EXAMPLES, client_info

PROFILE = {
    "device_class": "phone",
    "memory_bytes": 1e6,
    "macs_per_second": 1e9,
    "uplink_bytes_per_second": 1e4,
    "downlink_bytes_per_second": 1e4,
    "availability": 0.5,
}
FACTS = {"client_id": "client-0001", "profile": PROFILE, "num_train": 12, "num_test": 0}


def answer(content) -> Message:
    assume_identity(1, 0)
    question = Message(RecordDict(), 7, MessageType.QUERY)
    return Message(content, reply_to=question)


def test_a_proper_introduction_is_taken():
    info = client_info(answer(facts_content(FACTS)))
    assert (info.client_id, info.node_id, info.num_train, info.num_test) == ("client-0001", 7, 12, 0)
    assert info.profile.device_class == "phone"


@pytest.mark.parametrize(
    "change",
    [
        {"num_train": 0},
        {"num_train": -99},
        {"num_train": MAX_EXAMPLES + 1},
        {"num_train": 1.5},
        {"num_train": True},
        {"num_test": -1},
        {"num_test": 10**30},
        {"client_id": "[/red]"},
        {"client_id": "\ud800"},
        {"client_id": "x" * 65},
        {"client_id": ""},
        {"client_id": 3},
        {"profile": {**PROFILE, "device_class": "largest"}},
        {"profile": {**PROFILE, "device_class": "[/x]"}},
        {"profile": {**PROFILE, "memory_bytes": float("inf")}},
        {"profile": {**PROFILE, "wings": 2}},
        {"profile": "phone"},
        {"profile": None},
    ],
    ids=str,
)
def test_an_improper_introduction_is_refused_with_a_reason(change):
    with pytest.raises(DeltaError) as caught:
        client_info(answer(facts_content({**FACTS, **change})))
    assert str(caught.value)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "[1]", "null", json.dumps({"client_id": "x"})], ids=range(6))
def test_what_is_no_introduction_is_refused(text):
    content = RecordDict({"facts": ConfigRecord({"json": text})})
    with pytest.raises(DeltaError, match="not understood"):
        client_info(answer(content))


def test_a_failed_introduction_says_why():
    with pytest.raises(DeltaError, match="no battery"):
        client_info(answer(Error(2, "no battery")))
