"""The settings of a run as dataclasses: every key, its type and its meaning. The defaults are in the YAML groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class DataConf:
    """Where the images come from; all that most sources need."""

    name: str = MISSING  # a name in fedofa.data.readers.catalogue.SOURCES
    path: str | None = None  # of the files, for sources that have some
    cache_dir: str = MISSING  # decoded images and partitions are kept here
    test_examples: int | None = MISSING  # size of the stratified global test set; null: the whole official test part
    calibration_examples: int = MISSING  # held by the server, for batch-norm statistics (see evaluation.calibration)


@dataclass
class HarConf(DataConf):
    """Windows of motion (see fedofa.data.readers.har)."""

    window_samples: int = MISSING  # 100 last a second
    window_overlap: float = MISSING  # share of a window that the next one repeats, in [0, 1)
    max_gap_ms: int = MISSING  # samples further apart lie in different windows
    held_out: list[int] = MISSING  # subjects that are never trained on; they make the official test part


@dataclass
class FolderConf(DataConf):
    """Images in class folders (see fedofa.data.readers.folder)."""

    image_size: int | None = MISSING  # side that images are cut and resized to; null where all have one size


@dataclass
class HfConf(FolderConf):
    """A Hugging Face dataset, from data.path or data.hub_name (see fedofa.data.readers.hf)."""

    hub_name: str | None = MISSING
    hub_config: str | None = MISSING
    revision: str | None = MISSING  # branch, tag or commit on the hub; null: the main branch
    train_split: str = MISSING
    test_split: str | None = MISSING
    image_column: str = MISSING
    label_column: str = MISSING
    client_column: str | None = MISSING  # ids for partition=natural


SOURCES: dict[str, type[DataConf]] = {"folder": FolderConf, "har": HarConf, "hf": HfConf}
"""The settings of sources that need more than a path."""


@dataclass
class PartitionConf:
    """How the training examples are split among clients."""

    kind: str = MISSING  # "iid" | "dirichlet" | "pathological" | "natural"
    alpha: float = MISSING  # concentration of the Dirichlet distribution; smaller is more skewed
    classes_per_client: int = MISSING  # of the pathological partition
    min_examples: int = MISSING  # that every client gets at the least
    client_test_fraction: float = MISSING  # of a client's examples, kept for its own test


@dataclass
class DeviceClassConf:
    """A kind of device: its share of the fleet and its budgets (see fedofa.types.device)."""

    share: float = MISSING
    memory_bytes: float = MISSING
    macs_per_second: float = MISSING
    uplink_bytes_per_second: float = MISSING
    downlink_bytes_per_second: float = MISSING
    availability: float = 1.0
    engine: str = "torch"  # what trains on it: "torch" | "onnxruntime"
    device: str | None = None  # a file of fedofa profile, or a latency table, that stands for what was measured there


@dataclass
class FleetConf:
    """Who takes part."""

    num_clients: int = MISSING
    clients_per_round: int = MISSING
    round_seconds: float = MISSING  # a device's budget for download, training and upload in one round
    max_in_flight: int = MISSING  # clients out at a time; bounds the server's memory; in process at most workers + 2
    reply_seconds: float = MISSING  # real time after which a silent client is given up
    quorum_fraction: float = MISSING  # of a cohort's clients, whose verified deltas a round needs; one at the least
    round_attempts: int = MISSING  # tries at a round, each with other clients, before it is given up
    max_lost_rounds: int = MISSING  # rounds given up one after the other that end the run with an error
    join_seconds: float = MISSING  # how long a run waits for num_clients clients; it goes on with those that are there
    classes: dict[str, DeviceClassConf] = MISSING


@dataclass
class StageConf:
    """One stage of a MobileNetV3 or ProxylessNAS space."""

    width: int = MISSING
    stride: int = MISSING
    activation: str = MISSING
    squeeze_excite: bool = MISSING


@dataclass
class MobileNetV3Conf:
    """Sizes of a MobileNetV3 space; image channels and classes come from the data."""

    family: str = "mobilenet_v3"
    stem_width: int = MISSING
    stem_stride: int = MISSING
    first_width: int = MISSING
    first_stride: int = MISSING
    stages: list[StageConf] = MISSING
    final_width: int = MISSING
    feature_width: int = MISSING
    kernels: list[int] = MISSING
    expands: list[float] = MISSING
    depths: list[int] = MISSING
    resolutions: list[int] = MISSING
    norm: str = MISSING  # "group" | "batch"
    norm_eps: float = MISSING
    dropout: float = MISSING
    lite_residual: bool = MISSING  # whether blocks have the branches that finetune=lite_residual trains


@dataclass
class ProxylessConf:
    """Sizes of a ProxylessNAS space; image channels and classes come from the data."""

    family: str = "proxyless"
    stem_width: int = MISSING
    stem_stride: int = MISSING
    first_width: int = MISSING
    first_stride: int = MISSING
    stages: list[StageConf] = MISSING
    last_stage: StageConf = MISSING  # of one block in every subnet
    feature_width: int = MISSING
    kernels: list[int] = MISSING
    expands: list[float] = MISSING
    depths: list[int] = MISSING
    resolutions: list[int] = MISSING
    norm: str = MISSING  # "group" | "batch"
    norm_eps: float = MISSING
    dropout: float = MISSING
    lite_residual: bool = MISSING  # whether blocks have the branches that finetune=lite_residual trains


@dataclass
class ResidualStageConf:
    """One stage of a ResNet-D space."""

    width: int = MISSING  # at width 1
    blocks: int = MISSING  # at depth 0
    stride: int = MISSING


@dataclass
class ResNetConf:
    """Sizes of a ResNet-D space; image channels and classes come from the data."""

    family: str = "resnet"
    stem_width: int = MISSING
    stem_stride: int = MISSING
    stages: list[ResidualStageConf] = MISSING
    expands: list[float] = MISSING  # inner channels as a fraction of a block's output
    depths: list[int] = MISSING  # blocks added to a stage
    widths: list[float] = MISSING  # multipliers of the stem and of each stage
    resolutions: list[int] = MISSING
    norm: str = MISSING  # "group" | "batch"
    norm_eps: float = MISSING
    dropout: float = MISSING


@dataclass
class BlockConf:
    """One block of a described chain (see fedofa.supernet.chain)."""

    width: int = MISSING
    kernel: int = 3
    expand: float = 1.0
    stride: int = 1
    kind: str = "mbconv"  # "mbconv" | "residual"


@dataclass
class ChainConf:
    """A described chain and what is elastic in it; image channels and classes come from the data."""

    family: str = "chain"
    pretrained: Any = MISSING  # true: the network's own | file | timm:<model> | hf:<repository> | null: random
    blocks: list[BlockConf] = MISSING
    stem_width: int = MISSING
    stem_kernel: int = 3
    stem_stride: int = MISSING
    stem_pool: bool = False
    feature_width: int = MISSING  # 0: none
    activation: str = MISSING
    padding: str = "symmetric"  # "symmetric" | "tensorflow"
    kernels: list[int] = MISSING
    fractions: list[float] = MISSING  # of a block's inner channels that a subnet may keep
    min_depth: int = 1
    resolutions: list[int] = MISSING
    norm: str = MISSING  # "group" | "batch"
    norm_eps: float = MISSING
    dropout: float = MISSING
    mean: list[float] = field(default_factory=list)  # of pixels in [0, 1], that the weights expect; []: the data's own
    std: list[float] = field(default_factory=list)
    lite_residual: bool = MISSING  # whether blocks have the branches that finetune=lite_residual trains


@dataclass
class FixedConf:
    """One network for every client."""

    family: str = "fixed"
    module: str = MISSING  # a name in fedofa.supernet.families.MODULES


SUPERNETS: dict[str, type] = {
    "mobilenet_v3": MobileNetV3Conf,
    "proxyless": ProxylessConf,
    "resnet": ResNetConf,
    "chain": ChainConf,
    "fixed": FixedConf,
}


@dataclass
class FinetuneConf:
    """How clients train (see fedofa.finetune)."""

    plans: list[str] = MISSING  # in order of preference; names as in fedofa.finetune.plans.KINDS
    planner: str = MISSING  # "cost": plans with the levers below | "budget": levers chosen for each device's memory
    recompute: str = MISSING  # gradient checkpointing: "auto" where it buys a larger subnet | "never" | "always"
    statistics: str = MISSING  # batch norm: "batch" | "frozen"
    lean: bool = MISSING  # operations that keep only what their gradients need
    micro_batch: int = MISSING  # examples at a time, gradients being added up; 0: the whole batch
    feature_cache: bool = MISSING  # what lies before the first layer that trains is computed once for each example
    optimiser: str = MISSING  # "sgd" | "adamw"
    learning_rate: float = MISSING
    decay: str = MISSING  # of the learning rate over the rounds: "none" | "cosine" (to a hundredth)
    momentum: float = MISSING
    weight_decay: float = MISSING
    epochs: int = MISSING
    max_steps: int = MISSING  # optimiser steps instead of epochs; 0: epochs
    batch_size: int = MISSING
    label_smoothing: float = MISSING
    proximal_mu: float = MISSING
    max_gradient_norm: float = MISSING
    max_shift: int = MISSING  # random shifts of the images, in pixels at the subnet's resolution


@dataclass
class AggregationConf:
    """The server's step after the fold, and the precision on the wire."""

    optimiser: str = MISSING  # "plain" | "momentum" | "adam" | "yogi"
    learning_rate: float = MISSING
    beta: float = MISSING
    beta2: float = MISSING
    epsilon: float = MISSING
    float_dtype: str = MISSING  # "float32" | "float16" | "bfloat16"


