"""Low-rank factors of frozen weights, from which the channels of a batch are predicted."""
