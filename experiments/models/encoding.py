"""The inputs of a batch: prompts in the model's format, and images."""

from __future__ import annotations

import torch

from ..inputs.errors import InputError, PictureError
from . import processors
from .loading import first_line


def encode(
    processor, images: list, prompt: str | list[str | list[dict]], device, template: str | None = None
) -> dict[str, torch.Tensor]:
    """Inputs of one batch on the device, prompts padded on the left.

    Args:
        images: for each row its picture, or a list of its pictures; of none, if no row has any.
        prompt: one for all rows, or one a row; a row's may be a chat, messages with `role` and `content`, which is a
            list of `{"type": "image"}` and `{"type": "text", "text": ...}`.
        template: the prompt format, with `{prompt}` and `{images:PLACEHOLDER}`, which is repeated for every picture of
            the row;
            None: the processor's chat template.

    Returns:
        `input_ids` and `attention_mask` (rows, length), and what else the model takes.

    Raises:
        InputError: for as many prompts as there are not rows, a template that does not fit, or a processor without a
            chat template.
    """
    pictures = [list(i) if isinstance(i, (list, tuple)) else [i] for i in images]
    prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(pictures):
        raise InputError(f"{len(prompts)} prompts for {len(pictures)} rows of images; give one prompt, or one a row")
    if any(pictures) and not all(pictures):
        raise InputError("every row of images is a picture or a list of at least one, or no row has any")
    if template is None and not processor.chat_template:
        raise InputError(
            "this processor has no chat template; give the prompt format of the model, in both kinds of quotes:"
            " model.template='\"USER: {images:<image>\\n}{prompt} ASSISTANT:\"'"
        )
    texts = [
        _filled(template, len(row), text) if template is not None else _chat(processor, len(row), text)
        for row, text in zip(pictures, prompts, strict=False)
    ]
    start = processor.tokenizer.bos_token
    twice = bool(start) and texts[0].startswith(start)  # the tokenizer would put a second one before it
    try:
        inputs = processor(
            images=pictures if any(pictures) else None,
            text=texts,
            padding=True,
            return_tensors="pt",
            **({"add_special_tokens": False} if twice else {}),
        )
    except (ValueError, IndexError, StopIteration) as error:
        raise PictureError(
            f"the processor {type(processor).__name__} takes no such pictures and prompt: {first_line(error)}"
        ) from error
    return dict(processors.qformer_on_the_right(inputs).to(device))


class _Images(int):
    """A number of pictures that formats as so many placeholders."""

    def __format__(self, placeholder: str) -> str:
        return placeholder * self


def _filled(template: str, count: int, prompt: str | list[dict]) -> str:
    if not isinstance(prompt, str):
        if [message["role"] for message in prompt] != ["user"]:
            raise InputError(
                f"a template takes one turn, the user's, not {len(prompt)} messages"
                f" ({', '.join(message['role'] for message in prompt)}); use the processor's chat template"
            )
        prompt = "".join(part["text"] for part in prompt[0]["content"] if part["type"] == "text")
    example = 'an example: "USER: {images:<image>\\n}{prompt} ASSISTANT:"'
    try:
        text = template.format(images=_Images(count), prompt=prompt)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(
            f"could not fill in the template '{template}' ({error}); it holds {{prompt}} and {{images:PLACEHOLDER}}"
            f" only, {example}"
        ) from error
    if "{prompt}" not in template:
        raise InputError(f"the template '{template}' has no place for {{prompt}}; {example}")
    if count > 1 and "{images:" not in template:
        raise InputError(
            f"the template '{template}' has a place for one picture, not {count}; if the model takes several, write the"
            f" placeholder as {{images:PLACEHOLDER}}, {example}"
        )
    return text


def _chat(processor, count: int, prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": prompt}]}]
    return processor.apply_chat_template(prompt, add_generation_prompt=True)
