"""First and last steps with float activations: a bundle that follows a step policy."""

from __future__ import annotations

from pathlib import Path

from quantempo.contracts.codec import canonical_json, parse_json
from quantempo.contracts.step_policy import FLOAT_VARIANT, StepPolicy, apply_policy, policy_of, read_policy
from quantempo.devices.rewriting import plan_and_float_graph, quantized_dialects, rewrite_bundle, weights_of
from quantempo.errors import PlanError
from quantempo.runtime.bundle import OpenBundle, read_bundle


def policy_of_model(config: Path) -> StepPolicy:
    """The policy that a checkpoint asks for.

    Args:
        config: the denoiser's `config.json`, or the folder that holds it.

    Raises:
        DataError: no JSON, or a policy that is not understood.
        PlanError: there is none.
    """
    file = config / "config.json" if config.is_dir() else config
    data = parse_json(file.read_bytes(), str(file)) if file.is_file() else None
    policy = read_policy(data, str(file)) if isinstance(data, dict) else None
    if policy is None:
        raise PlanError(
            f"step policy in {file}", found="none" if data is not None else "no such file",
            wanted="quantization_config.runtime.diffusion_step_policy",
            cause="the checkpoint runs every step quantized", remedy="give the numbers with --first and --last",
        )
    return policy


def with_float_steps(source: Path, out: Path, policy: StepPolicy, overwrite: bool = False) -> OpenBundle:
    """A bundle whose programs run the policy's steps with float activations.

    It gains one graph a dialect, of the same INT8 weights: next to nothing on disk.  An engine that opens it unfolds
    these weights to float32, four bytes each in memory, and the steps cost what float steps cost.

    Args:
        source: a quantized bundle with its reference.
        out: the bundle to be.
        policy: an empty one gives a bundle without float steps.
        overwrite: replace an older bundle.

    Raises:
        BundleError: no quantized bundle, or one without its reference.
        PlanError: the bundle follows a policy already.
    """
    from quantempo.export.lower_float import lower_float

    bundle = read_bundle(source)
    if any(entry.variant == FLOAT_VARIANT for entry in bundle.manifest.graphs.values()):
        raise PlanError(
            f"{source}", found="a bundle with float steps", wanted="one without", cause="it was made by this command",
            remedy="start from the bundle that it was made from",
        )
    plan, graph = plan_and_float_graph(bundle)
    dialects = quantized_dialects(bundle)
    weights = weights_of(bundle, plan)
    graphs = {
        f"{FLOAT_VARIANT}.{name}-f32": lower_float(graph, plan.for_graph(f"{name}-f32"), weights, name)
        for name in dialects
    }
    programs = {
        name: canonical_json(apply_policy(bundle.program(int(steps)), policy)).encode()
        for steps, name in bundle.manifest.programs.files.items()
    }
    return rewrite_bundle(bundle, out, {} if policy.empty else graphs, programs, {}, {FLOAT_VARIANT: None}, overwrite)


def bundle_policy(bundle: OpenBundle) -> StepPolicy:
    """The policy that a bundle's programs follow.

    Raises:
        DataError: a program's float steps are not at its ends.
    """
    return policy_of(bundle.program(max(bundle.steps)))
