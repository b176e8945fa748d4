"""Prompts to the arrays that a text-conditioned denoiser takes, with the pipeline's own tokenizer and text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantempo.contracts.manifest import Denoiser
from quantempo.errors import RequestError
from quantempo.export.source import read_json_object, weight_files

ENCODER = "CLIPTextModel"
INPUT = "encoder_hidden_states"


def encode_prompts(pipeline: Path, prompts: Sequence[str], denoiser: Denoiser) -> dict[str, NDArray[Any]]:
    """The last hidden states of each prompt, and those of the empty prompt for the unconditional branch.

    This is what diffusers' Stable Diffusion 1 and 2 pipelines feed.  Pipelines with other or several encoders are
    refused: their prompts have to be encoded by the pipeline itself.

    Args:
        pipeline: directory with `tokenizer/` and `text_encoder/`.
        prompts: at least one.
        denoiser: what the model takes.

    Returns:
        `encoder_hidden_states` and `negative_encoder_hidden_states`, float32 (prompts, tokens, channels).

    Raises:
        RequestError: another kind of text encoder, or the denoiser takes other arrays.
    """
    names = [array.name for array in denoiser.arrays]
    folder = pipeline / "text_encoder"
    found = f"a denoiser that takes {', '.join(names)}"
    if names == [INPUT]:
        found = _unknown_encoder(pipeline)
    if found:
        raise RequestError(
            f"prompts for {pipeline}", found=found, wanted=f"one {ENCODER} and its tokenizer for {INPUT}",
            cause="quantempo encodes prompts for Stable Diffusion 1 and 2 alone",
            remedy="encode them with the pipeline's encode_prompt and pass the arrays as --calib-set FILE.npz",
        )
    import transformers

    weight_files(folder)  # refuses a pickle in our words
    tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(str(pipeline / "tokenizer"), local_files_only=True)
    encoder: Any = transformers.CLIPTextModel.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
    ).eval()
    states = _encode(tokenizer, encoder, [*prompts, ""])
    return {INPUT: states[:-1].copy(), f"negative_{INPUT}": np.repeat(states[-1:], len(prompts), axis=0)}


def _unknown_encoder(pipeline: Path) -> str:
    """What is wrong with a pipeline's encoder; empty where nothing is."""
    if not (pipeline / "text_encoder" / "config.json").is_file() or not (pipeline / "tokenizer").is_dir():
        return "no text_encoder/ and tokenizer/"
    if (pipeline / "text_encoder_2").is_dir():
        return "two text encoders"
    kinds = read_json_object(pipeline / "text_encoder" / "config.json").get("architectures")
    return "" if kinds == [ENCODER] else f"text_encoder of kind {kinds}"


def _encode(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> NDArray[np.float32]:
    parts = []
    for prompt in prompts:  # one by one: memory does not grow with the list
        tokens = tokenizer(
            [prompt], padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            parts.append(encoder(tokens.input_ids)[0].numpy().astype(np.float32))
    found: NDArray[np.float32] = np.concatenate(parts)
    return found
