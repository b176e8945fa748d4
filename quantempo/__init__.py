"""quantempo: diffusion models compiled to quantized bundles with activation scales per timestep group."""

from __future__ import annotations

__version__ = "0.1.0"
