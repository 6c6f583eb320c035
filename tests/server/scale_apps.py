"""A ClientApp that answers at once: valid deltas of any subnet, without data and without training."""

import os

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.records import facts_content, packed_buffer, packed_content
from fedofa.types.delta import SubnetDelta
from fedofa.types.device import DeviceProfile
from fedofa.update.exchange import decode_task, encode_delta

NUM_EXAMPLES = 10
LEAST_BYTES, MOST_BYTES = 72e6, 132e6
"""Of training memory: from hardly more than the smallest subnet takes, 69 MB, up towards the largest one's 151 MB."""

app = ClientApp()


def _client_id(context: Context) -> str:
    return f"client-{context.node_config['partition-id']}"


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """A client with ten examples; in an "unlike" fleet each device has a little more memory than the one before."""
    partition, num_partitions = context.node_config["partition-id"], context.node_config["num-partitions"]
    memory_bytes = 1e12
    if context.run_config["kind"] == "unlike":
        memory_bytes = LEAST_BYTES + (MOST_BYTES - LEAST_BYTES) * int(partition) / int(num_partitions)
    profile = DeviceProfile("board", memory_bytes, 1e12, 1e12, 1e12)
    facts = {"client_id": _client_id(context), "profile": profile.to_json(), "num_train": NUM_EXAMPLES, "num_test": 0}
    return Message(facts_content(facts), reply_to=message)


@app.train()
def answer(message: Message, context: Context) -> Message:
    """A thousandth of the received weights as the delta, so that no two pages are alike."""
    task, received = decode_task(packed_buffer(message))
    delta = SubnetDelta(
        client_id=_client_id(context),
        round=task.round,
        subnet=task.subnet,
        plan_digest=task.plan.digest(),
        base_version=task.version,
        num_examples=NUM_EXAMPLES,
        num_steps=1,
        weights={name: received[name] * np.float32(1e-3) for name in task.plan.trainable},
    )
    return Message(packed_content(encode_delta(delta), {"loss": 1.0, "pid": os.getpid()}), reply_to=message)
