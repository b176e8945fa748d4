"""quantempo: diffusion models compiled to quantized bundles with activation scales per timestep group.

import quantempo
quantempo.compile("path/to/pipeline", "bundle", quantempo.Recipe())
images = quantempo.load("bundle")(class_labels=[7], num_inference_steps=20, seed=0).images
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from quantempo.pipeline import CompileSummary
    from quantempo.recipe import Recipe
    from quantempo.runtime.session import Session

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "compile", "load"]


def load(
    path: str | Path,
    engine: str = "ort",
    threads: int = 0,
    dialect: str | None = None,
    settings: Mapping[str, str] | None = None,
    cache: bool | str | Path = True,
    feature_cache: str = "auto",
) -> Session:
    """Open a bundle as a pipeline that takes the call arguments of diffusers.

    Args:
        path: bundle directory; every file is verified before anything is opened.
        engine: backend name, e.g. `ort`, or `auto` for the one that is fastest here (measured once, then remembered).
        threads: engine threads; 0 lets the engine choose.
        dialect: which graphs of the bundle; `None` takes what suits the engine.
        settings: engine-specific strings.
        cache: keep what the engine makes of the graphs in the user's cache: `False` for not, or a folder (see
            `quantempo.devices.opening.cache_folder`).
        feature_cache: whether calls reuse features where the bundle has a plan: `auto`, `none`, or `plan` to refuse
            other calls.

    Raises:
        BundleError: the bundle cannot be used.
        MissingExtra: the engine is not installed.
        EngineError: the cache folder is open to others.
    """
    from quantempo.devices.session import open_session

    return open_session(path, engine, threads, dialect, settings, cache, feature_cache)


def compile(model: Any, out: str | Path, recipe: Recipe | None = None, **options: Any) -> CompileSummary:
    """Compile a model to a bundle; see `quantempo.pipeline.compile_model` for the options.

    Args:
        model: a model directory, or a diffusers pipeline (which is saved to a temporary directory first).
        out: the bundle to be.
        recipe: settings.
        options: `scheduler`, `plan_file`, `arrays`, `work`, `overwrite`, `progress`.
    """
    import tempfile
    from pathlib import Path as FilePath

    from quantempo.pipeline import compile_model

    if not hasattr(model, "save_pretrained"):
        return compile_model(model, out, recipe, **options)
    with tempfile.TemporaryDirectory(prefix="quantempo-") as folder:
        model.save_pretrained(folder, safe_serialization=True)
        return compile_model(FilePath(folder), out, recipe, **options)


def __getattr__(name: str) -> Any:
    if name == "Recipe":
        from quantempo.recipe import Recipe

        return Recipe
    raise AttributeError(f"module 'quantempo' has no attribute {name!r}")
