"""Tiny ClientApps for the tests of the in-process grid."""

import os
import signal
import sys
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def echo(message: Message, context: Context) -> Message:
    """The content back, with what the ClientApp sees of its surroundings."""
    content = RecordDict(dict(message.content.items()))
    content["context"] = ConfigRecord(
        {
            "pid": os.getpid(),
            "run_id": context.run_id,
            "node_id": context.node_id,
            **{f"node_config.{key}": value for key, value in context.node_config.items()},
            **{f"run_config.{key}": value for key, value in context.run_config.items()},
        }
    )
    return Message(content, reply_to=message)


@app.query("nothing")
def nothing(message: Message, context: Context) -> Message:
    """An empty reply."""
    return Message(RecordDict(), reply_to=message)


@app.query("process")
def process(message: Message, context: Context) -> Message:
    """Facts about the worker process; looks at the arrays in the way that leaves a reference cycle behind."""
    import torch

    list(message.content.array_records.values())
    facts = ConfigRecord(
        {
            "pid": os.getpid(),
            "num_torch_threads": torch.get_num_threads(),
            "num_fds": len(os.listdir("/proc/self/fd")),
            "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        }
    )
    return Message(RecordDict({"process": facts}), reply_to=message)


@app.query("meet")
def meet(message: Message, context: Context) -> Message:
    """Returns only when another node is being served at the same time."""
    folder = Path(str(message.content.config_records["meeting"]["folder"]))
    (folder / str(context.node_id)).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError("nobody came")
        time.sleep(0.01)
    return echo(message, context)


@app.query("sleep")
def sleep(message: Message, context: Context) -> Message:
    """Says that it has begun, then never returns."""
    Path(str(message.content.config_records["sleep"]["file"])).touch()
    while True:
        time.sleep(1)


@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    """Fails in the way that the message asks for."""
    context.state["spoilt"] = ConfigRecord({"by": "a failure"})
    match message.content.config_records["fail"]["how"]:
        case "raise":
            raise ValueError("two\nlines")
        case "sys.exit":
            sys.exit("leaving")
        case "os._exit":
            os._exit(3)
        case "os._exit(0)":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "no reply":
            return message
    return echo(message, context)


@app.train()
def count(message: Message, context: Context) -> Message:
    """Counts, in the node's state, how often it was called; the state weighs as much as the message asks for."""
    seen = int(str(context.state.config_records["count"]["calls"])) if "count" in context.state else 0
    num_bytes = int(str(message.content.config_records["count"]["state_bytes"]))
    context.state["count"] = ConfigRecord({"calls": seen + 1})
    context.state["ballast"] = ArrayRecord({"ballast": Array("uint8", (num_bytes,), "raw", bytes(num_bytes))})
    return Message(RecordDict({"count": ConfigRecord({"calls": seen})}), reply_to=message)


@app.train("forget")
def forget(message: Message, context: Context) -> Message:
    """Empties the node's state."""
    context.state = RecordDict()
    return Message(RecordDict(), reply_to=message)


@app.evaluate()
def ask_back(message: Message, context: Context) -> Message:
    """Makes a message of its own, as a ClientApp under Flower's runtimes can."""
    own = Message(RecordDict(), 7, "query")
    return Message(RecordDict({"own": ConfigRecord({"src_node_id": own.metadata.src_node_id})}), reply_to=message)
