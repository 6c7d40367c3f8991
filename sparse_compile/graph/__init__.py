"""FX graphs: how they are read, walked, rewritten and printed, the facts found in them, and what they cost."""
