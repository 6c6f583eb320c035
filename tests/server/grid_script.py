"""A parent without a `__main__` guard: pushes endless tasks, says which processes there are, waits to be killed."""

import signal
import sys
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict

from server.grid import InProcessGrid

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what runs in the background ignore Ctrl-C
sys.path.insert(0, sys.argv[1])
begun = [Path(sys.argv[2]) / name for name in ("first", "second")]
with InProcessGrid("grid_apps:app", num_nodes=2, run_config={}, num_workers=2) as grid:
    messages = [
        Message(RecordDict({"sleep": ConfigRecord({"file": str(file)})}), node_id, "query.sleep")
        for file, node_id in zip(begun, grid.get_node_ids(), strict=True)
    ]
    ids = grid.push_messages(messages)
    while not all(file.exists() for file in begun):
        grid.pull_messages(ids)
    print("busy", flush=True)
    while True:
        grid.pull_messages(ids)
