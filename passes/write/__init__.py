"""What inserts nodes into a graph, for several passes."""
