"""The part of peers.py that runs optimum-intel, for an interpreter that has it.

`pipeline MODEL ROWS OUT` does what its documentation says; `hybrid GRAPH ROWS OUT` calls the functions behind that on a
graph which it did not make.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# Its libraries report their use to their vendors unless this cannot be imported.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=["pipeline", "hybrid"])
    parser.add_argument("model", type=Path, help="a pipeline directory, or an ONNX graph")
    parser.add_argument("rows", type=Path, help="calibration rows, an array per input (.npz)")
    parser.add_argument("out", type=Path, help="the OpenVINO model to write (.xml)")
    options = parser.parse_args()
    {"pipeline": pipeline, "hybrid": hybrid}[options.how](options.model, rows_of(options.rows), options.out)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Single rows."""
    import numpy as np

    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    count = len(next(iter(arrays.values())))
    return [{name: values[i : i + 1] for name, values in arrays.items()} for i in range(count)]


def pipeline(model: Path, rows: list[dict[str, Any]], out: Path) -> None:
    """The way of its documentation; the denoiser is what is kept."""
    from optimum.intel import OVDiffusionPipeline, OVQuantizer, OVWeightQuantizationConfig

    made = OVDiffusionPipeline.from_pretrained(str(model), export=True)
    how = OVWeightQuantizationConfig(bits=8, quant_method="hybrid", num_samples=len(rows))
    OVQuantizer.from_pretrained(made).quantize(ov_config=how, calibration_dataset=rows)
    made.save_pretrained(out.with_suffix(""))


def hybrid(graph: Path, rows: list[dict[str, Any]], out: Path) -> None:
    """Hybrid quantization of one OpenVINO model."""
    import nncf
    import openvino
    from optimum.intel import OVWeightQuantizationConfig
    from optimum.intel.openvino import quantization

    model = openvino.Core().read_model(graph)
    asked = OVWeightQuantizationConfig(bits=8, quant_method="hybrid", num_samples=len(rows))
    how = quantization._get_hybrid_mixed_quantization_config(model, asked)
    done = quantization._mixed_quantization(model, how, nncf.Dataset(rows))
    openvino.save_model(done, out, compress_to_fp16=False)


if __name__ == "__main__":
    main()
