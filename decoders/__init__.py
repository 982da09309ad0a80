"""The decoding loop and the interface of its plugins. It knows no method by name.

Letters for shapes, everywhere: `b` images, `k` beams, `n` rows (= b*k), `c` candidates, `h` heads, `q` query length,
`t` cache slots, `v` vocabulary, `l` layers.
"""

from .errors import StackError
from .interface import Decoder, Reads, Run, Step
from .loop import Stack

__all__ = ["Decoder", "Reads", "Run", "Stack", "StackError", "Step"]