@dataclass
class RuntimeConf:
    """What runs the clients."""

    name: str = MISSING  # "in_process" | "ray" | "superlink"
    num_workers: int = 0  # in process and of a Ray of one's own; 0: one a core
    address: str | None = None  # of a Ray cluster that is there already
    port: int = 0  # of the SuperLink, on 127.0.0.1; 0: a free one


@dataclass
class EvaluationConf:
    """When and what the server scores on the global test set."""

    every: int = MISSING  # rounds between evaluations; the last round is always evaluated
    clients: bool = MISSING  # score every client's own test split at the end, on the client
    calibration: str = MISSING  # whose images give batch-norm statistics: "server" | "clients" | "none"
    pairs_per_round: int = MISSING  # random subnets that the cohort scores on its own test splits; for a predictor
    comparison: bool = MISSING  # run FedAvg on the one subnet that the weakest device can train, beside it


@dataclass
class ChipConf:
    """An accelerator's energy table (see fedofa.device.energy)."""

    name: str = MISSING
    source: str = MISSING
    mac_joules: float = MISSING
    register_file: float = MISSING
    array: float = MISSING
    buffer: float = MISSING
    dram: float = MISSING
    buffer_bytes: float = MISSING
    array_rows: int = MISSING
    array_columns: int = MISSING
    weight_bits: int = MISSING
    activation_bits: int = MISSING
    weight_sparsity: float = MISSING
    activation_sparsity: float = MISSING


