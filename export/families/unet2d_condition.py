"""UNet2DConditionModel: the Stable Diffusion UNet with plain cross attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantempo.contracts.manifest import ArrayInput, ClassInput
from quantempo.export.families.base import Family, FamilyContext, kept_channels, refuse, renamed, square_size

CLASS_NAME = "UNet2DConditionModel"
# Every one of these keys, when set, adds an input or changes what an input means.
NOT_SET = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "cross_attention_norm",
    "reverse_transformer_layers_per_block",
)
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
BLOCKS = {
    "down_block_types": {"DownBlock2D", "CrossAttnDownBlock2D"},
    "up_block_types": {"UpBlock2D", "CrossAttnUpBlock2D"},
}


ARGUMENTS = renamed({name: name for name in ("sample", "timestep", "class_labels", "encoder_hidden_states")})


def build(config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a plain conditional UNet."""
    for key in NOT_SET:
        if config.get(key) is not None:
            raise refuse(CLASS_NAME, key, config[key], "not set: plain cross attention")
    if config.get("attention_type", "default") != "default":
        raise refuse(CLASS_NAME, "attention_type", config["attention_type"], "'default'")
    if config.get("mid_block_type", MIDDLES[0]) not in MIDDLES:
        raise refuse(CLASS_NAME, "mid_block_type", config["mid_block_type"], "'UNetMidBlock2DCrossAttn'")
    for key, known in BLOCKS.items():
        for block in config.get(key) or ():
            if block not in known:
                raise refuse(CLASS_NAME, key, block, "only " + ", ".join(sorted(known)))
    widths = config.get("cross_attention_dim", 1280)
    width = widths if isinstance(widths, int) else widths[0] if len(set(widths)) == 1 else None
    if width is None:
        raise refuse(CLASS_NAME, "cross_attention_dim", widths, "one width for all blocks")
    channels, given = kept_channels(CLASS_NAME, config)
    height, breadth = square_size(CLASS_NAME, config.get("sample_size"))
    prompt = ArrayInput("encoder_hidden_states", "float32", (context.tokens, int(width)))
    rows = config.get("num_class_embeds")
    if rows is None:
        return Family(CLASS_NAME, (channels, height, breadth), ARGUMENTS, given, arrays=(prompt,))
    labels = ClassInput("class_labels", count=int(rows), null=None, names=context.labels)
    return Family(
        CLASS_NAME, (channels, height, breadth), ARGUMENTS, given, classes=(labels,), arrays=(prompt,)
    )
