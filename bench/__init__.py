"""Benchmarks: each a command that prints our figure beside the machine's limit and a peer, measured in the same run."""
