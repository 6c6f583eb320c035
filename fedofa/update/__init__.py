"""What goes over the wire: packed buffers, tasks and deltas, and their verification."""
