"""A ClientApp for real SuperNodes: each client up to 8 misbehaves in its own way, the others are the real thing."""

import os
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from hostile_app import MISDEEDS

from clients import client_app as real
from clients.local import client_id

app = ClientApp()
app.query()(real.query)


def _hang(reply: Message, message: Message) -> Message:
    """Say that training goes on, then be silent."""
    Path(os.environ["FEDOFA_TEST_MARKS"], f"{os.getpid()}").touch()
    time.sleep(600)
    return reply


KINDS = {
    0: ("out of battery", MISDEEDS[0]),
    1: ("ClientApp stopped responding", MISDEEDS[1]),  # kills its own process
    2: ("not finite", MISDEEDS[2]),
    3: ("expected shape", MISDEEDS[4]),
    4: (client_id(11), MISDEEDS[6]),
    5: ("round", MISDEEDS[7]),
    6: ("checksum", MISDEEDS[10]),
    7: ("no answer within", _hang),
    8: ("Node Unavailable", _hang),  # its SuperNode is killed meanwhile
}
"""Partition -> (words of the reason that the server gives, what the client does)."""


@app.train()
def train(message: Message, context: Context) -> Message:
    reply = real.train(message, context)
    _, misdeed = KINDS.get(int(context.node_config["partition-id"]), (None, None))
    return misdeed(reply, message) if misdeed else reply
