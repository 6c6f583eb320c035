"""Seconds a round and peak memory against cohort and fleet size: `python benchmarks/scale.py --picture scale.png`.

Every row is a federation in a fresh process: unlike devices, digits, 5 local steps of 4 examples whatever a client
holds, so that rows differ in nothing but the sizes. First the cohort grows, with 1000 clients; then the number of
clients, with one cohort size and the same examples shared among more. Seconds are medians over the rounds without the
first (a warm-up) and the last (which scores the subnets); CPU seconds are those of the server and all workers.

Memory of the server is the peak of its resident memory plus the most that its memory files held, sampled; that of all
processes is the largest sampled sum, in which shared pages count once. The last line holds the slopes of straight lines
through the rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from simulation import RoundClock, print_load, print_machine, settings

from conf.compose import encode_conf
from server.checkpoint import replace_file
from server.federation import build_parts
from server.fleet import FleetPlan
from server.grid import InProcessGrid
from server.resources import memory_file_bytes, resident_bytes, tree_usage

_SETTINGS = (
    "partition=iid", "finetune.max_steps=5", "finetune.batch_size=4",
    "fleet.classes.sensor_board.memory_bytes=1e9",  # no subnet then depends on how much data a client holds
)  # fmt: skip
_SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_SAMPLE_SECONDS = 0.1
_MEGABYTE = 2**20
_WALL, _CPU, _GREY = "#0072b2", "#d55e00", "#666666"


@dataclass(frozen=True, slots=True)
class Row:
    """What one federation took."""

    num_clients: int
    cohort: int
    enrol_seconds: float
    wall_seconds: float  # a round
    cpu_seconds: float
    server_bytes: int
    tree_bytes: int


class EnrolmentClock(RoundClock):
    """Also notes when every client has introduced itself and has its subnet."""

    planned: float = 0.0

    def fleet_planned(self, plan: FleetPlan) -> None:
        """The fleet is known."""
        self.planned = time.perf_counter()


def run_row(num_clients: int, cohort: int, num_rounds: int, cache_dir: str) -> None:
    """Run one federation in this process and print what it took as one JSON line."""
    sizes = (f"fleet.num_clients={num_clients}", f"fleet.clients_per_round={cohort}", f"data.cache_dir={cache_dir}")
    conf = settings(num_rounds, *_SETTINGS, *sizes)
    parts = build_parts(conf)
    clock = EnrolmentClock()
    with (
        tempfile.TemporaryDirectory() as folder,
        InProcessGrid(num_nodes=num_clients, run_config={"config": encode_conf(conf)}) as grid,
    ):
        strategy = parts.strategy(Path(folder))
        strategy.observers.append(clock)
        began = time.perf_counter()
        strategy.start(grid, num_rounds=num_rounds)
        summed_peak_bytes = tree_usage()[1]
    rounds = clock.engine_rounds[1:-1]
    facts = {
        "enrol_seconds": clock.planned - began,
        "wall_seconds": statistics.median(usage.wall_seconds for usage in rounds),
        "cpu_seconds": statistics.median(usage.cpu_seconds for usage in rounds),
        "peak_bytes": _peak_bytes(),
        "summed_peak_bytes": summed_peak_bytes,
    }
    print(json.dumps(facts))


def measure(num_clients: int, cohort: int, num_rounds: int, cache_dir: str) -> Row:
    """Run one federation in a fresh process, and look at its memory from here."""
    arguments = ["--row", str(num_clients), str(cohort), "--rounds", str(num_rounds), "--cache", cache_dir]
    command = [sys.executable, __file__, *arguments]
    files = tree = 0
    environment = {**os.environ, **_SINGLE_THREAD}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            own_files, all_files = memory_file_bytes(process.pid)
            files, tree = max(files, own_files), max(tree, all_files + resident_bytes(process.pid))
            time.sleep(_SAMPLE_SECONDS)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"the row of {num_clients} clients, cohort {cohort}, ended with code {process.returncode}")
    facts = json.loads(output.splitlines()[-1])
    server_bytes = facts.pop("peak_bytes") + files
    del facts["summed_peak_bytes"]  # it counts what workers share in each of them
    return Row(num_clients, cohort, **facts, server_bytes=server_bytes, tree_bytes=tree)


def slope(rows: Sequence[Row], along: str, of: str) -> float:
    """Of the least-squares line through the rows."""
    return float(np.polyfit([getattr(row, along) for row in rows], [getattr(row, of) for row in rows], 1)[0])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Two panels against the cohort size: seconds a round, and peak memory."""
    figure = Figure(figsize=(9.0, 4.2), dpi=150, layout="constrained")
    figure.suptitle(f"A round of {rows[0].num_clients:,} clients on one machine", x=0.01, ha="left", weight="bold")
    seconds, memory = figure.subplots(1, 2)
    cpu_ms, wall_ms = (1e3 * slope(rows, "cohort", f"{name}_seconds") for name in ("cpu", "wall"))
    _line(seconds, rows, [row.cpu_seconds for row in rows], _CPU, f"CPU: {cpu_ms:.0f} ms a client")
    _line(seconds, rows, [row.wall_seconds for row in rows], _WALL, f"wall: {wall_ms:.0f} ms a client")
    _style(seconds, "Seconds a round")
    tree, server = ([getattr(row, name) / _MEGABYTE for row in rows] for name in ("tree_bytes", "server_bytes"))
    per_client = [slope(rows, "cohort", name) / 2**10 for name in ("tree_bytes", "server_bytes")]
    _line(memory, rows, tree, _CPU, f"server and workers: {per_client[0]:+.0f} KiB a client")
    _line(memory, rows, server, _WALL, f"server: {per_client[1]:+.0f} KiB a client")
    _style(memory, "Peak memory (MiB)")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    replace_file(path, temporary.read_bytes())
    temporary.unlink()


