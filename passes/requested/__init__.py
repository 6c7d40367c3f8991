"""Chapter 5: another function, because an option asks for it."""
