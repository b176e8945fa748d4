"""The tools that peers.py runs beside quantempo, each asked as its own documentation says.

A tool gets the float graph of a bundle's reference, rows of the denoiser calls that quantempo itself calibrates on, and
the nodes that quantempo's plan leaves in float, which some variants are told to leave in float too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import nncf_comparison
import numpy as np

Feeds = Mapping[str, np.ndarray]
PRODUCTS = ("Conv", "MatMul", "Gemm")


class ToolFailed(RuntimeError):
    """A tool in a process of its own ended with an error; the message is its last words."""


@dataclass(frozen=True)
class Job:
    """What a tool is given.

    Args:
        model: the directory that diffusers wrote, for tools that start from there; `None` where there is none.
        graph: the float graph, ONNX.
        rows: inputs by name, one batch each.
        keep: outputs of the products that quantempo's plan leaves in float.
        folder: for what the tool writes.
    """

    model: Path | None
    graph: Path
    rows: Sequence[Feeds]
    keep: Sequence[str]
    folder: Path


class Tool(Protocol):
    """A way to quantize a graph; `engine` runs the result."""

    @property
    def label(self) -> str:
        """For tables; also the stem of the file."""

    @property
    def asked(self) -> str:
        """The settings, in words."""

    @property
    def engine(self) -> str:
        """`ort` or `openvino`."""

    def quantize(self, job: Job) -> Path:
        """Make the model.

        Raises:
            Exception: whatever the tool raises.
        """


@dataclass(frozen=True)
class OrtStatic:
    """`onnxruntime.quantization.quantize_static`, for a CPU with VNNI.

    QDQ, U8 activations, S8 weights per channel, no reduced range: what its docstring advises for such CPUs, with the
    option that it names for accuracy.

    Args:
        method: `MinMax`, `Entropy` or `Percentile`.
        products: quantize convolutions and matrix products with weights alone, not everything that it can.
        float_outputs: do not round what a product returns, only what it reads.
        ours: leave in float what quantempo's plan leaves there.
    """

    method: str
    products: bool
    float_outputs: bool = False
    ours: bool = False
    engine: str = "ort"

    @property
    def label(self) -> str:
        words = [f"quantize_static {self.method}", "layers with weights" if self.products else "all operators"]
        words += ["float outputs"] if self.float_outputs else []
        return ", ".join([*words, *(["our float layers"] if self.ours else [])])

    @property
    def asked(self) -> str:
        layers = "op_types_to_quantize=[Conv, MatMul, Gemm], nodes_to_exclude=products without weights"
        scope = layers if self.products else "all supported operators"
        scope += ", OpTypesToExcludeOutputQuantization=[Conv, MatMul, Gemm]" if self.float_outputs else ""
        kept = " and the layers that quantempo keeps" if self.ours else ""
        return (
            f"quant_pre_process (without symbolic shapes where it can't follow them), then quantize_static(QDQ, "
            f"activations QUInt8, weights QInt8, per_channel, {self.method}, {scope}{kept})"
        )

    def quantize(self, job: Job) -> Path:
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared, path = job.folder / "quant_pre_process.onnx", file_of(self, job, ".onnx")
        try:
            quant_pre_process(job.graph, prepared)
        except Exception as error:  # its way to say that it can't follow a shape, for which it has an option
            if "Incomplete symbolic shape inference" not in str(error):
                raise
            # There it looks for weight files where they are not; without symbolic shapes a copy without any serves.
            whole = job.folder / "whole.onnx"
            onnx.save(onnx.load(job.graph), whole)
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        # Its option MatMulConstBOnly, which says just that, does nothing in the QDQ format.
        exclude = [*(products_without_weights(prepared) if self.products else [])]
        exclude += nodes_that_make(prepared, job.keep) if self.ours else []
        quantize_static(
            prepared, path, reader(job.rows), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=False,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=list(PRODUCTS) if self.products else None,
            nodes_to_exclude=exclude,
            calibrate_method=CalibrationMethod[self.method],
            extra_options={
                # Without a stride every tensor of every row is held in memory at once.
                "CalibStridedMinMax": stride(len(job.rows)),
                "OpTypesToExcludeOutputQuantization": list(PRODUCTS) if self.float_outputs else [],
            },
        )
        return path


@dataclass(frozen=True)
class ModelOptOnnx:
    """NVIDIA Model Optimizer's ONNX quantization: its documented command line, in an environment of its own.

    Its graphs follow TensorRT's rules and are meant for it.  Here they run on a CPU engine, so the rest stays float32
    (its default is float16), it calibrates on the CPU, and weights are stored in INT8 (`--dq_only`).
    """

    python: Path
    method: str
    ours: bool = False
    engine: str = "ort"

    @property
    def label(self) -> str:
        return f"modelopt {self.method}" + (", our float layers" if self.ours else "")

    @property
    def asked(self) -> str:
        return " ".join(self._command("GRAPH", "ROWS", "OUT", ["LAYERS"]))

    def _command(self, graph: object, rows: object, out: object, kept: Sequence[str]) -> list[str]:
        words = [
            "python", "-m", "modelopt.onnx.quantization", "--onnx_path", graph, "--quantize_mode", "int8",
            "--calibration_data_path", rows, "--calibration_method", self.method, "--calibration_eps", "cpu",
            "--high_precision_dtype", "fp32", "--dq_only", "--output_path", out,
        ]
        return [str(word) for word in [*words, *(["--nodes_to_exclude", *kept] if self.ours else [])]]

    def quantize(self, job: Job) -> Path:
        rows, path = write_rows(job), file_of(self, job, ".onnx")
        # It takes patterns, which match anywhere in a name.
        kept = [f"^{name}$" for name in nodes_that_make(job.graph, job.keep)]
        run([str(self.python), *self._command(job.graph.resolve(), rows, path, kept)[1:]])
        return path


@dataclass(frozen=True)
class Nncf:
    """NNCF on an OpenVINO model: `nncf_comparison.Asked`, with our float layers left in float if wanted."""

    how: nncf_comparison.Asked
    ours: bool = False
    engine: str = "openvino"

    @property
    def label(self) -> str:
        return self.how.label + (", our float layers" if self.ours else "")

    @property
    def asked(self) -> str:
        model = "ModelType.TRANSFORMER" if self.how.transformer else "None"
        preset = "MIXED" if self.how.mixed else "PERFORMANCE"
        kept = ", ignored_scope=the layers that quantempo keeps" if self.ours else ""
        return f"nncf.quantize(model, Dataset(rows), subset_size=all, model_type={model}, preset={preset}{kept})"

    def quantize(self, job: Job) -> Path:
        keep = tuple(job.keep) if self.ours else ()
        how = nncf_comparison.Asked(self.how.transformer, self.how.mixed, keep)
        return how.quantize(job.graph, job.rows, job.folder)


@dataclass(frozen=True)
class OptimumPipeline:
    """optimum-intel's documented way: `OVDiffusionPipeline.from_pretrained(..., quantization_config=...)`."""

    python: Path
    engine: str = "openvino"
    label: str = "optimum-intel pipeline"
    asked: str = (
        "OVDiffusionPipeline.from_pretrained(model, export=True, "
        "quantization_config=OVWeightQuantizationConfig(bits=8, quant_method='hybrid', dataset=rows))"
    )

    def quantize(self, job: Job) -> Path:
        if job.model is None:
            raise ToolFailed("a pipeline directory is needed, and this model is a denoiser alone")
        path = file_of(self, job, ".xml")
        run([str(self.python), str(OPTIMUM_SCRIPT), "pipeline", str(job.model), str(write_rows(job)), str(path)])
        return path


