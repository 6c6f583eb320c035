"""A ClientApp whose clients with a number below 8 are never there when it comes to training."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients import client_app as real

NUM_DESERTERS = 8

app = ClientApp()
app.query()(real.query)
app.evaluate()(real.score)


@app.train()
def train(message: Message, context: Context) -> Message:
    if int(context.node_config["partition-id"]) < NUM_DESERTERS:
        raise ConnectionError("the line is dead")
    return real.train(message, context)
