"""From a captured graph to a compiled one: the ordered passes, what runs them, and what is said about it."""
