"""The versions of transformers that were tested, and what `hf/` relies on in them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence

import transformers
from packaging.version import Version

from .errors import StackError

OLDEST, NEWEST = "5.17.0", "5.24.0"  # versions of transformers between which the tests were run (`make compat`)
VERSION = Version(transformers.__version__)

# what is imported from transformers, by module; "Class.method" also asks for the method
_SYMBOLS = {
    "transformers": ("AttentionInterface", "GenerationConfig", "StoppingCriteriaList"),
    "transformers.cache_utils": (
        "Cache.get_seq_length",
        "Cache.reorder_cache",
        "DynamicCache",
        "DynamicLayer.crop",
        "DynamicLayer.get_mask_sizes",
        "DynamicLayer.lazy_initialization",
        "DynamicLayer.update",
        "DynamicSlidingWindowLayer",
        "LinearAttentionLayer.reorder_cache",
    ),
    "transformers.generation.configuration_utils": ("GenerationMode",),
    "transformers.generation.logits_process": ("PrefixConstrainedLogitsProcessor",),
    "transformers.generation.stopping_criteria": ("StopStringCriteria",),
    "transformers.generation.utils": (
        "GenerateBeamDecoderOnlyOutput",
        "GenerateDecoderOnlyOutput",
        "GenerationMixin._prefill",
        "GenerationMixin._update_model_kwargs_for_generation",
        "GenerationMixin.prepare_inputs_for_generation",
    ),
    "transformers.masking_utils": ("ALL_MASK_ATTENTION_FUNCTIONS", "AttentionMaskInterface"),
    "transformers.modeling_utils": (
        "ALL_ATTENTION_FUNCTIONS",
        "PreTrainedModel.get_decoder",
        "PreTrainedModel.get_output_embeddings",
    ),
}


def check_version(version: Version) -> None:
    """Refuse a transformers older than the oldest tested; warn, in one line, of one newer than the newest.

    Raises:
        StackError: for an older one.
    """
    if version < Version(OLDEST):
        raise StackError(
            f"transformers {version} is too old: the oldest supported version is {OLDEST} (tested: {OLDEST} to"
            f" {NEWEST}); pip install 'transformers>={OLDEST}'"
        )
    if version > Version(NEWEST):
        logging.getLogger("decoders").warning(
            "transformers %s is newer than any version tested (%s to %s); results may differ", version, OLDEST, NEWEST
        )


def check_symbols(symbols: Mapping[str, Sequence[str]] = _SYMBOLS) -> None:
    """Refuse a transformers that lacks what this module uses, by the name of what is missing.

    Raises:
        StackError: naming the version and the first missing symbol.
    """
    for module, names in symbols.items():
        for name in names:
            try:
                found = importlib.import_module(module)
                for part in name.split("."):
                    found = getattr(found, part)
            except (ImportError, AttributeError) as error:
                raise StackError(
                    f"transformers {VERSION} has no {module}.{name}, on which decoders/hf relies; install a tested"
                    f" version ({OLDEST} to {NEWEST}), or adapt decoders/hf"
                ) from error
