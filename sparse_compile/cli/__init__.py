"""The command line `sparselora`."""
