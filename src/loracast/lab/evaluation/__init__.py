"""Measurements, each with its baselines in the same run (docs/evaluation.md)."""
