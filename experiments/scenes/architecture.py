"""What the scenes models share: their vision tower, their LLaVA, their processor."""

from __future__ import annotations

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

MEAN, STD = 0.5, 0.25  # of a pixel, in [0, 1]


def vision(pixels: int, patch: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=pixels,
        patch_size=patch,
        projection_dim=160,
    )


def llava(text: LlamaConfig, image_token: int, pixels: int, patch: int) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights; its token ids in generation are those of the text model."""
    config = LlavaConfig(
        vision_config=vision(pixels, patch),
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(pixels // patch) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    ids = {name: getattr(text, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config.update(max_new_tokens=256, **ids)
    return model


def processor(tokenizer: PreTrainedTokenizerBase, template: str, pixels: int, patch: int) -> LlavaProcessor:
    """Adds the token `<image>` to the tokenizer."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(
        size={"shortest_edge": pixels},
        crop_size={"height": pixels, "width": pixels},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
