"""Model directories: what is there, what it is, and whether quantempo can use it; decided before any work.

Only local files are read: no network, no remote code, no pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantempo.contracts.codec import canonical_json, parse_json
from quantempo.errors import ModelError, NotAModelDirectory, PickleCheckpoint, UnsupportedModel, nearest
from quantempo.export.classes import is_known
from quantempo.export.families import FAMILIES, class_of
from quantempo.export.sizes import latent_size

DENOISER_FOLDERS = ("transformer", "unet")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONTROL_FOLDERS = ("controlnet", "controlnet_1", "controlnet_2", "controlnet_3")


@dataclass(frozen=True)
class ModelParts:
    """What a user adds to a model directory.

    Args:
        size: of a sample, as `quantempo.export.sizes.latent_size` reads it; empty for the model's own.
        tokens: prompt length; 0 for the model's usual one.
        controlnets: folders of ControlNets that become part of the graph.
        adapters: safetensors files of IP-Adapters that become part of the graph.
        inputs: `.npz` file with an example call, for a class whose inputs do not follow from its signature.
        code: Python file that defines the denoiser's class, for a class that diffusers does not have.
    """

    size: str = ""
    tokens: int = 0
    controlnets: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()
    inputs: Path | None = None
    code: Path | None = None


@dataclass(frozen=True)
class ModelSource:
    """A model directory that was looked through.

    Args:
        name: the directory's name.
        denoiser: folder with `config.json` and the safetensors files.
        class_name: the denoiser's diffusers class.
        config: its parsed `config.json`.
        scheduler: folder with `scheduler_config.json`.
        vae: folder of the autoencoder; `None` where there is none (the latents are the pixels).
        pipeline: class name in `model_index.json`; `None` for a denoiser directory.
        labels: class names by label (a decimal string), from a DiT pipeline's `id2label`.
        tokens: prompt length that the text encoder's configuration names.
        size: latent size of a sample that the user asked for.
        parts: what the user added.
        expert: folder of a second denoiser of the same class, which takes over at small timesteps (Wan 2.2).
        boundary: the share of the training timesteps below which it does.
        variant: file variant of the denoiser's weights (`fp16` in `….fp16.safetensors`).
        digest: SHA-256 over the denoiser's configuration and weight files; not the scheduler, not the VAE.
    """

    name: str
    denoiser: Path
    class_name: str
    config: Mapping[str, Any]
    scheduler: Path
    vae: Path | None
    pipeline: str | None
    digest: str
    labels: Mapping[str, str] = field(default_factory=dict)
    tokens: int | None = None
    variant: str | None = None
    size: tuple[int, ...] | None = None
    parts: ModelParts = ModelParts()
    expert: Path | None = None
    boundary: float | None = None

    def second(self) -> ModelSource:
        """The same model with the second expert in the first one's place."""
        assert self.expert is not None
        files, variant = weight_files(self.expert)
        config = read_json_object(self.expert / "config.json")
        return dataclasses.replace(
            self, denoiser=self.expert, config=config, variant=variant, expert=None, boundary=None,
            digest=_digest(config, (*files, *_added_files(self.parts))),
        )


def open_source(model: Path, scheduler: Path | None = None, parts: ModelParts | None = None) -> ModelSource:
    """Look through a model directory.

    Args:
        model: a pipeline directory (`model_index.json` with `transformer/` or `unet/`), or a denoiser directory
            (`config.json` and `*.safetensors`).
        parts: what the user adds; ControlNets in the pipeline directory are added to it.
        scheduler: folder with `scheduler_config.json`; needed for a denoiser directory, an override otherwise.

    Raises:
        NotAModelDirectory: neither kind of directory, or a part of it is missing.
        PickleCheckpoint: the weights are there only as a pickle.
        UnsupportedModel: nobody defines the denoiser's class.
    """
    model, parts = Path(model), parts or ModelParts()
    _refuse_non_directory(model)
    index: Mapping[str, Any] = {}
    if (model / "model_index.json").is_file():
        index = read_json_object(model / "model_index.json")
        denoiser = _denoiser_folder(model)
        scheduler_folder = _scheduler_folder(scheduler if scheduler is not None else model / "scheduler", model)
    elif (model / "config.json").is_file():
        denoiser = model
        scheduler_folder = _scheduler_folder(scheduler, model)
    else:
        raise _not_a_model(model)
    config = read_json_object(denoiser / "config.json")
    class_name = _class_name(denoiser, config, parts)
    files, variant = weight_files(denoiser)
    if index and not parts.controlnets:
        found = tuple(model / name for name in CONTROL_FOLDERS if (model / name / "config.json").is_file())
        parts = dataclasses.replace(parts, controlnets=found)
    _check_files(parts)
    vae = model / "vae" if index and (model / "vae" / "config.json").is_file() else None
    if vae is not None:
        weight_files(vae)
    return ModelSource(
        name=model.resolve().name,
        denoiser=denoiser,
        class_name=class_name,
        config=config,
        scheduler=scheduler_folder,
        vae=vae,
        pipeline=str(index["_class_name"]) if "_class_name" in index else None,
        digest=_digest(config, (*files, *_added_files(parts))),
        labels=_labels(index),
        tokens=_tokens(model),
        variant=variant,
        size=latent_size(parts.size, class_name, None if vae is None else read_json_object(vae / "config.json")),
        parts=parts,
        **_expert(model, index),
    )