@dataclass
class AssignmentConf:
    """How the server chooses each client's subnet (see docs/search.md); limits are null where there are none."""

    # "auto": by search, but by rule where there is none to make (a shrinking schedule, a fixed network) |
    # "search": best accuracy predicted | "rule": most MACs and parameters that memory and time allow, by climbing
    by: str = MISSING
    predictor: str | None = None  # of "search", as all below: a file of fedofa predictor; null: the zero-cost proxy
    archive_devices: int = MISSING  # made-up devices for which good subnets are found in advance
    link_probe_bytes: int = MISSING  # of two messages that measure each client's link when it joins; 0: as stated
    latency_ms: float | None = None  # of a forward pass of one example, on every device
    inference_memory_mb: float | None = None
    sram_kb: float | None = None
    energy_mj: float | None = None  # on `chip`
    bytes_up: float | None = None  # of one round
    bytes_down: float | None = None
    macs: float | None = None
    parameters: float | None = None
    chip: ChipConf = MISSING


@dataclass
class TrackingConf:
    """Where a run is shown beside others; its own diary is always in output_dir (see docs/tracking.md)."""

    name: str = MISSING  # "jsonl" | "mlflow" | "tensorboard" | "wandb"
    project: str = MISSING  # MLflow's experiment, W&B's project
    uri: str | None = None  # MLflow's store; without it mlflow.db beside output_dir
    mode: str = MISSING  # of W&B: "offline" | "online"


