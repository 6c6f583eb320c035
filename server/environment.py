"""Environment variables of the processes that compute: read when numpy, torch and flwr are first imported."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The processes keep every core busy: more threads in one would only make its short tasks wait for each other."""

QUIET_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Flower neither reports its use, nor asks for newer versions, nor installs what an app depends on."""
