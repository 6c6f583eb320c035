"""`fedofa search`: the best subnet for a measured device within any set of limits, or the Pareto set."""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf.schema import SearchConf
from fedofa.data.cache import load_cached
from fedofa.device.cost import LocalWork
from fedofa.device.energy import Battery, Chip, Energy
from fedofa.device.latency import Latency
from fedofa.device.memory import InferenceMemory, WorkingSet
from fedofa.device.models import BytesDown, Macs, Parameters, SubnetCostModel
from fedofa.device.ofa_tables import load_ofa_table
from fedofa.device.operators import OperatorIndex
from fedofa.device.profile import MeasuredDevice, check_machine, read_json
from fedofa.device.tables import FORMAT as TABLE_FORMAT
from fedofa.device.tables import LatencyTable
from fedofa.device.training import BytesUp, PlannedPlaces
from fedofa.finetune.kept_traces import code_digest, read_traces, write_traces
from fedofa.finetune.planned_memory import PlannedTrainingMemory
from fedofa.finetune.plans import build_plan
from fedofa.search.accuracy import AccuracyPredictor, ZeroCostProxy, load_predictor
from fedofa.search.limits import Limit, Limits
from fedofa.search.specialise import DeviceSearch, Found, describe
from fedofa.supernet.families import build_supernet
from fedofa.types.errors import ConfigError, ProfileError
from server.checkpoint import replace_file
from server.progress import say
from server.structure import describe_structure

SETTINGS = (
    "latency_ms",
    "inference_memory_mb",
    "training_memory_mb",
    "sram_kb",
    "energy_mj",
    "bytes_up",
    "bytes_down",
    "macs",
    "parameters",
)
"""Costs that can be limited."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found: subnets, best first; the best in words; how long it took after everything was loaded."""

    found: list[Found]
    description: str
    seconds: float
    cpu_seconds: float


def run_search(conf: SearchConf) -> SearchResult:
    """Search as the settings say, and write `conf.output` where it is given.

    Raises:
        FedofaError: saying in one line what is wrong; an `InfeasibilityError` where no subnet meets the limits.
    """
    structure = describe_structure(conf.supernet, conf.in_channels, conf.num_classes)
    index = OperatorIndex.of(build_supernet(structure))
    models = build_models(conf, index)
    limits = build_limits(conf, models)
    predictor: AccuracyPredictor = ZeroCostProxy(index)
    if conf.predictor:
        predictor = load_predictor(Path(conf.predictor), index.encoding.space)
    search = DeviceSearch(index, predictor, list(models.values()), conf.population, conf.generations)
    for model in models.values():
        if isinstance(model, PlannedTrainingMemory):
            _take_known(model, conf)
        model.warm_up()
    _load_pymoo()
    start, cpu_start = time.perf_counter(), time.process_time()
    found = search.pareto(limits, conf.seed) if conf.pareto else [search.best(limits, conf.seed)]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    best = found[0].subnet
    result = SearchResult(found, f"{describe(index.encoding.space, best)} ({best.digest()})", seconds, cpu_seconds)
    if conf.output:
        Path(conf.output).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(conf.output), json.dumps(list(_rows(result)), indent=1).encode())
    return result


def _take_known(model: PlannedTrainingMemory, conf: SearchConf) -> None:
    """Give the model what an earlier search with the same settings found of operators; find and keep it otherwise."""
    settings = (code_digest(), conf.supernet, conf.in_channels, conf.num_classes, model.work, model.plans.part_plans)
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:32]

    def find(path: Path) -> None:
        model.warm_up()
        write_traces(path, model.traces)

    try:
        model.traces |= load_cached(Path(conf.cache_dir, f"operators-{digest}.json"), read_traces, find)
    except OSError as error:
        say(f"cache_dir: what was found of operators cannot be kept in {conf.cache_dir}: {error}")


def _load_pymoo() -> None:
    try:
        importlib.import_module("pymoo.algorithms.moo.nsga2")
    except ImportError as error:
        raise ConfigError("search: the package 'pymoo' is not installed; pip install 'fedofa[search]'") from error


