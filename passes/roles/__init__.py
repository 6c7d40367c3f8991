"""Chapter 3: which tokens are output tokens, and what each site is to become."""
