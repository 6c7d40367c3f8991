"""A bank of trained adapters, from which an adapter for new data is composed without training (arXiv 2507.01806)."""
