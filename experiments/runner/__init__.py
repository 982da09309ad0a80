"""Runs: what a configuration makes, and the answers, in batches and on many workers, into the store."""
