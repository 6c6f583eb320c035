"""How far predictions are off on this device: `python benchmarks/truth.py [--pairs FILE] [override ...]`.

Profiles the device with every engine (overrides are those of `fedofa profile`), holds the latency table against random
subnets that it was not fitted to, and the predicted memory of a forward pass against processes of their own. With
--pairs, lines of subnets and accuracies as `fedofa predictor` reads them, an accuracy predictor is held against those
that it was not trained on. The last line holds all figures.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is loaded, as every command of fedofa sets it

from conf.compose import compose_predictor_conf, compose_profile_conf
from conf.multirun import key_of, parse_overrides
from fedofa.device.engines import ENGINES
from server.predictor import run_predictor
from server.profile import run_profile, summary_lines

_FIGURES = {
    "mape": "latency_error",
    "rank_correlation": "latency_rank",
    "memory_least_ratio": "memory_least_ratio",
    "memory_greatest_ratio": "memory_greatest_ratio",
}
_OF_PREDICTOR = ("supernet", "in_channels", "num_classes", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--pairs", type=Path, help="subnets of the same supernet with their accuracies")
    parser.add_argument("overrides", nargs="*", help="settings of fedofa profile, such as supernet=small")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load average {' '.join(f'{load:.2f}' for load in os.getloadavg())}", flush=True)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in options.engines:
            output = f"output={folder}/{engine}.json"
            device = run_profile(
                compose_profile_conf([*options.overrides, f"engine={engine}", "validate=true", output])
            )
            print("\n".join(summary_lines(device)), flush=True)
            fit = device.fit or {}
            figures |= {f"{engine}_{label}": fit[name] for name, label in _FIGURES.items() if name in fit}
        if options.pairs:
            figures["accuracy_rank"] = accuracy_rank(options.pairs, Path(folder), options.overrides)
    print(" ".join(f"{name}={value:.4f}" for name, value in figures.items()))


def accuracy_rank(pairs: Path, folder: Path, overrides: list[str]) -> float:
    """The rank correlation of a predictor that is trained on a part of the pairs with the others."""
    conf = compose_predictor_conf(
        [*shared_settings(overrides), f"pairs={pairs}", f"output={folder / 'predictor.safetensors'}"]
    )
    held_out = run_predictor(conf)
    print(f"accuracy predictor: rank correlation {held_out.rank_correlation:.3f} on {held_out.num_held_out} pairs")
    return held_out.rank_correlation


def shared_settings(overrides: list[str]) -> list[str]:
    """The settings of fedofa profile that fedofa predictor has too."""
    parsed = zip(overrides, parse_overrides(overrides), strict=True)
    return [text for text, item in parsed if key_of(item).split(".")[0] in _OF_PREDICTOR]


if __name__ == "__main__":
    main()
