"""The Flower ClientApp: introduces its client, fine-tunes, scores and calibrates what it is sent on its own data."""

from __future__ import annotations

import hashlib
import time

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.device import answer_probe, device_checksum, read_device
from clients.local import local_client
from clients.records import facts_content, metrics_content, packed_buffer, packed_content
from clients.state import load_client_state, save_client_state
from clients.subnets import SubnetCache, build_teacher
from fedofa.data.federation import Examples
from fedofa.evaluation.calibration import CALIBRATION_BATCH, statistic_sums
from fedofa.evaluation.metrics import evaluate
from fedofa.finetune.inputs import prepare_inputs
from fedofa.finetune.trainer import LocalTraining, Objective, batch_bounds, fine_tune
from fedofa.shrinking.schedule import TeacherLoss
from fedofa.shrinking.teaching import taught_objective, teacher_logits
from fedofa.supernet.base import Supernet
from fedofa.types.delta import SubnetDelta
from fedofa.types.errors import ConfigError, DatasetError
from fedofa.types.space import SubnetConfig
from fedofa.types.statistics import SubnetStatistics
from fedofa.update.exchange import ClientTask, decode_task, encode_delta, encode_statistics

app = ClientApp()
_subnets = SubnetCache()


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
    generator = seed_task(task.seed, client.client_id, task.round)
    training = LocalTraining(**task.training)
    objective = _teacher_objective(client.data.train, task, training)
    model, supernet = _subnets.load(task, received)
    inputs, labels = _inputs(client.data.train, task, task.subnet, supernet)
    result = fine_tune(model, task.plan, received, inputs, labels, training, generator, objective)
    delta = SubnetDelta(
        client_id=client.client_id,
        round=task.round,
        subnet=task.subnet,
        plan_digest=task.plan.digest(),
        base_version=task.version,
        num_examples=len(labels),
        num_steps=result.num_steps,
        weights=result.weights,
        parametrised=task.plan.parametrised,
    )
    state = load_client_state(context.state, client.client_id)
    save_client_state(context.state, state.after_round(task.round, result.loss))
    metrics = {"loss": result.loss, "seconds": time.perf_counter() - began}
    return Message(packed_content(encode_delta(delta, float_dtype=task.float_dtype), metrics), reply_to=message)


@app.evaluate()
def score(message: Message, context: Context) -> Message:
    """Score the received subnet on the client's own test examples."""
    torch.set_num_threads(1)
    client = local_client(context)
    task, received = decode_task(packed_buffer(message))
    model, supernet = _subnets.load(task, received)
    if not len(client.data.test.labels):
        raise DatasetError(f"client {client.client_id!r} holds no test examples; raise partition.client_test_fraction")
    result = evaluate(model, *_inputs(client.data.test, task, task.subnet, supernet))
    metrics = {"accuracy": result.accuracy, "loss": result.loss, "num_examples": result.num_examples}
    return Message(metrics_content(metrics), reply_to=message)


@app.query("calibrate")
def calibrate(message: Message, context: Context) -> Message:
    """Sum up what the received subnet's batch norms see of the client's training examples; no image leaves it."""
    torch.set_num_threads(1)
    client = local_client(context)
    task, received = decode_task(packed_buffer(message))
    model, supernet = _subnets.load(task, received)
    inputs, labels = _inputs(client.data.train, task, task.subnet, supernet)
    bounds = batch_bounds(len(labels), CALIBRATION_BATCH)
    statistics = SubnetStatistics(
        client_id=client.client_id,
        round=task.round,
        subnet=task.subnet,
        base_version=task.version,
        num_examples=len(labels),
        sums=statistic_sums(model, (inputs[start:end] for start, end in bounds)),
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


def seed_task(seed: int, client_id: str, round_number: int) -> torch.Generator:
    """Make a client's task reproducible anywhere: one thread, and all draws from (seed, client id, round).

    Torch's default generator is seeded too, since dropout takes no generator.
    """
    torch.set_num_threads(1)
    material = hashlib.sha256(f"{seed}/{client_id}/{round_number}".encode()).digest()
    torch.default_generator.manual_seed(int.from_bytes(material[:8], "little") >> 1)
    return torch.Generator().manual_seed(int.from_bytes(material[8:16], "little") >> 1)


def _teacher_objective(examples: Examples, task: ClientTask, training: LocalTraining) -> Objective | None:
    """The loss of a task with a teacher, whose logits are computed once, before the subnet is built; else None."""
    if task.teaching is None:
        return None
    supernet = _subnets.structure(task)
    inputs, labels = _inputs(examples, task, task.teaching.subnet, supernet)
    logits = teacher_logits(build_teacher(supernet, task.teaching), inputs, training.batch_size)
    weights = (task.teaching.label_weight, task.teaching.teacher_weight)
    return taught_objective(logits, labels, TeacherLoss(**task.teaching.loss), *weights, training.label_smoothing)


def _inputs(
    examples: Examples, task: ClientTask, subnet: SubnetConfig, supernet: Supernet
) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples as a subnet takes them, and their labels."""
    statistics = task.normalisation
    resolution = supernet.resolution(subnet)
    inputs = prepare_inputs(examples.images, statistics["mean"], statistics["std"], resolution)
    return inputs, torch.from_numpy(examples.labels)
