"""What only reads a graph, for several passes."""
