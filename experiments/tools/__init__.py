"""Commands that make files which decoders need."""