@dataclass(frozen=True)
class OptimumHybrid:
    """optimum-intel's hybrid quantization, which is what it advises for diffusion models, on our traced graph.

    Its own functions are called on the OpenVINO model: matrix products get INT8 weights and float activations,
    everything else that can be is quantized.
    """

    python: Path
    engine: str = "openvino"
    label: str = "optimum-intel hybrid"
    asked: str = (
        "the functions behind OVWeightQuantizationConfig(bits=8, quant_method='hybrid'), on the traced graph, since "
        "the pipeline class is not known to it"
    )

    def quantize(self, job: Job) -> Path:
        path, graph = file_of(self, job, ".xml"), job.graph.resolve()
        run([str(self.python), str(OPTIMUM_SCRIPT), "hybrid", str(graph), str(write_rows(job)), str(path)])
        return path


OPTIMUM_SCRIPT = Path(__file__).with_name("peer_optimum.py")


def tools(model: str, modelopt: Path | None, optimum: Path | None) -> list[Tool]:
    """Everything that is run on a model of this kind (`dit` or `unet`); without an interpreter a tool is left out."""
    found: list[Tool] = [OrtStatic(method, True) for method in ("MinMax", "Entropy", "Percentile")]
    found += [OrtStatic(method, True, True, ours) for method in ("MinMax", "Percentile") for ours in (False, True)]
    found += [OrtStatic("MinMax", False)]
    if modelopt is not None:
        found += [ModelOptOnnx(modelopt, method) for method in ("entropy", "max")]
        found += [ModelOptOnnx(modelopt, "max", ours=True)]
    found += [Nncf(how) for how in nncf_comparison.ASKED[model]]
    found += [Nncf(nncf_comparison.ASKED[model][0], ours=True)]
    if optimum is not None:
        found += [OptimumPipeline(optimum), OptimumHybrid(optimum)]
    return found


