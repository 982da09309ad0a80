"""The seam to transformers: names that are private, internal or changed between versions stand in this folder.

No other module of the loop or of a decoder imports transformers or uses such a name (`tests/decoders/test_hf.py` walks
their syntax trees). Where versions differ, the function that hides it says how.
What it relies on is checked when it is imported (`versions.py`).
"""

from ..versions import VERSION, check_symbols, check_version

check_version(VERSION)
check_symbols()

from transformers import GenerationConfig
from transformers.cache_utils import Cache

from .attention import (
    GrowingLayer,
    RecurrentLayer,
    as_attention,
    attends_by_registry,
    attention_function,
    attention_name,
    attention_replaced,
    empty_cache,
    is_offloaded,
    is_plain_cache,
    keeps_keys,
    layer_kind,
    layer_window,
    register_attention,
    reorder,
    takes_ready_masks,
)
from .generation import (
    CACHE,
    ENCODED,
    SEARCHES,
    SORTS_SAMPLED_BEAMS,
    cache_of,
    constant_inputs,
    constrains_prefixes,
    decode_inputs,
    embeddings_of,
    ends_at_eos,
    eos_ids,
    first_of,
    generate_output,
    input_of,
    pad_id,
    prefill,
    search_mode,
    stopping_criteria,
    stops_at,
    token_inputs,
    with_cache,
    with_embeddings,
    with_first,
    with_input,
)
from .inputs import (
    QFORMER_IDS,
    QFORMER_MASK,
    TOKEN_KINDS,
    any_pad_id,
    encoded_images,
    image_end_ids,
    image_inputs,
    needs_images,
    qformer_tokenizer,
    select_encoded_images,
    text_tokenizer,
)
from .models import (
    attends_in_chunks,
    blocks,
    final_norm,
    has_cross_attention,
    has_device_hooks,
    inner_language_model,
    is_compiled,
    is_fully_sharded,
    is_tensor_parallel,
    layer_types,
    logit_softcap,
    mlp_of,
    norms_of,
    num_layers,
    output_embeddings,
    output_projection,
    patch_size,
    patches,
    placeholder_ids,
    sees_any_size,
    shares_layers,
    splits_forward,
    text_config,
    text_model,
    ties_embeddings,
    vision_blocks,
    vision_tower,
    vision_width,
    weights_missing,
    width,
)
