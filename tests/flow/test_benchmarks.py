"""The benchmark of shrinking on real images: its parts start where the part before ended."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACK = Path(os.environ.get("FEDOFA_SHARED_DATA", ROOT.parent / "shared" / "data")) / "cifar10_jpegpack.npz"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("cifar_supernet", ROOT / "benchmarks/cifar_supernet.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
@pytest.mark.skipif(not PACK.exists(), reason=f"no CIFAR-10 pack at {PACK}; set FEDOFA_SHARED_DATA to its directory")
def test_parts_of_the_cifar_benchmark_build_on_each_other(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDOFA_CACHE", str(tmp_path / "cache"))
    settings = {
        "teacher_share": 0.0,
        "optimiser": "adamw",
        "precision": "float32",
        "seed": 0,
        "threads": 1,
        "data_path": PACK,
    }
    job = benchmark.Job(tmp_path, steps=100, head_steps=1, **settings)
    job.claim()
    job.train("head")
    alone = {part: job.steps_alone(part) for part in benchmark.ALONE}
    assert 50 < alone["alone_largest"] < 100 < alone["alone_half"] < alone["alone_smallest"] < 300
    assert not job.is_trained("supernet")
    with pytest.raises(SystemExit, match=r"\(then, now\): {'supernet shrinking.steps': \('100', '200'\)}; give"):
        benchmark.Job(tmp_path, steps=200, head_steps=1, **settings).claim()
