"""A ClientApp whose workers die before they can serve anything."""

import os

from flwr.clientapp import ClientApp

app = ClientApp()
not_an_app = "a string"
os.register_at_fork(after_in_child=lambda: os._exit(7))
