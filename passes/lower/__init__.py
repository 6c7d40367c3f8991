"""Chapter 7: what runs each product."""
