"""A ClientApp whose clients misbehave by number, each in its own way; the others are the real thing."""

import dataclasses
import os
import signal
import time

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import client_app as real
from clients.local import client_id
from clients.records import packed_buffer, packed_content
from fedofa.update.exchange import decode_delta, encode_delta

app = ClientApp()
app.query()(real.query)
app.evaluate()(real.score)


def _changed(reply: Message, message: Message, **changes) -> Message:
    delta = decode_delta(packed_buffer(reply))
    weights = changes.pop("weights", lambda same: same)({name: value.copy() for name, value in delta.weights.items()})
    changed = dataclasses.replace(delta, weights=weights, **changes)
    return Message(packed_content(encode_delta(changed), {"loss": 1.0}), reply_to=message)


def _poisoned(value: float):
    def change(weights):
        next(iter(weights.values())).flat[0] = value
        return weights

    return change


def _reshaped(weights):
    name = next(iter(weights))
    return {**weights, name: weights[name].reshape(-1)}


def _renamed(weights):
    name = next(iter(weights))
    return {"surprise": weights.pop(name), **weights}


def _flipped(reply: Message, message: Message) -> Message:
    buffer = bytearray(packed_buffer(reply))
    buffer[-5] ^= 4
    return Message(packed_content(bytes(buffer)), reply_to=message)


def _raise(reply: Message, message: Message) -> Message:
    raise RuntimeError("out of battery")


def _die(reply: Message, message: Message) -> Message:
    os.kill(os.getpid(), signal.SIGKILL)
    return reply


def _hang(reply: Message, message: Message) -> Message:
    time.sleep(3600)
    return reply


MISDEEDS = {
    0: _raise,
    1: _die,
    2: lambda reply, message: _changed(reply, message, weights=_poisoned(np.nan)),
    3: lambda reply, message: _changed(reply, message, weights=_poisoned(np.inf)),
    4: lambda reply, message: _changed(reply, message, weights=_reshaped),
    5: lambda reply, message: _changed(reply, message, weights=_renamed),
    6: lambda reply, message: _changed(reply, message, client_id=client_id(11)),
    7: lambda reply, message: _changed(reply, message, round=7),
    8: lambda reply, message: _changed(reply, message, base_version=3),
    9: lambda reply, message: _changed(reply, message, num_examples=10**6),
    10: _flipped,
    11: lambda reply, message: Message(RecordDict({"x": ConfigRecord({"hello": "you"})}), reply_to=message),
    12: lambda reply, message: _changed(reply, message, plan_digest="0" * 16),
    13: lambda reply, message: _changed(reply, message, weights=lambda same: {}),
    14: lambda reply, message: _changed(reply, message, weights=_poisoned(1e30)),
    15: _hang,
}


@app.train()
def train(message: Message, context: Context) -> Message:
    reply = real.train(message, context)
    misdeed = MISDEEDS.get(int(context.node_config["partition-id"]))
    return misdeed(reply, message) if misdeed else reply
