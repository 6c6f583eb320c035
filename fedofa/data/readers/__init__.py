"""One module a kind of source: how its files turn into labelled images."""
