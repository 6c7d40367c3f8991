"""Context surrogates: statistics of a block, and the affine maps that are fitted on them to stand in its place."""
