"""How deltas of all shapes become one step of the shared weights: exact sums, their solve, the server's optimisers."""
