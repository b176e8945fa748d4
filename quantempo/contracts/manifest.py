"""The bundle's table of contents: closed, versioned and deterministic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from quantempo.contracts.partition import Partition
from quantempo.contracts.tensors import TensorSpec

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
FEATURES: frozenset[str] = frozenset(
    {"step-program-1", "scale-groups-1", "corrections-1", "feature-cache-1", "pinned-inputs-1"}
)
"""What this reader knows; a bundle that requires anything else is refused by name."""


@dataclass(frozen=True)
class FileEntry:
    """Digest (SHA-256, hexadecimal) and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class GraphEntry:
    """One graph file.

    Args:
        file: path of the ONNX file in the bundle.
        data: weight files that it refers to.
        variant: `full`, later `reuse.k`, …; what `Call.graph` names.
        dialect: how quantization is written (docs/dialects.md).
        float_type: type of what is not quantized.
        inputs, outputs: the contract that any ONNX runner can rely on.
        reads, writes: the cached features among the inputs and outputs; a feature has one name in all variants.
    """

    file: str
    data: tuple[str, ...]
    variant: str
    dialect: Literal["float", "ort", "portable", "unfold", "fp8"]
    float_type: Literal["float32", "float16", "bfloat16"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassInput:
    """A conditioning input that holds one class label per sample.

    Args:
        count: legal labels are `0 .. count - 1`.
        null: the label of the unconditional branch; `None` where the model has none.
        names: display names by label, where known.
    """

    name: str
    count: int
    null: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ArrayInput:
    """A conditioning input that the caller supplies as an array per sample (prompt embeddings and the like).

    Args:
        shape: per sample, without the batch dimension; a string is a free size.
        guided: whether the unconditional branch takes its own array (`negative_NAME`).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    guided: bool = True


@dataclass(frozen=True)
class PinnedInput:
    """An input whose contents are part of the graphs, since the model's Python branches on them (a mask, a length).

    The graphs do not take it.  A caller may pass it, and is refused where the contents differ.

    Args:
        shape: per sample, without the batch dimension.
        values: the one content, flattened.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Denoiser:
    """How the loop feeds the denoiser graphs.

    Args:
        latents_shape: per sample, without the batch dimension.
        timestep_input: name of the timestep input, float32, one value per row.
        prediction: name of the output.
        classes, arrays: the conditioning inputs.
        group_input: name of the scale-group input; `None` in a float graph.
        max_batch: rows per call that were tried; `None` for no limit.
        pinned: assumptions that the graphs make about inputs.
    """

    latents_shape: tuple[int, ...]
    classes: tuple[ClassInput, ...] = ()
    arrays: tuple[ArrayInput, ...] = ()
    sample_input: str = "sample"
    timestep_input: str = "timestep"
    prediction: str = "prediction"
    group_input: str | None = None
    max_batch: int | None = None
    pinned: tuple[PinnedInput, ...] = ()


@dataclass(frozen=True)
class Decoder:
    """Latents to images: `graph(latents / scaling + shift)`, then `x / 2 + 0.5`, clipped to [0, 1].

    Args:
        graph: key in `Manifest.graphs`; `None` where the latents are the pixels.
    """

    graph: str | None = None
    scaling: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class ProgramIndex:
    """The step programs of the bundle's own scheduler.

    Args:
        scheduler: class name.
        config: digest of the scheduler's configuration.
        files: program file by number of steps (a decimal string).
        scheduler_file: copy of `scheduler_config.json`, from which further programs can be traced.
    """

    scheduler: str
    config: str
    files: Mapping[str, str]
    scheduler_file: str
    default_steps: int = 20


@dataclass(frozen=True)
class CacheIndex:
    """Feature caching across calls: programs whose calls name variants that read and write cached features.

    Args:
        plan: the cache plan that the programs follow, for people and for refitting.
        programs: program file by number of steps (a decimal string), for the bundle's own scheduler; any other step
            count or scheduler runs without caching, with a notice.
    """

    plan: str
    programs: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything a reader needs to know before it opens a file of the bundle.

    Args:
        precision: `int8` or `float32` (a reference bundle).
        graphs: by name; denoiser graphs are named `VARIANT.DIALECT-TYPE`.
        files: every file of the bundle but the manifest itself and sidecars.
        vectors: safetensors file with the per-call vectors of corrections, float32 (rows, channels) by name.
        cache: feature caching, where the bundle has it.
        provenance: what made it: versions, seeds, digests; no times and no paths.
    """

    name: str
    precision: Literal["float32", "int8", "fp8"]
    requires: tuple[str, ...]
    files: Mapping[str, FileEntry]
    graphs: Mapping[str, GraphEntry]
    denoiser: Denoiser
    decoder: Decoder
    programs: ProgramIndex
    partition: Partition | None = None
    tables: str | None = None
    plan: str | None = None
    vectors: str | None = None
    cache: CacheIndex | None = None
    default_guidance: float = 1.0
    provenance: Mapping[str, str] = field(default_factory=dict)
    version: int = MANIFEST_VERSION
