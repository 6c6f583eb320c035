"""The Flower ClientApp: introduces its client, fine-tunes, scores and calibrates what it is sent on its own data.

It imports no torch; the engine that the client's device has does the work (see `engines`).
"""

from __future__ import annotations

import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.device import answer_probe, device_checksum, read_device
from clients.engines import load_engine
from clients.local import local_client
from clients.records import facts_content, metrics_content, packed_buffer, packed_content
from clients.state import load_client_state, save_client_state
from fedofa.types.delta import SubnetDelta
from fedofa.types.errors import ConfigError, DatasetError
from fedofa.types.statistics import SubnetStatistics
from fedofa.update.exchange import decode_task, encode_delta, encode_statistics

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """State the client's id, device and data size, and which file says more of the device."""
    client = local_client(context)
    facts = {
        "client_id": client.client_id,
        "profile": client.profile.to_json(),
        "num_train": len(client.data.train.labels),
        "num_test": len(client.data.test.labels),
        "device": device_checksum(read_device(client.device)) if client.device else "",
    }
    return Message(facts_content(facts), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fine-tune the received subnet under its plan and send back what changed."""
    began = time.perf_counter()
    client = local_client(context)
    task, received = decode_task(packed_buffer(message))
    result = load_engine(client.profile.engine).train(client.data.train, task, received, client.client_id)
    delta = SubnetDelta(
        client_id=client.client_id,
        round=task.round,
        subnet=task.subnet,
        plan_digest=task.plan.digest(),
        base_version=task.version,
        num_examples=len(client.data.train.labels),
        num_steps=result.num_steps,
        weights=result.weights,
        parametrised=task.plan.parametrised,
        low_rank=result.low_rank,
    )
    state = load_client_state(context.state, client.client_id)
    save_client_state(context.state, state.after_round(task.round, result.loss))
    metrics = {"loss": result.loss, "seconds": time.perf_counter() - began}
    return Message(packed_content(encode_delta(delta, float_dtype=task.float_dtype), metrics), reply_to=message)


@app.evaluate()
def score(message: Message, context: Context) -> Message:
    """Score the received subnet on the client's own test examples."""
    client = local_client(context)
    task, received = decode_task(packed_buffer(message))
    if not len(client.data.test.labels):
        raise DatasetError(f"client {client.client_id!r} holds no test examples; raise partition.client_test_fraction")
    result = load_engine(client.profile.engine).score(client.data.test, task, received)
    metrics = {"accuracy": result.accuracy, "loss": result.loss, "num_examples": result.num_examples}
    return Message(metrics_content(metrics), reply_to=message)


@app.query("calibrate")
def calibrate(message: Message, context: Context) -> Message:
    """Sum up what the received subnet's batch norms see of the client's training examples; no image leaves it."""
    client = local_client(context)
    task, received = decode_task(packed_buffer(message))
    statistics = SubnetStatistics(
        client_id=client.client_id,
        round=task.round,
        subnet=task.subnet,
        base_version=task.version,
        num_examples=len(client.data.train.labels),
        sums=load_engine(client.profile.engine).statistics(client.data.train, task, received),
    )
    return Message(packed_content(encode_statistics(statistics)), reply_to=message)


@app.query("device")
def device(message: Message, context: Context) -> Message:
    """Send what was measured on the client's device."""
    client = local_client(context)
    if client.device is None:
        raise ConfigError(f"client {client.client_id!r} has no device profile; give its node one, or its class")
    return Message(packed_content(read_device(client.device)), reply_to=message)


@app.query("link")
def link(message: Message, context: Context) -> Message:
    """Send as many bytes as are asked for, so that the server can measure the link."""
    return Message(packed_content(answer_probe(packed_buffer(message))), reply_to=message)
