"""What `import fedofa` and a client's process must not import, each in a process of its own."""

import json
import subprocess
import sys

import pytest

HEAVY = [
    "torch", "torch._dynamo", "torch._inductor", "sympy", "matplotlib", "pandas", "ray", "datasets", "flwr_datasets",
    "huggingface_hub", "pyarrow", "onnx", "scipy", "sklearn", "pymoo", "mlxtend", "PIL", "optuna", "mlflow", "wandb",
    "tensorboard", "torchmetrics", "server", "fedofa.supernet.base", "fedofa.aggregation", "fedofa.search",
]  # fmt: skip
COMPILER = ["torch._dynamo", "torch._inductor"]


def imported(code: str, names: list[str]) -> list[str]:
    """Those of the modules that are there after the code has run."""
    code = f"import json, sys\n{code}\nprint(json.dumps([name for name in {names} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_itself_imports_nothing_heavy():
    assert imported("import fedofa, fedofa.types.plan, fedofa.update.exchange", [*HEAVY, "onnxruntime", "flwr"]) == []


def test_the_path_of_a_client_up_to_its_engine_imports_nothing_heavy():
    assert imported("import clients.client_app", [*HEAVY, "onnxruntime"]) == []


def test_the_engine_without_torch_imports_nothing_heavy():
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    code = "import clients.client_app; from clients.engines import load_engine; load_engine('onnxruntime')"
    assert imported(code, HEAVY) == []


def test_the_engine_with_torch_imports_not_what_only_the_server_needs_nor_torchs_compiler():
    allowed = {"torch", "fedofa.supernet.base"}
    code = "import clients.client_app; from clients.engines import load_engine; load_engine('torch')"
    heavy = [name for name in (*HEAVY, *COMPILER) if name not in allowed]
    assert imported(code, heavy) == []


TRAIN = """
import numpy as np
from clients.engines import load_engine
from fedofa.data.federation import Examples
from fedofa.update.exchange import decode_task
task, received = decode_task(open({path!r}, "rb").read())
images = np.random.default_rng(0).integers(0, 256, (5, 1, 28, 28)).astype(np.uint8)
examples = Examples(images, np.arange(5))
result = load_engine("onnxruntime").train(examples, task, received, "client")
assert result.num_steps == 1 and np.isfinite(result.loss)
assert all(np.abs(values).max() > 0 for values in result.weights.values())
"""


def test_training_without_torch_imports_nothing_heavy_either(tmp_path):
    from dataclasses import asdict

    import torch

    from conf.compose import compose_conf
    from fedofa.finetune.plans import build_plan
    from fedofa.finetune.recipe import LocalTraining
    from fedofa.supernet.families import build_supernet
    from fedofa.update.exchange import ClientTask, encode_task
    from server.compiled import compiled

    settings = {**compose_conf().supernet, "num_classes": 10, "in_channels": 1}
    supernet = build_supernet(settings, torch.Generator().manual_seed(0))
    subnet = supernet.space.smallest()
    plan = build_plan("head", supernet.block_costs(subnet))
    tensors = {name: item.detach().numpy() for name, item in supernet.build(subnet).state_dict().items()}
    graph, feed = compiled(supernet, subnet, plan, tensors)
    training = asdict(LocalTraining())
    task = ClientTask(
        1, 0, subnet, plan, supernet.description(), training, {"mean": [0.5], "std": [0.5]}, 0, graph=graph
    )
    (tmp_path / "task").write_bytes(encode_task(task, feed))
    assert imported(TRAIN.format(path=str(tmp_path / "task")), HEAVY) == []
