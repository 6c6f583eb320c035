"""Local fine-tuning and scoring without torch: a compiled step, run by ONNX Runtime for one example at a time.

A step (see `onnx_network`) takes "image" `(1, channels, side, side)`, "target" `(1, num_classes)`, a distribution over
the classes, "uniform" `(1, features)`, draws from [0, 1) that say what dropout takes out, where the network has
dropout, and every tensor by its name. It gives "loss" and "gradient:<name>" of each parameter that trains, of its
leading part where only that trains, or, where none does, "logits" `(1, num_classes)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast, final

import numpy as np
import onnxruntime

from fedofa.finetune.draws import TorchDraws
from fedofa.finetune.numpy_optimisers import build_numpy_optimiser, clip_gradients
from fedofa.finetune.recipe import FineTuneResult, LocalTraining, batch_bounds
from fedofa.types.errors import DatasetError, WireError
from fedofa.types.score import Score

_PER_EXAMPLE = ("image", "target", "uniform")
_GRADIENT = "gradient:"

Prepare = Callable[[np.ndarray, int], np.ndarray]
"""From stored images `(1, channels, height, width)` and a side in pixels to what the subnet takes."""


@dataclass(frozen=True, slots=True)
class StoredExamples:
    """Labelled images as they are stored, which are prepared one at a time.

    Args:
        images: `(num_examples, channels, height, width)`.
        labels: `(num_examples,)`, int64.
        prepare: makes a subnet's input of an image.
    """

    images: np.ndarray
    labels: np.ndarray
    prepare: Prepare

    def image(self, index: int, side: int) -> np.ndarray:
        """One image, `(1, channels, side, side)`."""
        return self.prepare(self.images[index : index + 1], side)


@final
class CompiledSession:
    """A compiled step that is ready to run, one thread, nothing kept between runs.

    Args:
        graph: the serialised model.
        tensors: what it takes beside the example; they stay where they lie, and may be changed in place.

    Raises:
        WireError: when the graph cannot be loaded, or the tensors are not those that it takes.
    """

    def __init__(self, graph: bytes, tensors: Mapping[str, np.ndarray]) -> None:
        try:
            self._session = onnxruntime.InferenceSession(graph, _options(), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base of their own
            raise WireError(
                f"the task's graph cannot be loaded: {error}; do server and client run the same release?"
            ) from error
        shapes = {item.name: tuple(item.shape) for item in self._session.get_inputs()}
        self._taken = {name: shapes.pop(name) for name in _PER_EXAMPLE if name in shapes}
        found = {name: values.shape for name, values in tensors.items()}
        if shapes != found:
            wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            raise WireError(f"the task's tensors are not its graph's: {len(wrong)} differ, among them {wrong[:3]}")
        self._tensors = dict(tensors)
        self._outputs = {item.name: tuple(item.shape) for item in self._session.get_outputs()}

    @property
    def side(self) -> int:
        """Of the square image in pixels."""
        return self._taken["image"][2]

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """The parameters whose gradients a run gives, in order, each with the shape of its leading part that trains."""
        gradients = {name: shape for name, shape in self._outputs.items() if name.startswith(_GRADIENT)}
        return {name.removeprefix(_GRADIENT): shape for name, shape in gradients.items()}

    @property
    def num_classes(self) -> int:
        """Of the labels."""
        return self._taken["target"][1]

    def dropout_shape(self) -> tuple[int, ...] | None:
        """Shape of the draws for dropout; None where the network has none."""
        return self._taken.get("uniform")

    def replace(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Put others in the place of tensors of the same names and shapes."""
        self._tensors |= tensors

    def run(self, example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the step gives for one example; gradients by their parameters' names."""
        results = cast("list[np.ndarray]", self._session.run(list(self._outputs), {**self._tensors, **example}))
        return {name.removeprefix(_GRADIENT): found for name, found in zip(self._outputs, results, strict=True)}


def _options() -> onnxruntime.SessionOptions:
    """One thread; memory is freed as soon as a result has been used, without a plan made ahead, which takes more, and
    without an arena, which grows by doubling.

    Nodes run in the graph's order: masks are computed before the activations that they stand for are let go.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = options.enable_cpu_mem_arena = False
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = 3
    return options


def fine_tune_compiled(
    session: CompiledSession,
    received: Mapping[str, np.ndarray],
    examples: StoredExamples,
    training: LocalTraining,
    seeds: tuple[int, int],
) -> FineTuneResult:
    """Train as `trainer.fine_tune` does with frozen statistics: the same batches, gradients added up over examples.

    Args:
        session: of the plan's training step.
        received: the task's tensors by name; the delta is taken against them.
        examples: the client's own.
        training: the recipe.
        seeds: of dropout and of the batches' order and shifts (`draws.task_seeds`).
    """
    if not len(examples.labels):
        raise DatasetError("fine-tuning needs at least 1 training example, found none; the client cannot take part")
    parts = {name: tuple(map(slice, shape)) for name, shape in session.trained.items()}
    whole = {name: np.array(received[name]) for name in parts}
    session.replace(whole)
    parameters = {name: whole[name][part] for name, part in parts.items()}  # views: the session sees their changes
    optimiser, draws, dropout = build_numpy_optimiser(training), TorchDraws(seeds[1]), np.random.default_rng(seeds[0])
    losses = []
    for batch in _batches(len(examples.labels), training, draws):
        shifts = _shifts(len(batch), training.max_shift, draws)
        loss, gradients = _mean_gradients(session, examples, batch, shifts, training, dropout)
        losses.append(loss)
        if training.proximal_mu:
            for name, parameter in parameters.items():
                gradients[name] += training.proximal_mu * (parameter - received[name][parts[name]])
        if training.max_gradient_norm:
            clip_gradients(gradients, training.max_gradient_norm)
        optimiser.step(parameters, gradients)
    weights = {name: parameter - received[name][parts[name]] for name, parameter in parameters.items()}
    return FineTuneResult(weights, len(losses), float(np.mean(losses)))


def score_compiled(session: CompiledSession, examples: StoredExamples) -> Score:
    """Score a subnet by its forward pass.

    Args:
        session: of a step without anything that trains.
    """
    count = len(examples.labels)
    if not count:
        raise DatasetError("an evaluation needs at least 1 example, found none")
    correct, loss = 0, 0.0
    for index, label in enumerate(examples.labels):
        logits = session.run({"image": examples.image(index, session.side)})["logits"][0].astype(np.float64)
        correct += int(logits.argmax() == label)
        loss += float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
    return Score(correct / count, loss / count, count)


def _mean_gradients(
    session: CompiledSession,
    examples: StoredExamples,
    batch: np.ndarray,
    shifts: np.ndarray | None,
    training: LocalTraining,
    dropout: np.random.Generator,
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of a batch: the mean over its examples, which are run one after the other."""
    total, sums = 0.0, {}
    for place, index in enumerate(batch):
        image = examples.image(index, session.side)
        if shifts is not None:
            image = _shifted(image, shifts[:, place])
        example = {"image": image, "target": _target(session.num_classes, int(examples.labels[index]), training)}
        if (shape := session.dropout_shape()) is not None:
            example["uniform"] = dropout.random(shape, np.float32)
        results = session.run(example)
        total += float(results.pop("loss"))
        for name, gradient in results.items():
            if name in sums:
                sums[name] += gradient
            else:
                sums[name] = gradient
    means = {name: gradient / np.float32(len(batch)) for name, gradient in sums.items()}
    return total / len(batch), means


def _target(num_classes: int, label: int, training: LocalTraining) -> np.ndarray:
    """The label as a distribution, a share of which is spread over all classes."""
    target = np.full((1, num_classes), training.label_smoothing / num_classes, np.float32)
    target[0, label] += np.float32(1 - training.label_smoothing)
    return target


def _shifts(count: int, max_shift: int, draws: TorchDraws) -> np.ndarray | None:
    """Offsets in pixels down and to the right of every image of a batch, `(2, count)`; None without shifts."""
    return draws.integers(-max_shift, max_shift + 1, (2, count)) if max_shift else None


def _shifted(image: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """An image moved by whole pixels; its edge pixels fill the gap."""
    rows, columns = (
        np.clip(np.arange(side) + offset, 0, side - 1) for side, offset in zip(image.shape[2:], offsets, strict=True)
    )
    return np.ascontiguousarray(image[:, :, rows][..., columns])


def _batches(num_examples: int, training: LocalTraining, draws: TorchDraws) -> Iterator[np.ndarray]:
    """Indices, a fresh order every epoch, until the epochs or steps are done."""
    left = training.num_steps(num_examples)
    while left:
        order = draws.permutation(num_examples)
        for start, end in batch_bounds(num_examples, training.batch_size):
            if left:
                left -= 1
                yield order[start:end]
