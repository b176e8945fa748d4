"""Denoiser classes that no test names, taken through the commands of docs/models.md as a user would: what each says.

Random weights: the point is how far a class gets and what the messages say, not how well it can be quantized.

    python benchmarks/unknown_classes.py --json docs/unknown_classes.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "own_classes"
FEW = (
    "--samples", "16", "--batch", "8", "--steps", "10", "--guidance", "1.5", "--max-steps", "10", "--weight-method",
    "mse", "--guard", "off", "--threads", "1", "--quiet",
)  # fmt: skip
ROWS, TOKENS = 8, 10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="quantempo-unknown-") as folder:
        place = Path(folder)
        make_models(place)
        make_inputs(place)
        found = {name: attempts(place, name, tries) for name, tries in TRIES.items()}
    for name, trial in found.items():
        for each in trial["attempts"]:
            print(name, each["exit code"], each["says"])
        print(name, trial["report"])
    if options.json:
        options.json.write_text(json.dumps({"classes": found}, indent=1) + "\n")
    return 0 if all(trial["report"] or trial["refused"] for trial in found.values()) else 1


TRIES: Mapping[str, Sequence[Sequence[str]]] = {
    "HandMadeUViT": (
        ("--scheduler", "ddim"),
        ("--scheduler", "ddim", "--code", "uvit.py"),
    ),
    "StyledSD3": (
        ("--scheduler", "flow", "--code", "styled_sd3.py"),
        ("--scheduler", "flow", "--code", "styled_sd3.py", "--inputs", "StyledSD3.npz", "--calib-set", "sd3-set.npz"),
    ),
    "PlainConvNet": (
        ("--scheduler", "ddim", "--code", "convnet.py"),
        ("--scheduler", "ddim", "--code", "convnet.py", "--inputs", "PlainConvNet.npz", "--calib-set", "conv-set.npz"),
    ),
    "WanAnimate2Transformer3DModel": (
        ("--scheduler", "flow", "--size", "3x8x8"),
    ),
}  # fmt: skip
"""What is tried in turn; the messages of one try lead to the next."""
REFUSED = ("WanAnimate2Transformer3DModel",)


def make_models(place: Path) -> None:
    """A folder for each class, as its owner would write it."""
    import diffusers
    import torch
    from safetensors.torch import save_file

    sys.path.insert(0, str(HERE))
    import convnet  # type: ignore[import-not-found]
    import styled_sd3  # type: ignore[import-not-found]
    import uvit  # type: ignore[import-not-found]

    torch.manual_seed(0)
    uvit.HandMadeUViT().save_pretrained(place / "HandMadeUViT")
    styled_sd3.StyledSD3().save_pretrained(place / "StyledSD3")
    (place / "PlainConvNet").mkdir()
    save_file(convnet.PlainConvNet().state_dict(), str(place / "PlainConvNet" / "diffusion_pytorch_model.safetensors"))
    config = {"_class_name": "PlainConvNet", "in_channels": 4, "sample_size": 16, "context_dim": 24}
    (place / "PlainConvNet" / "config.json").write_text(json.dumps(config))
    animate = diffusers.WanAnimate2Transformer3DModel(
        in_dim=12, dim=32, ffn_dim=48, freq_dim=32, text_dim=16, out_dim=4, num_heads=2, num_layers=2, text_len=6
    )
    animate.save_pretrained(place / "WanAnimate2Transformer3DModel")
    diffusers.DDIMScheduler().save_pretrained(place / "ddim")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(place / "flow")


def make_inputs(place: Path) -> None:
    """Example calls and calibration sets."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    times = np.array([300.0, 300.0], np.float32)
    np.savez(
        place / "StyledSD3.npz", hidden_states=normal(2, 4, 16, 16), timestep=times, style=normal(2, 12),
        encoder_hidden_states=normal(2, TOKENS, 24), pooled_projections=normal(2, 20),
    )  # fmt: skip
    np.savez(
        place / "PlainConvNet.npz", x=normal(2, 4, 16, 16), t=times, context=normal(2, TOKENS, 24),
        output_select="noise",
    )  # fmt: skip
    for name, shapes in (
        ("sd3-set", {"encoder_hidden_states": (TOKENS, 24), "pooled_projections": (20,), "style": (12,)}),
        ("conv-set", {"context": (TOKENS, 24)}),
    ):
        arrays = {p + key: normal(ROWS, *shape) for key, shape in shapes.items() for p in ("", "negative_")}
        np.savez(place / f"{name}.npz", **arrays)


def attempts(place: Path, name: str, tries: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Compile in the ways that are tried; where one works, sample and report."""
    made: list[dict[str, Any]] = []
    for flags in tries:
        shown = ("compile", name, *flags, "-o", f"{name}-bundle")
        given = [str(HERE / flag) if flag.endswith(".py") else flag for flag in shown]
        done = run(place, *given, *FEW, "--work", "work")
        made.append({
            "command": " ".join(("quantempo", *shown)), "exit code": done.returncode,
            "says": said(done.stdout if done.returncode == 0 else done.stderr).replace(f"{place}/", ""),
        })  # fmt: skip
    report = None
    if made[-1]["exit code"] == 0:
        set_file = tries[-1][-1] if "--calib-set" in tries[-1] else None
        arrays = ["--inputs", set_file] if set_file else []
        label = [] if set_file else ["--class", "3"]
        check(run(
            place, "sample", f"{name}-bundle", *label, *arrays, "--seed", "0", "--steps", "10", "-o", f"{name}.npy"
        ))  # fmt: skip
        check(run(place, "report", f"{name}-bundle", *arrays, "--samples", "4", "--steps", "10", "--worst", "0"))
        data = json.loads((place / f"{name}-bundle" / "report" / "report.json").read_text())
        report = {"psnr_db": round(data["quality"]["by_guidance"][0]["groups"]["psnr_db"], 2)}
    return {"attempts": made, "report": report, "refused": name in REFUSED and made[-1]["exit code"] != 0}


def run(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A quantempo command in the folder of the models."""
    return subprocess.run(
        [sys.executable, "-m", "quantempo.cli", *words], cwd=place, capture_output=True, text=True, check=False
    )


def check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise SystemExit(f"{done.args}: {done.stderr}")


def said(text: str) -> str:
    """A message without its line breaks."""
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
