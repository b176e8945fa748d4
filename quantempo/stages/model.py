"""A model's float parts: step programs, denoiser graph, decoder graph; and the plan of what to quantize."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from quantempo.calib.trajectories import ProgramChoice
from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json, to_data
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.manifest import Decoder, Denoiser, PinnedInput
from quantempo.contracts.plan import QuantPlan
from quantempo.contracts.program import StepProgram, check_program
from quantempo.engines.registry import open_engine
from quantempo.engines.targets import target
from quantempo.errors import ExportError, PlanError, RequestError
from quantempo.progress import Advance, counted
from quantempo.recipe import Recipe
from quantempo.stages.calibration import ENGINE, MAPPED, Taps, trajectory_batches
from quantempo.stages.conditioning import resolve
from quantempo.stages.dialects import chosen_graphs, ranged_tensors
from quantempo.stages.programs import by_expert
from quantempo.stages.store import StageResult, StageStore
from quantempo.stages.versions import code, libraries, require_compile_extra

if TYPE_CHECKING:
    from quantempo.export.families import Family
    from quantempo.export.graph_files import Graph
    from quantempo.export.source import ModelSource

FULL, SECOND = "full", "low_noise"
"""Graph variants: the denoiser, and the expert that takes over at small timesteps."""
FACTS, PLAN, TAPS = "facts.json", "plan.json", "taps.json"
EXPORT_CODE = ("quantempo.export", "quantempo.contracts")
EXPORT_LIBRARIES = ("diffusers", "numpy", "onnx", "onnx-ir", "onnxscript", "torch")


@dataclass(frozen=True, eq=False)
class Exported:
    """A model's float parts, before anything is quantized.

    Args:
        name: of the model directory.
        class_name: the denoiser's diffusers class.
        digest: of the denoiser's configuration and weights.
        denoiser, decoder: the manifest's descriptions.
        graph, decoder_graph: their weights stay in files.
        graph_file, graph_digest: the denoiser's file, with `.data` beside it, and SHA-256 over both.
        scheduler, scheduler_digest, scheduler_json: class name, digest of the configuration, its file.
        programs: the file of each step count.
        boundary: the timestep below which a second expert takes over.
        second: that expert, with the same scheduler and programs.
    """

    name: str
    class_name: str
    digest: str
    denoiser: Denoiser
    graph: Graph
    graph_file: Path
    graph_digest: str
    decoder: Decoder
    decoder_graph: Graph | None
    scheduler: str
    scheduler_digest: str
    scheduler_json: bytes
    programs: Mapping[int, Path]
    boundary: float | None = None
    second: Exported | None = None

    def graphs(self) -> Mapping[str, Graph]:
        """The denoiser graphs by variant."""
        return {FULL: self.graph} | ({} if self.second is None else {SECOND: self.second.graph})

    @property
    def identity(self) -> str:
        """The digest of the denoiser graphs."""
        return self.graph_digest if self.second is None else digest(self.graph_digest + self.second.graph_digest)

    def program(self, steps: int) -> StepProgram:
        """The step program of a step count.

        Raises:
            RequestError: the scheduler refused that many steps.
        """
        path = self.programs.get(steps)
        if path is None:
            nearest_count = min(self.programs, key=lambda count: abs(count - steps))
            raise RequestError(
                f"steps of {self.scheduler}", found=str(steps),
                wanted=f"a count between {min(self.programs)} and {max(self.programs)} that it can do",
                cause="the scheduler refuses this number of steps", remedy=f"ask for {nearest_count}",
            )
        program = from_data(StepProgram, parse_json(path.read_bytes(), str(path)), str(path))
        check_program(program, str(path))
        return program


@dataclass(frozen=True, eq=False)
class Opened:
    """A model directory that was looked through, before anything is traced.

    Args:
        source, family: what it is and how it is fed.
        stock: its scheduler.
        recipe: with the labels of the calibration file.
        arrays: conditioning, from the caller or from the calibration file.
    """

    source: ModelSource
    family: Family
    stock: Any
    recipe: Recipe
    arrays: Mapping[str, NDArray[Any]]

    def module(self) -> Any:
        """The torch denoiser."""
        from quantempo.export.trace import load_denoiser

        return load_denoiser(self.source)


def open_model(model: Path, scheduler: Path | None, recipe: Recipe, arrays: Mapping[str, NDArray[Any]]) -> Opened:
    """Look through a model directory and everything that a recipe names.

    Raises:
        QuantempoError: the directory cannot be used, or calibration would be impossible.
    """
    require_compile_extra()
    from quantempo.export.families import family_of
    from quantempo.export.sampler import load_scheduler
    from quantempo.export.source import ModelParts, open_source

    parts = ModelParts(
        recipe.size, recipe.tokens, tuple(map(Path, recipe.controlnets)), tuple(map(Path, recipe.ip_adapters)),
        Path(recipe.inputs) if recipe.inputs else None, Path(recipe.code) if recipe.code else None,
    )
    source = open_source(model, scheduler, parts)
    family = family_of(source)
    # A bundle's recipe names no path of this machine; what the files hold is in the model's digest.
    recipe = dataclasses.replace(recipe, controlnets=(), ip_adapters=(), inputs="", code="")
    recipe = _unguided(recipe, family.denoiser())
    stock = load_scheduler(source.scheduler)
    if recipe.precision != "float32":
        # Refused here rather than after minutes of tracing.
        for folder in recipe.schedulers:
            load_scheduler(Path(folder))
        recipe, arrays = resolve(recipe, family.denoiser(), arrays, _encoder(model, source, family))
        choices = [ProgramChoice(steps, folder) for folder in ("", *recipe.schedulers) for steps in recipe.steps]
        trajectory_batches(family.denoiser(), recipe, choices, arrays)
    return Opened(source, family, stock, recipe, arrays)


def _unguided(recipe: Recipe, denoiser: Denoiser) -> Recipe:
    """The recipe without guidance, where it says nothing and the model has no unconditional branch."""
    if any(c.null is not None for c in denoiser.classes) or any(array.guided for array in denoiser.arrays):
        return recipe
    if recipe.guidance != Recipe().guidance:
        return recipe
    return dataclasses.replace(recipe, guidance=(1.0,), default_guidance=1.0)


def _encoder(
    model: Path, source: ModelSource, family: Family
) -> Callable[[Sequence[str]], Mapping[str, NDArray[Any]]] | None:
    """How prompts become arrays, where the directory is a pipeline."""
    if source.pipeline is None:
        return None

    def encode(prompts: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        from quantempo.export.prompts import encode_prompts

        return encode_prompts(model, [str(prompt) for prompt in prompts], family.denoiser())

    return encode


def export_model(opened: Opened, store: StageStore) -> Exported:
    """Trace what a model directory holds, or take earlier traces."""
    from quantempo.export.graph_files import load_graph
    from quantempo.export.sampler import scheduler_identity

    source, family, recipe = opened.source, opened.family, opened.recipe
    name, identity = scheduler_identity(opened.stock)
    steps = sorted({*range(1, recipe.max_steps + 1), *recipe.steps})
    boundary = boundary_timestep(source, opened.stock)
    programs = _programs(store, opened.stock, (name, identity), steps, boundary)
    denoiser = _denoiser(store, source, family)
    facts = _read(denoiser.path(FACTS))
    decoder, decoder_graph = Decoder(), None
    if source.vae is not None:
        traced = _decoder(store, source.vae, family.sample_shape)
        decoder = from_data(Decoder, _read(traced.path(FACTS)), FACTS)
        decoder_graph = load_graph(traced.path("decoder.onnx"))
    made = Exported(
        name=source.name, class_name=source.class_name, digest=source.digest,
        denoiser=_contract(family, facts),
        graph=load_graph(denoiser.path("denoiser.onnx")), graph_file=denoiser.path("denoiser.onnx"),
        graph_digest=facts["digest"], decoder=decoder, decoder_graph=decoder_graph, scheduler=name,
        scheduler_digest=identity, programs=_files_by_count(programs, steps),
        scheduler_json=(source.scheduler / "scheduler_config.json").read_bytes(), boundary=boundary,
    )
    return made if boundary is None else _with_second(made, store, source, family)


def _with_second(made: Exported, store: StageStore, source: ModelSource, family: Family) -> Exported:
    """The model with its second expert, whose layers are those of the first."""
    from quantempo.export.graph_files import load_graph
    from quantempo.export.sites import find_sites

    second = _denoiser(store, source.second(), family)
    graph = load_graph(second.path("denoiser.onnx"))
    if find_sites(graph) != find_sites(made.graph):
        raise ExportError(
            f"second expert {source.expert}", found="another structure than the first one's", wanted="the same layers",
            cause="the folders belong to different models", remedy="copy the whole pipeline directory again",
        )
    other = dataclasses.replace(
        made, graph=graph, graph_file=second.path("denoiser.onnx"),
        graph_digest=_read(second.path(FACTS))["digest"], boundary=None,
    )
    return dataclasses.replace(made, second=other)


def boundary_timestep(source: ModelSource, stock: Any) -> float | None:
    """The timestep below which the second expert takes over; `None` where there is none."""
    return None if source.boundary is None else source.boundary * float(stock.config.num_train_timesteps)


def _programs(
    store: StageStore, stock: Any, identity: tuple[str, str], steps: list[int], boundary: float | None
) -> StageResult:
    from quantempo.export.sampler import trace_programs

    def make(folder: Path, advance: Advance) -> None:
        for count, traced in trace_programs(stock, counted(steps, advance)).items():
            program = by_expert(traced, boundary)
            (folder / f"{count:04d}.json").write_text(canonical_json(program))

    inputs = {
        "scheduler": list(identity), "step counts": steps, "code": code(*EXPORT_CODE),
        "libraries": libraries("diffusers", "numpy", "torch"),
    }  # fmt: skip
    return store.run("sampler", inputs if boundary is None else {**inputs, "boundary": boundary}, make)


def _files_by_count(programs: StageResult, steps: list[int]) -> dict[int, Path]:
    """The file of each step count; some schedulers refuse a few (PNDM those below 4), which are left out."""
    files = {count: programs.path(f"{count:04d}.json") for count in steps}
    return {count: path for count, path in files.items() if path.is_file()}


def _denoiser(store: StageStore, source: ModelSource, family: Family) -> StageResult:
    from quantempo.export.trace import known_outputs, load_denoiser, trace_module, verify_known

    def make(folder: Path, advance: Advance) -> None:
        module = load_denoiser(source)
        graph = trace_module(module, family, folder)
        known = known_outputs(module, family)
        # Module and engine would each hold all weights; a large model has no room for both.
        del module
        gc.collect()
        verify_known(graph, known, _run_graph)
        pinned = [
            PinnedInput(name, str(array.dtype), array.shape, tuple(map(float, array.flat)))
            for name, array in sorted(graph.pinned.items())
        ]
        (folder / FACTS).write_text(json.dumps({
            "digest": graph.digest, "pinned": to_data(pinned), "batch": graph.inputs[0].shape[0],
        }))

    return store.run("denoiser", {
        "model": source.digest, "inputs": to_data(family.denoiser()), "code": code(*EXPORT_CODE),
        "libraries": libraries(*EXPORT_LIBRARIES),
    }, make)  # fmt: skip


def _contract(family: Family, facts: Mapping[str, Any]) -> Denoiser:
    """The manifest's description of a traced denoiser."""
    found = tuple(from_data(PinnedInput, item, FACTS) for item in facts["pinned"])
    rows = facts["batch"]
    names = {item.name for item in found}
    whole = family.denoiser()
    arrays = tuple(array for array in whole.arrays if array.name not in names)
    return dataclasses.replace(whole, arrays=arrays, pinned=found, max_batch=rows if isinstance(rows, int) else None)


