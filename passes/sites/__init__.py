"""Chapter 2: the frozen layers, their adapters, and the blocks that they form."""