def build_models(conf: SearchConf, index: OperatorIndex) -> dict[str, SubnetCostModel]:
    """Every cost model by the setting that limits it, latency first; that of training memory only under its limit.

    Pricing even a few subnets by the latter takes seconds.

    Raises:
        FedofaError: naming the setting that is out of range, or the file that is damaged or of another space.
    """
    bounds = {"num_examples": 1, "batch_size": 1, "wire_bytes": 1, "optimiser_slots": 0, "micro_batch": 0}
    for name, least in bounds.items():
        if getattr(conf, name) < least:
            raise ConfigError(f"{name}: expected at least {least}, found {getattr(conf, name)}")
    levers = {name: getattr(conf, name) for name in ("recompute", "statistics", "lean", "micro_batch")}
    plans = PlannedPlaces(index, partial(build_plan, conf.plan, **levers))
    work = LocalWork(conf.num_examples, conf.num_examples, conf.batch_size, conf.optimiser_slots, conf.wire_bytes)
    chip = Chip(**asdict(conf.chip))
    models: tuple[SubnetCostModel, ...] = (
        Latency(index, _load_table(conf, index)),
        InferenceMemory(index),
        *([] if conf.training_memory_mb is None else [PlannedTrainingMemory(plans, work)]),
        WorkingSet(index, chip.activation_bits),
        Energy(index, chip),
        BytesUp(plans, conf.wire_bytes),
        BytesDown(index, conf.wire_bytes),
        Macs(index),
        Parameters(index),
    )
    return {model.setting: model for model in models}


def build_limits(conf: SearchConf, models: dict[str, SubnetCostModel]) -> Limits:
    """The limits that are set; a battery tightens the one on energy.

    Raises:
        ConfigError: for a limit that is not positive, or a battery without a limit on energy.
    """
    stated = {name: getattr(conf, name) for name in SETTINGS if getattr(conf, name) is not None}
    limits = [Limit(models[name], most) for name, most in stated.items()]
    if conf.state_of_charge is not None:
        if conf.energy_mj is None:
            raise ConfigError("state_of_charge tightens energy_mj, which is not given; give energy_mj=...")
        battery = Battery(conf.state_of_charge, conf.battery_reserve)
        tightened = battery.tightened(conf.energy_mj)
        limits = [Limit(item.model, tightened) if item.model.setting == "energy_mj" else item for item in limits]
    return Limits(tuple(limits))


def _load_table(conf: SearchConf, index: OperatorIndex) -> LatencyTable:
    """The latency table of `conf.device`: a profile, a table of its own, or published ones."""
    path = Path(conf.device)
    if path.is_dir() or path.suffix in (".yaml", ".yml"):
        paths = sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
        if not paths:
            raise ProfileError(
                f"device: {path}: a folder is taken for one of Once-for-All's published tables: expected YAML files in "
                "it, found none; give a profile or a table by its file"
            )
        return load_ofa_table(paths, index, path.stem)
    content = read_json(path)
    if isinstance(content, dict) and content.get("format") == TABLE_FORMAT:
        return LatencyTable.from_json(content, str(path))
    device = MeasuredDevice.from_json(content, str(path))
    if not conf.any_machine:
        check_machine(device.machine, str(path))
    return device.latency


def _rows(result: SearchResult) -> Iterator[dict[str, object]]:
    for item in result.found:
        costs = {setting: quantity.value for setting, quantity in item.costs.items()}
        yield {"subnet": item.subnet.to_json(), "accuracy": item.accuracy, "costs": costs}


def print_found(conf: SearchConf, result: SearchResult, console: Console) -> None:
    """Print a table, a subnet a line, and the best one's choices."""
    shown = [name for name in SETTINGS if getattr(conf, name) is not None] or ["latency_ms", "macs", "parameters"]
    label = "accuracy" if conf.predictor else "proxy"
    table = Table(label, *shown)
    for item in result.found:
        table.add_row(f"{item.accuracy:.4g}", *(str(item.costs[name]) for name in shown))
    console.print(table)
    console.print(f"best: {result.description}", highlight=False, soft_wrap=True)
    took = f"{result.seconds:.2f} s ({result.cpu_seconds:.2f} s of CPU) after loading"
    console.print(f"searched in {took}; {len(result.found)} found", highlight=False)
