"""How the tiny models are built: by family, a function from the options of its language model, and from the ids of its
special tokens where tests use several, to the model of its real class, whose weights are not scaled yet.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MIXED = dict(sliding_window=12, layer_types=[SLIDING, FULL, SLIDING, FULL])
ROTARY = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
QWEN_VISION = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
)
QWEN_IDS = dict(image_token_id=4, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7)
PINPOINTS = [[32, 64], [64, 32]]


def _tower(image: int) -> dict:
    return dict(vision_config=tf.CLIPVisionConfig(**VISION), image_token_index=image, vision_feature_layer=-1)


def llava(text: dict, image: int):
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=tf.LlamaConfig(**text), image_seq_length=16, **_tower(image))
    )


def llava_next(text: Any, image: int):
    """`text`: the config itself."""
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(text_config=text, image_grid_pinpoints=PINPOINTS, **_tower(image))
    )


def llava_onevision(text: dict, image: int, **ids: int):
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.Qwen2Config(**text),
        image_token_index=image,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
        **ids,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def instructblip(text: dict, image: int):
    config = tf.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=dict(
            vocab_size=text["vocab_size"],
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            encoder_hidden_size=32,
        ),
        text_config=tf.LlamaConfig(**text).to_dict(),
        num_query_tokens=12,
        image_token_index=image,
    )
    return tf.InstructBlipForConditionalGeneration(config)


def qwen25(text: dict, ids: dict[str, int]):
    vision = {**QWEN_VISION, "window_size": 16, "out_hidden_size": 48, "fullatt_block_indexes": [1]}
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(vision_config=vision, text_config={**text, "rope_parameters": {**ROTARY}}, **ids)
    )


def qwen3(text: dict, ids: dict[str, int]):
    vision = {**QWEN_VISION, "out_hidden_size": 48, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = {**text, "head_dim": 12, "rope_parameters": {**ROTARY, "mrope_interleaved": True}}
    return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(vision_config=vision, text_config=text, **ids))


def internvl(text: Any, image: int, size: int, tokens: int):
    """`text`: the config itself; `size`: of an image, in pixels, which has so many `tokens`."""
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[size, size],
        patch_size=[8, 8],
    )
    return tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(
            vision_config=vision, text_config=text.to_dict(), image_token_id=image, image_seq_length=tokens
        )
    )


def qwen2(text: dict):
    vision = dict(
        depth=2,
        embed_dim=32,
        hidden_size=48,
        num_heads=2,
        mlp_ratio=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        in_channels=3,
    )
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(vision_config=vision, text_config={**text, "rope_parameters": {**ROTARY}}, **QWEN_IDS)
    )


def qwen35(text: dict):
    vision = {**QWEN_VISION, "out_hidden_size": 48, "num_position_embeddings": 64}
    linear = dict(
        linear_key_head_dim=12,
        linear_value_head_dim=12,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=[LINEAR, FULL, LINEAR, FULL],
    )
    text = {
        **text,
        "head_dim": 48,
        **linear,
        "rope_parameters": {**ROTARY, "mrope_interleaved": True, "partial_rotary_factor": 0.25},
    }
    return tf.Qwen3_5ForConditionalGeneration(tf.Qwen3_5Config(vision_config=vision, text_config=text, **QWEN_IDS))


def idefics(kind: str, text: dict):
    text = tf.LlamaConfig(**text).to_dict()
    config = getattr(tf, f"{kind}Config")(
        vision_config=VISION, text_config=text, image_token_id=4, scale_factor=2, pad_token_id=0
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config)


def gemma3(text: dict):
    text = {**text, "head_dim": 12, "query_pre_attn_scalar": 12, **MIXED, "layer_types": [FULL, SLIDING, FULL, SLIDING]}
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=16,
        image_token_index=4,
        boi_token_index=5,
        eoi_token_index=6,
    )
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros, until it is trained
    return model


def aya(text: dict):
    vision = tf.SiglipVisionConfig(**VISION, vision_use_head=False)
    return tf.AyaVisionForConditionalGeneration(
        tf.AyaVisionConfig(vision_config=vision, text_config=tf.Cohere2Config(**text, **MIXED), image_token_index=4)
    )


def glm4v(text: dict):
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=48,
        image_size=32,
    )
    ids = dict(
        image_token_id=4,
        video_token_id=5,
        image_start_token_id=6,
        image_end_token_id=7,
        video_start_token_id=8,
        video_end_token_id=9,
    )
    return tf.Glm4vForConditionalGeneration(
        tf.Glm4vConfig(vision_config=vision, text_config={**text, "rope_parameters": {**ROTARY}}, **ids)
    )


def lfm2(text: dict):
    text = {**text, "block_multiple_of": 16, "layer_types": ["conv", FULL, "conv", FULL]}
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=8,
        num_patches=36,
        vision_use_head=False,
    )
    config = tf.Lfm2VlConfig(
        vision_config={**vision, "model_type": "siglip2_vision_model"},
        text_config={**text, "model_type": "lfm2"},
        image_token_id=4,
        projector_hidden_size=32,
    )
    return tf.Lfm2VlForConditionalGeneration(config)


def florence2(text: dict):
    vision = dict(
        depths=(1, 1, 1, 1),
        embed_dim=(8, 8, 16, 16),
        num_heads=(1, 1, 2, 2),
        num_groups=(1, 1, 2, 2),
        window_size=4,
        projection_dim=48,
    )
    text = tf.BartConfig(
        vocab_size=text["vocab_size"],
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=256,
    )
    return tf.Florence2ForConditionalGeneration(
        tf.Florence2Config(vision_config=vision, text_config=text.to_dict(), image_token_id=4)
    )


def mllama(text: dict):
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        image_size=32,
        patch_size=8,
        max_num_tiles=4,
        intermediate_layers_indices=[0, 1],
        vision_output_dim=96,
    )
    return tf.MllamaForConditionalGeneration(
        tf.MllamaConfig(
            vision_config=vision,
            text_config={**text, "cross_attention_layers": [1, 3]},
            image_token_index=4,
        )
    )
