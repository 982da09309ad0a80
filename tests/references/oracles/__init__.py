"""Plain loops of methods, written apart from the decoders and by other means: greedy, one row, float64, the whole
sequence again at every step. Each module has `oracle(model, inputs, max_new_tokens, **options) -> token ids`.

The tiny models of `plain.py` have 4 layers and 16 visual tokens. Norms and rotary tables of transformers go through
float32, so that logits of another float64 account differ by 1e-6 to 1e-5.
"""
