"""Values that every other package speaks in: configurations, plans, profiles, deltas, states. No torch."""
