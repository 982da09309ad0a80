"""The decoding loop and the interface of its plugins. It knows no method by name.

Letters for shapes, everywhere: `b` images, `k` beams, `n` rows (= b*k), `m` rows with those of the branches, `c`
candidates, `h` heads, `q` query length, `t` cache slots, `v` vocabulary, `l` layers.
"""

from .beams import Finished, Hypotheses
from .errors import StackError
from .interface import Branch, Cached, Candidates, Decoder, Reads, Rollback, Run, Step, lasting
from .stack import Stack
from .state import put

__all__ = [
    "Branch",
    "Cached",
    "Candidates",
    "Decoder",
    "Finished",
    "Hypotheses",
    "Reads",
    "Rollback",
    "Run",
    "Stack",
    "StackError",
    "Step",
    "lasting",
    "put",
]