@dataclass
class TeacherLossConf:
    """How far a subnet is from its teacher (see fedofa.shrinking.schedule)."""

    kind: str = MISSING  # "soft_cross_entropy" | "alpha_divergence"
    temperature: float = MISSING  # of soft_cross_entropy
    alpha_low: float = MISSING  # of alpha_divergence, as alpha_high and max_ratio
    alpha_high: float = MISSING
    max_ratio: float = MISSING


@dataclass
class ScheduleConf:
    """Which subnets of a supernet train when, and from whom they learn (see fedofa.shrinking)."""

    schedule: str = MISSING  # "progressive" | "sandwich" | "turns" | "attentive" | "phases"; simulate: or "none"
    steps: int | None = MISSING  # of the whole schedule, not used by "phases"; of simulate null: as many as rounds
    num_random: int = MISSING  # beside the largest and the smallest: drawn a step, of "turns" between these two
    candidates: int = MISSING  # of "attentive": k, of which one trains
    prefer: str = MISSING  # of "attentive": "best" | "worst" of the candidates on the step's examples
    macs_targets: list[float] = MISSING  # of "attentive": MACs of the candidates; empty: as uniform subnets have them
    teacher_share: float = MISSING  # of "turns": what the largest's answers count in the others' loss, beside labels
    teacher_loss: TeacherLossConf = MISSING
    phases: list[Any] = MISSING  # of "phases": one object a phase, as fedofa.shrinking.schedule.ShrinkPhase has it


@dataclass
class SimulateConf:
    """Everything that `fedofa simulate` needs."""

    rounds: int = MISSING
    seed: int = MISSING
    resume: bool = MISSING  # go on from the newest checkpoint in output_dir
    resume_round: int | None = None  # go on from this round's checkpoint instead
    output_dir: str = MISSING
    supernet_weights: str | None = None  # where it starts: an earlier run's folder, or a published checkpoint file
    data: DataConf = MISSING  # or what SOURCES says for its `name`
    partition: PartitionConf = MISSING
    fleet: FleetConf = MISSING
    supernet: Any = MISSING  # one of SUPERNETS, by its `family`
    finetune: FinetuneConf = MISSING
    aggregation: AggregationConf = MISSING
    shrinking: ScheduleConf = MISSING  # a schedule that says who trains what instead of the devices alone
    runtime: RuntimeConf = MISSING
    assignment: AssignmentConf = MISSING
    evaluation: EvaluationConf = MISSING
    tracking: TrackingConf = MISSING


@dataclass
class ShrinkingConf(ScheduleConf):
    """How a supernet is trained centrally."""

    optimiser: str = MISSING  # "sgd" | "adamw"; the group `optimiser` sets it with a rate and a decay that suit
    learning_rate: float = MISSING
    momentum: float = MISSING  # AdamW's beta 1
    weight_decay: float = MISSING
    batch_size: int = MISSING
    label_smoothing: float = MISSING
    max_gradient_norm: float = MISSING
    max_shift: int = MISSING  # random shifts of the images, in pixels
    frozen: list[str] = MISSING  # parts that do not train, e.g. [stem, stages.0]
    order_batches: int = MISSING  # that say how channels are ordered, at the start and in phases that do; 0: L1 norms
    precision: str = MISSING  # of convolutions and matrix products: "float32" | "bfloat16"


