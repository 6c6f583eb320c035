"""A ClientApp module that cannot be imported."""

raise LookupError("no\ndata here")
