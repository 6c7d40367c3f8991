"""Chapter 4: the same loss and gradients for less work."""