@dataclass
class ShrinkConf:
    """Everything that `fedofa shrink` needs."""

    seed: int = MISSING
    resume: bool = MISSING  # go on from the newest checkpoint in output_dir
    resume_step: int | None = None  # go on from this step's checkpoint instead
    output_dir: str = MISSING
    supernet_weights: str | None = None  # where it starts: an earlier run's folder, or a published checkpoint file
    num_threads: int = MISSING  # of torch; with 1 the result is the same, bit for bit, every time
    checkpoint_every: int = MISSING  # steps
    num_watched: int = MISSING  # random subnets that are scored beside the largest and the smallest
    calibration_examples: int = MISSING  # of the training set, for batch-norm statistics
    data: DataConf = MISSING
    supernet: Any = MISSING  # as in SimulateConf
    shrinking: ShrinkingConf = MISSING


@dataclass
class ProfileConf:
    """Everything that `fedofa profile` needs."""

    output: str = MISSING
    resume: bool = MISSING  # go on with what an interrupted profile of the same settings has measured
    validate: bool = MISSING  # measure further subnets and print how far predictions are off
    in_channels: int = MISSING  # of the images
    num_classes: int = MISSING
    engine: str = MISSING  # "torch" | "onnxruntime"
    threads: int = MISSING
    clock: str = MISSING  # "wall" | "cpu" (see fedofa.device.timing, as the next four)
    passes: int = MISSING
    burst: int = MISSING
    more_passes: int = MISSING
    max_spread: float = MISSING
    calibration_subnets: int = MISSING  # whole subnets that the table is held against, and corrected by where it is off
    validation_subnets: int = MISSING  # others, for validate
    seed: int = MISSING  # of both
    device_class: str | None = None  # null: the processor's name
    memory_bytes: float | None = None  # for training; null: what is free now
    uplink_bytes_per_second: float = MISSING
    downlink_bytes_per_second: float = MISSING
    supernet: Any = MISSING  # as in SimulateConf


@dataclass
class SearchConf:
    """Everything that `fedofa search` needs; limits are null where there are none."""

    device: str = MISSING  # a file that fedofa profile wrote, or published latency tables (YAML)
    pareto: bool = MISSING  # the whole Pareto set instead of the best subnet
    predictor: str | None = None  # file; null: the zero-cost proxy
    output: str | None = None
    in_channels: int = MISSING
    num_classes: int = MISSING
    seed: int = MISSING
    population: int = MISSING
    generations: int = MISSING
    cache_dir: str = MISSING  # what training memory's model found of operators is kept here
    any_machine: bool = MISSING  # false: refuse a profile that was measured on another kind of device
    latency_ms: float | None = None
    inference_memory_mb: float | None = None
    training_memory_mb: float | None = None
    sram_kb: float | None = None
    energy_mj: float | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None
    macs: float | None = None
    parameters: float | None = None
    plan: str = MISSING  # "full" | "last_blocks(k)" | "bias" | "head"
    recompute: bool = MISSING
    statistics: str = MISSING  # batch norm: "batch" | "frozen"
    lean: bool = MISSING  # operations that keep only what their gradients need
    micro_batch: int = MISSING  # examples at a time, gradients being added up; 0: the whole batch
    num_examples: int = MISSING
    batch_size: int = MISSING
    optimiser_slots: int = MISSING
    wire_bytes: int = MISSING
    state_of_charge: float | None = None  # of the battery, in [0, 1]: tightens energy_mj
    battery_reserve: float = MISSING
    chip: ChipConf = MISSING
    supernet: Any = MISSING  # as in SimulateConf


@dataclass
class PredictorConf:
    """Everything that `fedofa predictor` needs."""

    pairs: str = MISSING  # JSON lines, {"subnet": {...}, "accuracy": 0.93}, or the folder of a run
    output: str = MISSING
    kind: str = MISSING  # "mlp" | "ridge"
    held_out_fraction: float = MISSING
    in_channels: int = MISSING
    num_classes: int = MISSING
    seed: int = MISSING
    supernet: Any = MISSING  # as in SimulateConf
