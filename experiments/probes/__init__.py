"""Decoders that change nothing and note what the loop shows them."""
