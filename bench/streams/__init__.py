"""Many streams at once: what serving them costs the engine."""
