"""Measurements, each with its rivals in the same run: needle, facts, cost. Knows nothing of training but its data generators."""