def reader(rows: Sequence[Feeds]) -> Any:
    """ONNX Runtime's calibration reader over the rows."""
    from onnxruntime.quantization import CalibrationDataReader

    class Rows(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(rows)

        def __len__(self) -> int:
            return len(rows)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(rows[start_index:end_index])

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.left, None)
            return None if row is None else dict(row)

    return Rows()


def stride(count: int, most: int = 50) -> int:
    """The largest divisor of a number of rows that is at most `most`."""
    return next(size for size in range(min(most, count), 0, -1) if count % size == 0)


def nodes_that_make(graph: Path, outputs: Sequence[str]) -> list[str]:
    """Names of the products with these outputs; a product that was merged with its bias has a longer name.

    Raises:
        ValueError: the graph does not have them all.
    """
    import onnx

    names = [node.name for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type in PRODUCTS]
    found = {out: [name for name in names if name == out or name.startswith(f"{out}/")] for out in outputs}
    if wrong := sorted(out for out, matches in found.items() if len(matches) != 1):
        raise ValueError(f"{graph.name} has {len(found[wrong[0]])} products {wrong[0]!r}; {len(wrong)} are not clear")
    return [name for matches in found.values() for name in matches]


def products_without_weights(graph: Path) -> list[str]:
    """Names of the products of two activations, which are those inside attention."""
    import onnx

    found = onnx.load(graph, load_external_data=False).graph
    weights = {tensor.name for tensor in found.initializer}
    return [node.name for node in found.node if node.op_type in PRODUCTS and not weights & set(node.input)]


def write_rows(job: Job) -> Path:
    """The calibration rows as one array per input."""
    path = job.folder / "rows.npz"
    if not path.exists():
        arrays: Any = {name: np.concatenate([row[name] for row in job.rows]) for name in job.rows[0]}
        np.savez(path, **arrays)
    return path


def file_of(tool: Tool, job: Job, suffix: str) -> Path:
    """Where a tool's model goes."""
    return job.folder / (tool.label.replace(",", "").replace(" ", "-") + suffix)


def run(command: Sequence[str]) -> None:
    """Run a tool in its own environment.

    Raises:
        ToolFailed: with the last error that it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line] or lines[-1:]
        raise ToolFailed(f"exit code {done.returncode}" + (f": {errors[-1]}" if errors else ""))
