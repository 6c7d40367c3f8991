"""Chapter 6: context tokens in few channels."""
