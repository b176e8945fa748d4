"""How close a quantized model's images are to the float model's, and whether they still are what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantempo.contracts.manifest import Manifest

Images = NDArray[np.float32]
"""Images of shape (count, height, width, channels) in [0, 1]."""

PSNR_CEILING_DB = 120.0
"""Identical images have no finite PSNR; they count as this much, which float32 arithmetic does not reach otherwise."""


LATENT_PEAK = 4.0
"""Latents are compared as if they went from minus this to this: those of trained models have a variance of about 1."""


def makes_pictures(manifest: Manifest) -> bool:
    """Whether samples of a bundle are pictures; a denoiser alone makes latents, unless they have colour channels."""
    shape = manifest.denoiser.latents_shape
    return manifest.decoder.graph is not None or (len(shape) == 3 and shape[0] in (1, 3))


def draw(session: Callable[..., Any], manifest: Manifest, **request: Any) -> Images:
    """Samples of a session as images.

    Args:
        session: a `quantempo.runtime.session.Session`.
        manifest: of its bundle.
        request: its arguments, but for `output_type`.
    """
    kind = "np" if makes_pictures(manifest) else "latent"
    values: Images = np.asarray(session(**request, output_type=kind).images, np.float32)
    return values if kind == "np" else latent_images(values)


def latent_images(latents: NDArray[np.float32]) -> Images:
    """Latents (count, channels, …, height, width) as images, from `-LATENT_PEAK` to `LATENT_PEAK`; frames one below
    another, and tensors of fewer axes as one channel.
    """  # fmt: skip
    count, axes = len(latents), latents.ndim - 1
    if axes >= 3:
        flat = latents.reshape(count, latents.shape[1], -1, latents.shape[-1]).transpose(0, 2, 3, 1)
    else:
        flat = latents.reshape(count, -1, latents.shape[-1], 1)
    images: Images = np.clip(flat / np.float32(2 * LATENT_PEAK) + np.float32(0.5), 0, 1)
    return images


def psnr_db(images: Images, reference: Images) -> NDArray[np.float64]:
    """Per-image peak signal-to-noise ratio in dB, shape (count,); peak 1.0, images clipped to [0, 1]."""
    difference = np.clip(images, 0, 1).astype(np.float64) - np.clip(reference, 0, 1).astype(np.float64)
    error = np.mean(difference.reshape(len(difference), -1) ** 2, axis=1)
    result: NDArray[np.float64] = np.minimum(-10 * np.log10(np.maximum(error, 1e-30)), PSNR_CEILING_DB)
    return result


def sqnr_db(values: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Signal-to-quantization-noise ratio in dB: reference power over the power of the difference."""
    signal = float(np.sum(reference.astype(np.float64) ** 2))
    noise = float(np.sum((values.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return PSNR_CEILING_DB if noise == 0 else 10 * float(np.log10(signal / noise))


def ssim(images: Images, reference: Images) -> NDArray[np.float64]:
    """Per-image structural similarity, shape (count,).

    Gaussian window of standard deviation 1.5, constants 0.01 and 0.03 (Wang et al. 2004, "Image quality assessment:
    from error visibility to structural similarity", section III).
    """
    from scipy.ndimage import gaussian_filter

    def blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = gaussian_filter(values, sigma=(0, 1.5, 1.5, 0), truncate=3.5)
        return out

    x, y = np.clip(images, 0, 1).astype(np.float64), np.clip(reference, 0, 1).astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    index = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    result: NDArray[np.float64] = index.mean(axis=(1, 2, 3))
    return result


def frechet_distance(features: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features, shape (count, size).

    `|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)` (Heusel et al. 2017, equation 6); the trace of the root is the sum of the
    square roots of the eigenvalues of `C1^½ C2 C1^½`, which is symmetric.
    """
    first, second = features.astype(np.float64), reference.astype(np.float64)
    mean_gap = first.mean(axis=0) - second.mean(axis=0)
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    return float(mean_gap @ mean_gap + np.trace(cov1) + np.trace(cov2) - 2 * cross)


@dataclass(frozen=True)
class Judgement:
    """What the judge says of a set of images: the class of each, shape (count,), and its features."""

    classes: NDArray[np.int64]
    features: NDArray[np.float32]

    def accuracy(self, labels: NDArray[np.int64]) -> float:
        """Share of images that show the class that was asked for."""
        return float(np.mean(self.classes == labels))


class Judge:
    """A digit classifier of (count, 1, 16, 16) images with outputs `logits` and `features`."""

    SIZE = 16

    def __init__(self, run: Callable[[Mapping[str, NDArray[np.float32]]], Mapping[str, NDArray[np.float32]]]) -> None:
        self._run = run

    def __call__(self, images: Images) -> Judgement:
        """Judge grey images of any multiple of 16 pixels; larger ones are averaged down."""
        count, height, width, _ = images.shape
        step_y, step_x = height // self.SIZE, width // self.SIZE
        grey = images.mean(axis=3).reshape(count, self.SIZE, step_y, self.SIZE, step_x).mean(axis=(2, 4))
        out = self._run({"images": np.ascontiguousarray(grey[:, None], np.float32)})
        return Judgement(out["logits"].argmax(axis=1), out["features"])
