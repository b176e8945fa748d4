"""What libraries say while a model is traced: the first line of an error, and no notes."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path


def first_line(error: BaseException) -> str:
    """The first line of a message, cut to a readable length; of the innermost error where one caused another."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No notes of the exporter on the user's terminal; errors still are raised."""
    names = (
        "torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes", "diffusers", "onnx_ir", "onnxscript"
    )  # fmt: skip
    levels = {name: logging.getLogger(name).level for name in names}
    with (
        Path(os.devnull).open("w") as sink, warnings.catch_warnings(), contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