def _line(axes: Axes, rows: Sequence[Row], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot([row.cohort for row in rows], values, color=colour, marker="o", markersize=4, linewidth=1.6, label=label)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_GREY)
    axes.set_xlabel("Cohort: clients a round", fontsize=10, color=_GREY)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlim(0, None)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=9)


def _peak_bytes() -> int:
    """Of this program alone; `getrusage` would hand down the peak of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def print_row(row: Row) -> None:
    print(
        f"{row.num_clients:>8}{row.cohort:>8}{row.enrol_seconds:>14.2f}{row.wall_seconds:>14.2f}{row.cpu_seconds:>13.2f}"
        f"{row.server_bytes / _MEGABYTE:>12.0f}{row.tree_bytes / _MEGABYTE:>10.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[10, 25, 50, 100, 200], help="with 1000 clients")
    parser.add_argument("--fleets", type=int, nargs="+", default=[100, 300, 1000], help="with cohorts of 50")
    parser.add_argument("--rounds", type=int, default=5, help="a row; the first and last do not count")
    parser.add_argument("--picture", type=Path, help="where to write the picture")
    parser.add_argument("--row", type=int, nargs=2, metavar=("CLIENTS", "COHORT"), help="run one row in this process")
    parser.add_argument("--cache", help="where the data and its partitions are kept; a temporary folder by default")
    options = parser.parse_args()
    if options.rounds < 3 or min(len(options.cohorts), len(options.fleets)) < 2:
        parser.error("expected at least 3 rounds, 2 cohorts and 2 fleets")
    if options.row:
        num_clients, cohort = options.row
        run_row(num_clients, cohort, options.rounds, options.cache)
        return
    print_machine()
    print_load("at the start")
    print(f"{'':16}{'enrolment':>14}{'round, wall':>14}{'round, CPU':>13}{'server':>12}{'all':>10}")
    print(f"{'clients':>8}{'cohort':>8}{'seconds':>14}{'seconds':>14}{'seconds':>13}{'MiB':>12}{'MiB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or folder
        sizes = [*((1000, cohort) for cohort in options.cohorts), *((fleet, 50) for fleet in options.fleets)]
        for num_clients in {num_clients for num_clients, _ in sizes}:
            measure(num_clients, 2, 3, cache)  # splits the data: that takes memory, once
        rows = []
        for num_clients, cohort in sizes:
            rows.append(measure(num_clients, cohort, options.rounds, cache))
            print_row(rows[-1])
    print_load("at the end")
    by_cohort, by_fleet = rows[: len(options.cohorts)], rows[len(options.cohorts) :]
    if options.picture:
        draw(by_cohort, options.picture)
    report = {
        "cpu_ms_per_cohort_client": 1e3 * slope(by_cohort, "cohort", "cpu_seconds"),
        "server_kib_per_cohort_client": slope(by_cohort, "cohort", "server_bytes") / 2**10,
        "all_kib_per_cohort_client": slope(by_cohort, "cohort", "tree_bytes") / 2**10,
        "server_kib_per_fleet_client": slope(by_fleet, "num_clients", "server_bytes") / 2**10,
        "all_kib_per_fleet_client": slope(by_fleet, "num_clients", "tree_bytes") / 2**10,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps({name: round(value, 2) if isinstance(value, float) else value for name, value in report.items()}))


if __name__ == "__main__":
    main()
