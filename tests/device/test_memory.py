"""Memory of a forward pass against the tensors that torch is seen to hold, and a working set by hand."""

import weakref

import numpy as np
import pytest
import torch
from cohorts import CHAIN_SPEC, LITE_SPEC, SPECS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedofa.device.memory import InferenceMemory, WorkingSet
from fedofa.device.operators import OperatorIndex
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, StageSpec

FAMILIES = {**SPECS, "chain": CHAIN_SPEC, "lite": LITE_SPEC}


class LiveTensors(TorchDispatchMode):
    """The most bytes alive at once, views and repeats not counted again; `given` are alive from the start."""

    def __init__(self, given):
        super().__init__()
        self._alive = {}
        self.now_bytes = self.peak_bytes = 0
        for tensor in given:
            self._add(tensor)

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive and size:
            self._alive[key] = size
            self.now_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.now_bytes -= self._alive.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_inference_memory_is_what_torch_is_seen_to_hold(family, norm):
    spec = FAMILIES[family]
    supernet = build_elastic(
        type(spec).from_json({**spec.to_json(), "norm": norm, "dropout": 0.0}), torch.Generator().manual_seed(0)
    )
    index = OperatorIndex.of(supernet)
    rng = np.random.default_rng(0)
    space = supernet.space
    for subnet in (space.largest(), space.smallest(), *(space.sample(rng) for _ in range(6))):
        module, side = supernet.build(subnet).eval(), supernet.resolution(subnet)
        with torch.no_grad(), LiveTensors([*module.parameters(), *module.buffers()]) as live:
            module(torch.zeros(1, 1, side, side))
        memory, batch = InferenceMemory(index), index.batch([subnet])
        (predicted,) = memory.tensor_bytes(batch)
        assert live.peak_bytes <= predicted <= 1.1 * live.peak_bytes
        assert memory.predict_one(subnet).unit == "MB"
        assert memory.predict(batch)[0] * 1e6 >= predicted


def test_the_working_set_by_hand():
    spec = MobileNetV3Spec(
        in_channels=1,
        stem_width=8,
        first_width=8,
        stages=(StageSpec(8, 1, "relu", False),),
        final_width=8,
        feature_width=8,
        kernels=(3,),
        expands=(2,),
        depths=(1,),
        resolutions=(16,),
    )
    index = OperatorIndex.of(build_elastic(spec))
    (subnet,) = [index.encoding.space.largest()]
    # the depthwise convolution of the residual block: 16 channels in and out, and the block's input of 8 kept, 8 x 8
    assert WorkingSet(index, activation_bits=8).predict_one(subnet).value == (16 + 16 + 8) * 64 / 1024
    assert WorkingSet(index, activation_bits=16).predict_one(subnet).value == 2 * (16 + 16 + 8) * 64 / 1024
