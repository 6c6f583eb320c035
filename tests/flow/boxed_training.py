"""A client's local round from a packed task to a packed delta: `boxed_training.py ENGINE TASK DELTA`."""

import sys
from pathlib import Path

import numpy as np

import clients.client_app  # noqa: F401  # all of a client's process, Flower included
from clients.engines import load_engine
from fedofa.data.federation import Examples
from fedofa.types.delta import SubnetDelta
from fedofa.update.exchange import decode_task, encode_delta


def main(engine: str, task_path: str, delta_path: str) -> None:
    task, received = decode_task(Path(task_path).read_bytes())
    images = np.random.default_rng(0).integers(0, 256, (16, 3, 224, 224)).astype(np.uint8)
    examples = Examples(images, np.arange(16))
    result = load_engine(engine).train(examples, task, received, "client")
    delta = SubnetDelta(
        "client", task.round, task.subnet, task.plan.digest(), task.version, 16, result.num_steps, result.weights
    )
    Path(delta_path).write_bytes(encode_delta(delta))


if __name__ == "__main__":
    main(*sys.argv[1:])
