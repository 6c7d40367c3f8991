"""Chapter 1: one flat graph in one spelling."""
