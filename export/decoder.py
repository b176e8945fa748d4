"""The VAE decoder as a float graph: `latents` to `image`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantempo.contracts.manifest import Decoder
from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import UnsupportedModel
from quantempo.export.families.base import BATCH
from quantempo.export.source import read_json_object, weight_files
from quantempo.export.trace import (
    TRACE_BATCH,
    Arrays,
    FloatGraph,
    Run,
    export_graph,
    load_component,
    plain_attention,
    verify,
)

LATENTS, IMAGE = "latents", "image"
CLASS_NAME = "AutoencoderKL"
GRAPH = "decoder"
"""The name under which a manifest lists the graph."""


class FlatDecoder(nn.Module):
    """Convolution after quantization (where the model has one), then the decoder."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        # The name is the one that the passes strip from module paths.
        self.denoiser = denoiser

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        vae: Any = self.denoiser
        if getattr(vae, "post_quant_conv", None) is not None:
            latents = vae.post_quant_conv(latents)
        return (vae.decoder(latents),)


def load_vae(vae: Path) -> nn.Module:
    """The autoencoder in a folder, in float32.

    Raises:
        UnsupportedModel: an autoencoder of another class.
    """
    config = read_json_object(vae / "config.json")
    if config.get("_class_name") != CLASS_NAME:
        raise UnsupportedModel(
            str(vae / "config.json"), found=f"class {config.get('_class_name')!r}", wanted=CLASS_NAME,
            cause="quantempo exports no other autoencoder yet",
            remedy="compile a directory without vae/, sample with output_type='latent', and decode elsewhere",
        )
    return load_component(CLASS_NAME, vae, weight_files(vae)[1])


def trace_decoder(vae: Path, work: Path, run: Run, *, sample_shape: tuple[int, ...]) -> tuple[FloatGraph, Decoder]:
    """Trace the decoder of an autoencoder's folder and compare it with torch.

    Args:
        vae: the folder.
        work: folder for `decoder.onnx` and its data file.
        run: an engine.
        sample_shape: (C, h, w) of one sample of latents.

    Returns:
        The graph, `latents` [batch, C, h, w] (scaled and shifted) to `image` [batch, c, H, W] in about [-1, 1], and
        the manifest's description of it.
    """
    module = load_vae(vae)
    graph = trace_decoder_module(module, sample_shape, work)
    verify_decoder(graph, module, run)
    return graph, decoder_contract(module)


def trace_decoder_module(vae: nn.Module, sample_shape: tuple[int, ...], work: Path) -> FloatGraph:
    """Trace the decoder of an autoencoder in memory, without a comparison."""
    plain_attention(vae)
    wrapper: Any = FlatDecoder(vae).eval()
    example = torch.from_numpy(_example(sample_shape, TRACE_BATCH, seed=0))
    with torch.no_grad():
        image = wrapper(example)[0]
    return export_graph(
        wrapper,
        (example,),
        (TensorSpec(LATENTS, "float32", (BATCH, *sample_shape)),),
        (TensorSpec(IMAGE, "float32", (BATCH, *map(int, image.shape[1:]))),),
        work,
        GRAPH,
    )


def decoder_contract(vae: nn.Module) -> Decoder:
    """Scaling and shift of an autoencoder, for the manifest."""
    config: Any = vae.config
    shift = config.get("shift_factor")
    return Decoder(GRAPH, scaling=float(config["scaling_factor"]), shift=0.0 if shift is None else float(shift))


def verify_decoder(graph: FloatGraph, vae: nn.Module, run: Run) -> float:
    """Compare with torch on two input sets; returns the largest relative error.

    Raises:
        ExportError: above 1e-4, or not a number.
    """
    shape = tuple(int(d) for d in graph.inputs[0].shape[1:])
    feeds: list[Arrays] = [{LATENTS: _example(shape, batch, seed=batch)} for batch in (1, 3)]
    return verify(graph, decoder_reference(vae), feeds, run)


def decoder_reference(vae: nn.Module) -> Callable[[Arrays], Arrays]:
    """The decoder as a function of numpy arrays."""
    wrapper: Any = FlatDecoder(vae).eval()

    def reference(feeds: Arrays) -> Arrays:
        with torch.no_grad():
            image: torch.Tensor = wrapper(torch.from_numpy(np.array(feeds[LATENTS])))[0]
        return {IMAGE: image.numpy()}

    return reference


def _example(shape: tuple[int, ...], batch: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((batch, *shape)).astype(np.float32)
