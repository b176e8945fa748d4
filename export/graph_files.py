"""Graphs on disk: ONNX files that share their weight files.

All graphs of a folder refer to the same data files, one per element type: `weights.int8.bin`, `weights.float32.bin`.  A
tensor that several graphs hold, or one graph twice, is stored once.  Tensors under 1 KiB stay inside the ONNX file.
Offsets are multiples of 4096 bytes, as the ONNX format asks of files that are mapped into memory.  Tensors are written
one after another from wherever they lie (numpy memory, a mapped file), never gathered first.  The same graphs give the
same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from quantempo.contracts.tensors import TensorSpec
from quantempo.errors import ExportError, OutputExists

INLINE_BYTES = 1024
ALIGNMENT = 4096
CHUNK_BYTES = 1 << 24
Graph = ir.Model
"""A graph in memory, for code that hands graphs on without looking into them."""
STRIPPED_METADATA = ("pkg.torch.", "pkg.onnxscript.")
"""Prefixes of the exporters' own metadata: it holds source paths of the machine that exported."""


@dataclass(frozen=True)
class GraphFile:
    """One written graph.

    Args:
        file: name of the ONNX file in the folder.
        data: names of the weight files that it refers to, sorted.
    """

    file: str
    data: tuple[str, ...]


def write_graphs(
    folder: Path, graphs: Mapping[str, ir.Model], advance: Callable[[int, int], None] | None = None
) -> dict[str, GraphFile]:
    """Write graphs and the weight files that they share.

    Args:
        folder: exists; none of the files may be there yet.
        graphs: by name, e.g. `full.ort-f32`, which becomes `full.ort-f32.onnx`.  They are left as they are.
        advance: told the number of graphs done and in all.

    Returns:
        What was written, by graph name.

    Raises:
        OutputExists: a file is in the way.
        ExportError: a graph has an initializer without a value.
    """
    with _Files(folder) as files:
        written = {}
        for done, name in enumerate(sorted(graphs), start=1):
            written[name] = _write_graph(files, name, graphs[name])
            if advance is not None:
                advance(done, len(graphs))
        files.commit()
    return written


def load_graph(path: Path) -> Graph:
    """A graph from its file; large weights stay there, mapped, until they are read."""
    return ir.load(path)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie."""

    file: str
    offset: int
    length: int


class _Files:
    """Files under temporary names until `commit`; without it they vanish again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, BinaryIO] = {}
        self._places: dict[tuple[str, bytes], _Place] = {}
        self._by_identity: dict[int, tuple[ir.TensorProtocol, _Place]] = {}
        self._committed = False

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._open.values():
            stream.close()
        if not self._committed:
            for name in self._open:
                with contextlib.suppress(FileNotFoundError):
                    self._partial(name).unlink()

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial"

    def stream(self, name: str) -> BinaryIO:
        """The stream of a file, opened at the first call."""
        if name not in self._open:
            if (self.folder / name).exists():
                raise OutputExists(
                    str(self.folder / name), found="a file", wanted="a free name", cause="an earlier export",
                    remedy="choose another folder, or remove the file",
                )
            self._open[name] = self._partial(name).open("wb")
        return self._open[name]

    def commit(self) -> None:
        """Give all files their names."""
        for name, stream in self._open.items():
            stream.close()
            self._partial(name).rename(self.folder / name)
        self._committed = True

    def store(self, tensor: ir.TensorProtocol) -> _Place:
        """Write a tensor's bytes, unless the same are there already."""
        known = self._by_identity.get(id(tensor))
        if known is not None:
            return known[1]
        kind = tensor.dtype.name.lower()
        name = f"weights.{'float32' if kind == 'float' else kind}.bin"
        stream = self.stream(name)
        start = -(-stream.tell() // ALIGNMENT) * ALIGNMENT
        hasher, length = hashlib.sha256(), 0
        for chunk in _chunks(tensor):
            hasher.update(chunk)
            length += len(chunk)
        place = self._places.get((name, hasher.digest()))
        if place is None:
            stream.write(b"\0" * (start - stream.tell()))
            for chunk in _chunks(tensor):
                stream.write(chunk)
            place = _Place(name, start, length)
            self._places[name, hasher.digest()] = place
        # The tensor is kept so that its id cannot be given to another one.
        self._by_identity[id(tensor)] = (tensor, place)
        return place


def _chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """The bytes of a tensor, little-endian and row-major, in pieces."""
    array = np.ascontiguousarray(tensor.numpy())
    flat: memoryview = array.reshape(-1).view(np.uint8).data
    for start in range(0, len(flat), CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES]


def _write_graph(files: _Files, name: str, model: ir.Model) -> GraphFile:
    copy = model.clone()
    used = set()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise ExportError(
                f"graph {name!r}, initializer {value.name!r}", found="no value", wanted="a tensor",
                cause="the model was traced without its weights", remedy="load the weights before writing",
            )
        if tensor.nbytes < INLINE_BYTES or tensor.dtype == ir.DataType.STRING:
            if isinstance(tensor, ir.ExternalTensor):
                # It lies in another graph's weight file, which does not come along.
                value.const_value = ir.Tensor(tensor.numpy().copy(), name=value.name)
            continue
        place = files.store(tensor)
        used.add(place.file)
        value.const_value = ir.ExternalTensor(
            place.file, place.offset, place.length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "", base_dir=files.folder,
        )
    _strip_metadata(copy)
    proto = ir.to_proto(copy)
    files.stream(f"{name}.onnx").write(proto.SerializeToString(deterministic=True))
    return GraphFile(f"{name}.onnx", tuple(sorted(used)))


def _strip_metadata(model: ir.Model) -> None:
    holders: list[dict[str, str]] = [model.metadata_props, model.graph.metadata_props]
    for node in model.graph.all_nodes():
        node.doc_string = None
        holders.append(node.metadata_props)
        holders.extend(value.metadata_props for value in node.outputs)
    holders.extend(value.metadata_props for value in [*model.graph.inputs, *model.graph.initializers.values()])
    for holder in holders:
        for key in [key for key in holder if key.startswith(STRIPPED_METADATA)]:
            del holder[key]


def specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """The contract of a graph's inputs or outputs."""
    found = []
    for value in values:
        assert value.dtype is not None
        assert value.shape is not None
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        found.append(TensorSpec(str(value.name), str(value.dtype.numpy()), shape))
    return tuple(found)
