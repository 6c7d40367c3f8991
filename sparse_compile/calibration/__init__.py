"""Calibration: measure a model's sites on some batches, fit what may stand in their place, and choose a recipe."""
