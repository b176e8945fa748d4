"""benchmarks/peers.py on the tiny DiT: other models run in our loop, settings do what they say, failures are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from support import tiny_models

from quantempo.contracts.engine import EngineOptions
from quantempo.engines.registry import open_engine
from quantempo.runtime.bundle import OpenBundle, read_bundle
from quantempo.runtime.session import Session

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import peers as module

    yield module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def float_graph(reference: OpenBundle) -> Path:
    return reference.path(reference.manifest.graphs["full.float-f32"].file)


def latents(session: Session) -> np.ndarray:
    return np.asarray(session(class_labels=[1, 2], seed=0, num_inference_steps=4, output_type="latent").latents)


def job(peers: ModuleType, reference: OpenBundle, keep: tuple[str, ...], folder: Path) -> object:
    rng = np.random.default_rng(0)
    rows = [
        {
            "sample": rng.standard_normal((1, 4, 8, 8), np.float32), "timestep": np.float32([rng.uniform(0, 999)]),
            "class_labels": rng.integers(0, 10, 1),
        }
        for _ in range(6)
    ]
    return peers.peer_tools.Job(None, float_graph(reference), rows, keep, folder)


def test_the_diffusers_module_runs_in_our_loop(dit_bundle: OpenBundle, peers: ModuleType) -> None:
    """In float32 it gives what its graph gives; in bfloat16 it does not, so the type is really taken."""
    import diffusers
    import torch

    from quantempo.export.families import family_of
    from quantempo.export.source import open_source

    source = open_source(tiny_models.dit_pipeline())
    reference = read_bundle(dit_bundle.root / "reference")
    entry = reference.manifest.graphs["full.float-f32"]
    with Session(reference, lambda path, given: open_engine("ort", path, given), EngineOptions(threads=1)) as session:
        wanted = latents(session)
    error = {}
    for dtype in (torch.float32, torch.bfloat16):
        module = getattr(diffusers, source.class_name).from_pretrained(source.denoiser, torch_dtype=dtype).eval()
        engine = peers.EagerEngine(family_of(source).wrap(module), dtype, entry.inputs, entry.outputs)

        def opened(path: Path, given: EngineOptions, engine: object = engine) -> object:
            return engine if path.name == Path(entry.file).name else open_engine("ort", path, given)

        with Session(reference, opened, EngineOptions(threads=1)) as session:  # type: ignore[arg-type]
            error[dtype] = float(np.abs(latents(session) - wanted).max())
    assert error[torch.float32] < 1e-4 < error[torch.bfloat16] < 1


def test_quantize_static_runs_in_our_loop_and_keeps_what_it_is_told(
    dit_bundle: OpenBundle, peers: ModuleType, tmp_path: Path
) -> None:
    tools, reference = peers.peer_tools, read_bundle(dit_bundle.root / "reference")
    keep = ("transformer_blocks.0.attn1.to_q/product", "transformer_blocks.0.norm1.linear/product")
    quantized = {}
    for ours in (False, True):
        tool = tools.OrtStatic("MinMax", True, ours)
        made = tool.quantize(job(peers, reference, keep, tmp_path))
        graph = onnx.load(made).graph
        from_q = {out for node in graph.node if node.op_type == "DequantizeLinear" for out in node.output}
        products = {node.name: node.input[0] in from_q for node in graph.node if node.op_type in tools.PRODUCTS}
        quantized[ours] = {name for name, reads in products.items() if reads}
        opener = peers.instead("ort", float_graph(reference), made)
        with Session(reference, opener, EngineOptions(threads=1)) as session:
            assert np.isfinite(latents(session)).all()
        assert 0 < peers.bytes_of(made) < peers.bytes_of(float_graph(reference)) * 1.5
    left = quantized[False] - quantized[True]
    assert len(left) == len(keep)
    assert all(any(name.startswith(kept) for name in left) for kept in keep)
    assert not any("scores" in name or "attn1/" in name for name in quantized[False])  # no attention


def test_a_layer_that_is_not_there_is_an_error(dit_bundle: OpenBundle, peers: ModuleType) -> None:
    graph = float_graph(read_bundle(dit_bundle.root / "reference"))
    with pytest.raises(ValueError, match=r"has 0 products 'nothing/product'"):
        peers.peer_tools.nodes_that_make(graph, ["nothing/product"])


def test_a_failure_is_kept_with_its_words_and_forgotten_once_it_works(peers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    results = peers.Results(path)
    with results.failures("fidelity", "dit", "tool"):
        peers.peer_tools.run([sys.executable, "-c", "raise ValueError('no such\\nmodel')"])
    (words,) = json.loads(path.read_text())["failures"]["fidelity"]["dit"].values()
    assert words == "ToolFailed: exit code 1: ValueError: no such"
    with peers.Results(path).failures("fidelity", "dit", "tool"):
        results = peers.Results(path)
        results.drop("failures", "fidelity", "dit", "tool")
        results.put(1, "fidelity", "dit", "seconds", "tool")
    assert json.loads(path.read_text())["failures"]["fidelity"]["dit"] == {}


@pytest.mark.parametrize(("rows", "size"), [(1000, 50), (300, 50), (7, 7), (101, 1), (1, 1)])
def test_the_rows_are_read_in_equal_parts(peers: ModuleType, rows: int, size: int) -> None:
    assert peers.peer_tools.stride(rows) == size


def test_the_command_that_is_recorded_names_no_place_of_one_machine(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["peers.py", "--work", "/a", "--modelopt", "/b/python", "--json", "/c/docs/peers.json", "--rows", "9"]
    monkeypatch.setattr(sys, "argv", given)
    assert peers.command() == (
        "python benchmarks/peers.py --modelopt MODELOPT_PYTHON --json docs/peers.json --rows 9"
    )
