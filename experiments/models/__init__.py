"""Vision-language models: loaded with their processors, or built of the same architecture without a download, and the
inputs of a batch.
"""

from .encoding import encode
from .loading import DTYPES, ROOT, check, entry, file_digest, identity, load, local, skeleton, template

__all__ = [
    "DTYPES",
    "ROOT",
    "check",
    "encode",
    "entry",
    "file_digest",
    "identity",
    "load",
    "local",
    "skeleton",
    "template",
]