def _decoder(store: StageStore, vae: Path, sample_shape: tuple[int, ...]) -> StageResult:
    from quantempo.export.decoder import trace_decoder
    from quantempo.export.source import component_digest

    def make(folder: Path, advance: Advance) -> None:
        _, decoder = trace_decoder(vae, folder, _run_graph, sample_shape=sample_shape)
        (folder / FACTS).write_text(canonical_json(decoder))

    return store.run("decoder", {
        "model": component_digest(vae), "size of the latents": sample_shape, "code": code(*EXPORT_CODE),
        "libraries": libraries(*EXPORT_LIBRARIES),
    }, make)  # fmt: skip


def _run_graph(path: Path, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    engine = open_engine(ENGINE, path, EngineOptions(settings=MAPPED))
    try:
        return engine.run(feeds)
    finally:
        engine.close()


def _read(path: Path) -> Any:
    return parse_json(path.read_bytes(), str(path))


def plan_stage(
    store: StageStore, exported: Exported, recipe: Recipe, plan_file: Path | None
) -> tuple[QuantPlan, Taps]:
    """The plan, and what calibration has to watch.

    The taps are those of the plan and of the plan that keeps nothing by pattern, and what attention needs where it is
    quantized by default, so that another pattern and other graphs need no other calibration.

    Raises:
        PlanError: a pattern matches nothing, or the given plan does not fit the model.
    """
    from quantempo.export.sites import PlanOptions, default_plan
    from quantempo.export.unfold import DIALECT, kept_when_unfolded

    unfolds = any(name.startswith(f"{DIALECT}-") for name in chosen_graphs(recipe).names)
    given = None if plan_file is None else read_plan(plan_file, exported)
    options = PlanOptions(
        keep=(*recipe.keep, *recipe.exclude), rules=recipe.rules, activation_bits=recipe.activation_bits,
        weight_bits=_weight_bits(recipe), centre=recipe.centre,
    )

    def make(folder: Path, advance: Advance) -> None:
        plan = given or default_plan(exported.graph, exported.graph_digest, options)
        if unfolds and DIALECT not in plan.dialects:
            plan = replace(plan, dialects={**plan.dialects, DIALECT: kept_when_unfolded(exported.graph, plan)})
        more = replace(options, keep=(), rules=tuple(rule for rule in recipe.rules if rule.action == "quantize"))
        everything = default_plan(exported.graph, exported.graph_digest, more)
        (folder / PLAN).write_text(canonical_json(plan))
        (folder / TAPS).write_text(canonical_json(Taps.of(plan, everything)))

    inputs = {"denoiser": exported.graph_digest, "code": code(*EXPORT_CODE, "quantempo.stages.model")}
    if given is not None:
        inputs["plan file"] = digest(canonical_json(given))
    settings = {
        "keep": options.keep, "rules": to_data(options.rules), "activation bits": options.activation_bits,
        "centre": options.centre,
    }
    if unfolds:
        settings["dialects"] = [DIALECT]
    if options.weight_bits != 8:
        settings["weight bits"] = options.weight_bits
    result = store.run("plan", {**inputs, **settings}, make)
    plan = from_data(QuantPlan, _read(result.path(PLAN)), PLAN)
    taps = from_data(Taps, _read(result.path(TAPS)), TAPS)
    return plan, replace(taps, ranges=ranged_tensors(exported.graph, recipe.precision))


def _weight_bits(recipe: Recipe) -> int:
    """8, or what the integer products of all targets take without saturating: 7 for `cpu` on one without VNNI.

    Only a target that was named decides: without one, a bundle is the same on whatever machine it is compiled.
    """
    if recipe.precision == "fp8":
        return 8
    return min((target(name).integers.weight_bits for name in recipe.targets), default=8)


def read_plan(path: Path, exported: Exported) -> QuantPlan:
    """A plan from a file, which may have been edited.

    Raises:
        PlanError: it is for another model, or does not fit it.
        DataError: it is not a plan.
    """
    from quantempo.export.sites import check_plan

    data = _read(path)
    if isinstance(data, dict):
        data.pop("predictions", None)  # written by `quantempo plan` for people
    plan = from_data(QuantPlan, data, str(path))
    if plan.model != exported.graph_digest:
        raise PlanError(
            f"plan {path}", found=f"a plan for the graph {plan.model[:12]}…",
            wanted=f"one for {exported.graph_digest[:12]}…", cause="it was written for another model or version",
            remedy="compile without --plan, then edit the plan.json of that bundle",
        )
    check_plan(plan, exported.graph, f"plan {path}")
    return plan
