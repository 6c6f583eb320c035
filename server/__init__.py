"""The server's side: the FedOFA strategy, its Flower ServerApp, the in-process runtime and the command line."""
