"""Trackers: where a run is shown beside others, each in a module of its own that is imported only when chosen."""