def open_structure(model: Path) -> ModelSource:
    """What the configuration files of a model directory say; no weight is looked at, and no scheduler is needed.

    Returns:
        A source with an empty digest, which is good for `quantempo.export.structure` alone.

    Raises:
        NotAModelDirectory, UnsupportedModel: as `open_source`.
    """
    model = Path(model)
    _refuse_non_directory(model)
    pipeline = (model / "model_index.json").is_file()
    if not pipeline and not (model / "config.json").is_file():
        raise _not_a_model(model)
    index = read_json_object(model / "model_index.json") if pipeline else {}
    denoiser = _denoiser_folder(model) if pipeline else model
    config = read_json_object(denoiser / "config.json")
    class_name = _class_name(denoiser, config, ModelParts())
    return ModelSource(
        name=model.resolve().name, denoiser=denoiser, class_name=class_name, config=config, scheduler=denoiser,
        vae=None, pipeline=None, digest="", labels=_labels(index), tokens=_tokens(model),
    )


def read_json_object(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file of a model directory.

    Raises:
        NotAModelDirectory: the file is missing.
        ModelError: it does not hold an object.
        DataError: it is not JSON.
    """
    if not path.is_file():
        raise NotAModelDirectory(
            str(path), found=f"no such file; {_listing(path.parent)}", wanted=f"{path.name}",
            cause="the directory was copied only in part", remedy="copy the whole model directory again",
        )
    data = parse_json(path.read_bytes(), str(path))
    if not isinstance(data, dict):
        raise ModelError(
            str(path), found=f"JSON of type {type(data).__name__}", wanted="an object",
            cause="the file is not a diffusers configuration", remedy="copy the model directory again",
        )
    return data


def weight_files(folder: Path) -> tuple[tuple[Path, ...], str | None]:
    """The safetensors files of a component folder, sorted by name, and their file variant.

    Files without a variant win over files with one (`….fp16.safetensors`).

    Raises:
        PickleCheckpoint: there are only pickles.
        NotAModelDirectory: there are no weights at all.
    """
    found = sorted(folder.glob("diffusion_pytorch_model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    by_variant: dict[str, list[Path]] = {}
    for path in found:
        words = path.name.removesuffix(".safetensors").split(".")
        by_variant.setdefault(words[1].split("-")[0] if len(words) > 1 else "", []).append(path)
    if by_variant:
        variant = min(by_variant)
        return tuple(by_variant[variant]), variant or None
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise _pickle(folder, ", ".join(pickles))
    raise NotAModelDirectory(
        str(folder), found=f"no weights; {_listing(folder)}", wanted="*.safetensors beside config.json",
        cause="only the configuration was copied, or large files were left as pointers",
        remedy="copy the weights too",
    )


def _refuse_non_directory(model: Path) -> None:
    if model.is_dir():
        return
    if model.is_file():
        if model.suffix in PICKLE_SUFFIXES:
            raise _pickle(model, model.name)
        raise NotAModelDirectory(
            str(model), found="a single file", wanted="a diffusers directory (model_index.json or config.json)",
            cause="this is a single-file checkpoint",
            remedy="load it with the pipeline's from_single_file and write a directory with save_pretrained",
        )
    raise NotAModelDirectory(
        str(model), found="no such directory", wanted="a local diffusers directory (model_index.json or config.json)",
        cause="the path is misspelt, or it is a hub name: quantempo reads local files only",
        remedy="check the path, or download the model first and give its directory",
    )


def _not_a_model(model: Path) -> NotAModelDirectory:
    pickles = sorted(p.name for p in model.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise _pickle(model, ", ".join(pickles))
    return NotAModelDirectory(
        str(model), found=_listing(model),
        wanted="model_index.json (a pipeline) or config.json with *.safetensors (a denoiser)",
        cause="this is another directory, or a parent or child of the model's",
        remedy="give the directory that holds model_index.json",
    )


def _pickle(place: Path, names: str) -> PickleCheckpoint:
    return PickleCheckpoint(
        str(place), found=f"weights only as a pickle ({names})", wanted="safetensors",
        cause="it was saved with safe_serialization=False, or before safetensors; a pickle can run code when loaded",
        remedy="where you trust the file, load it once in diffusers and call "
        "save_pretrained(NEW_DIRECTORY, safe_serialization=True)",
    )


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such directory"
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return "it holds " + (", ".join(names[:8]) + more if names else "nothing")


def _denoiser_folder(model: Path) -> Path:
    for name in DENOISER_FOLDERS:
        if (model / name).is_dir():
            return model / name
    raise NotAModelDirectory(
        str(model), found=f"model_index.json but no denoiser; {_listing(model)}",
        wanted=" or ".join(f"{name}/" for name in DENOISER_FOLDERS),
        cause="the pipeline is not a diffusion pipeline, or its largest folder was not copied",
        remedy="copy the whole pipeline directory",
    )


def _scheduler_folder(scheduler: Path | None, model: Path) -> Path:
    if scheduler is None:
        raise NotAModelDirectory(
            str(model), found="a denoiser directory without a scheduler", wanted="a scheduler directory beside it",
            cause="config.json describes the network alone, not how it is sampled",
            remedy="add --scheduler DIR, where DIR holds scheduler_config.json",
        )
    scheduler = Path(scheduler)
    for folder in (scheduler, scheduler / "scheduler"):
        if (folder / "scheduler_config.json").is_file():
            return folder
    raise NotAModelDirectory(
        str(scheduler), found=_listing(scheduler), wanted="scheduler_config.json",
        cause="the scheduler directory is missing or another one was named",
        remedy="write one with SCHEDULER.save_pretrained(DIR) and add --scheduler DIR",
    )


def _expert(model: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The second expert of a pipeline that has one."""
    boundary, folder = index.get("boundary_ratio"), model / "transformer_2"
    if boundary is None or not (folder / "config.json").is_file():
        return {}
    weight_files(folder)
    return {"expert": folder, "boundary": float(boundary)}


def _check_files(parts: ModelParts) -> None:
    """Refuse what the user names and is not there."""
    for folder in parts.controlnets:
        read_json_object(folder / "config.json")
        weight_files(folder)
    named = [(path, ".safetensors") for path in parts.adapters]
    for path, suffix in [*named, (parts.inputs, ".npz"), (parts.code, ".py")]:
        if path is None or (path.is_file() and path.suffix == suffix):
            continue
        if path.suffix in PICKLE_SUFFIXES:
            raise _pickle(path.parent, path.name)
        raise NotAModelDirectory(
            str(path), found="no such file" if not path.exists() else f"a {path.suffix or 'file without suffix'}",
            wanted=f"a {suffix} file", cause="the path is misspelt", remedy="check the path",
        )


def _added_files(parts: ModelParts) -> tuple[Path, ...]:
    """All files of what the user added, which belong to the model's digest."""
    controls = [path for folder in parts.controlnets for path in (folder / "config.json", *weight_files(folder)[0])]
    return (*controls, *parts.adapters, *(path for path in (parts.inputs, parts.code) if path is not None))


def _class_name(denoiser: Path, config: Mapping[str, Any], parts: ModelParts) -> str:
    name = class_of(config)
    if name is None:
        raise NotAModelDirectory(
            str(denoiser / "config.json"), found="no key '_class_name'", wanted="a diffusers model's configuration",
            cause="this is the configuration of something else, such as a text encoder",
            remedy="give the directory of the transformer or UNet",
        )
    if name not in FAMILIES and parts.code is None and not is_known(name):
        close = nearest(name, FAMILIES)
        raise UnsupportedModel(
            str(denoiser / "config.json"), found=f"class {name!r}, which the installed diffusers does not have",
            wanted="a denoiser of diffusers",
            cause="a slip in '_class_name', a model that is newer than the installed diffusers, or a class of your own",
            remedy=(close + " Or " if close.startswith("did") else "") + "run: pip install --upgrade diffusers; or add "
            "--code FILE.py, the file that defines the class (docs/models.md)",
        )
    return name


def _labels(index: Mapping[str, Any]) -> Mapping[str, str]:
    table = index.get("id2label")
    if not isinstance(table, Mapping):
        return {}
    return {str(key): str(table[key]) for key in sorted(table, key=lambda k: (len(str(k)), str(k)))}


def _tokens(model: Path) -> int | None:
    path = model / "text_encoder" / "config.json"
    length = json.loads(path.read_bytes()).get("max_position_embeddings") if path.is_file() else None
    return length if isinstance(length, int) else None


def component_digest(folder: Path) -> str:
    """SHA-256 over a component's configuration and weight files."""
    return _digest(read_json_object(folder / "config.json"), weight_files(folder)[0])


def _digest(config: Mapping[str, Any], files: tuple[Path, ...]) -> str:
    total = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in ("_diffusers_version", "_name_or_path")}
    total.update(canonical_json(kept).encode())
    for path in files:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
