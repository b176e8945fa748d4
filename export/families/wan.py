"""WanTransformer3DModel: Wan 2.1 and 2.2, text and image to video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantempo.contracts.manifest import ArrayInput
from quantempo.errors import UnsupportedModel
from quantempo.export.families.base import (
    TIMESTEP,
    Family,
    FamilyContext,
    Feeds,
    conditioned_sample,
    sample_size,
    with_condition,
)

CLASS_NAME = "WanTransformer3DModel"
TOKENS = 512
IMAGE_TOKENS = 257
IMAGES = "encoder_hidden_states_image"


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a Wan transformer; a sample is [channels, frames, height, width]."""
    size = sample_size(CLASS_NAME, context, None, rank=3)
    channels, given, condition = conditioned_sample(CLASS_NAME, config, size)
    prompt = context.tokens or TOKENS
    if config.get("added_kv_proj_dim") is not None and prompt != TOKENS:
        raise UnsupportedModel(
            f"denoiser of class {CLASS_NAME}", found=f"prompts of {prompt} tokens", wanted=f"prompts of {TOKENS}",
            cause="with image embeddings, all tokens before the last 512 are taken for the image's",
            remedy="leave --tokens out",
        )
    arrays = [ArrayInput("encoder_hidden_states", "float32", (prompt, int(config["text_dim"])))]
    if config.get("image_dim") is not None:
        tokens = int(config.get("pos_embed_seq_len") or IMAGE_TOKENS)
        arrays.append(ArrayInput(IMAGES, "float32", (tokens, int(config["image_dim"])), guided=False))
    return Family(CLASS_NAME, (channels, *size), _arguments, given, arrays=(*arrays, *condition))


def _arguments(feeds: Feeds) -> Mapping[str, Any]:
    return {
        "hidden_states": with_condition(feeds), "timestep": feeds[TIMESTEP],
        "encoder_hidden_states": feeds["encoder_hidden_states"], IMAGES: feeds.get(IMAGES), "return_dict": False,
    }
