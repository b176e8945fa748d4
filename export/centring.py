"""Channel centres: a tensor's channels are shifted per group before it is quantized, at no cost at run time.

A transformer block's normalized input is `x = y · (1 + scale) + shift`, or a LayerNormalization with a bias.  Many of
its channels hardly vary from token to token, but lie off zero, elsewhere at every timestep.  Rounding such a channel
makes the same error in every token and every call, which the sampler adds up.  With a centre `m_g` per channel and
group

    x W + b = (x - m_g) W + (b + m_g W)

is exact.  The subtraction goes into `shift` (one row per sample) or into the norm's bias, the second term into the bias
of the product, looked up per group.  Channels that do not vary become zeros, which integers hold exactly.

A tensor qualifies where nothing but quantized matrix products reads it and where it is such a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantempo.contracts.plan import Decision, Quantize, QuantPlan, Share, Site
from quantempo.errors import PlanError

if TYPE_CHECKING:
    from quantempo.export.lowering import Lowering


def centreable(model: ir.Model, sites: Iterable[Site], decisions: Mapping[str, Decision]) -> tuple[str, ...]:
    """The tensors that can be centred at no cost, sorted by name.

    Args:
        model: float graph in normal form.
        sites: all of its sites.
        decisions: by site id.
    """
    readers: dict[str, list[Site]] = {}
    for site in sites:
        readers.setdefault(site.tensor, []).append(site)
    values = {value.name: value for node in model.graph for value in node.outputs}
    found = []
    for tensor, mine in readers.items():
        value = values.get(tensor)
        settings = {_settings(decisions, site) for site in mine}
        quantized = len(settings) == 1 and None not in settings and all(site.op == "matmul" for site in mine)
        if value is None or not quantized or len(value.uses()) != len(mine) or value.is_graph_output():
            continue
        if _shift(value) is not None:
            found.append(tensor)
    return tuple(sorted(found))


def check_centred(plan: QuantPlan, model: ir.Model, where: str) -> None:
    """Refuse a plan that centres a tensor which does not allow it.

    Raises:
        PlanError: names the first.
    """
    possible = centreable(model, plan.sites, plan.decisions)
    for tensor in plan.centred:
        if tensor not in possible:
            raise PlanError(
                f"{where}: centred", found=f"the tensor {tensor!r}",
                wanted="a sum with a row per sample, or a norm with a bias, that only quantized matrix products read",
                cause="a site that reads it was set to stay in float, or the list was edited",
                remedy="take the tensor off the list `centred`",
            )


def apply_centres(lowering: Lowering) -> None:
    """Let every site of a centred tensor read `NAME.centred` in its place.

    Where the tensor is the result of another quantized product, that product's bias takes the centre off: the addition
    itself is about to become part of the product.
    """
    values = {value.name: value for node in lowering.graph for value in node.outputs}
    results = {p.result: p for p in lowering.places if p.bias is not None and p.site.op == "matmul"}
    for tensor in lowering.plan.centred:
        centre = lowering.tensor_scales(tensor).centre
        value = values[tensor]
        assert centre is not None
        if value in results:
            lowering.moved[results[value].site.output] = centre
            value.name = f"{tensor}.centred"
            continue
        node, index = value.producer(), _shift(value)
        assert node is not None
        assert index is not None
        shift = node.inputs[index]
        assert shift is not None
        if shift.const_value is not None:
            stored = shift.const_value.numpy()
            moved = lowering.lookup(f"{tensor}.shift", (stored.reshape(1, -1) - centre).astype(np.float32))
        else:
            # Not a Sub: OpenVINO takes that for the zero point of a dequantization, and then fails to compile graphs
            # whose attention is quantized ("convert->constant_fold").  Adding the negative is the same to the bit.
            row = lowering.lookup(f"{tensor}.minus_centre", -centre)
            moved = lowering.node(node, "Add", [shift, row], f"{tensor}.shift")
            moved.type, moved.shape = shift.type, shift.shape
        node.replace_input_with(index, moved)
        value.name = f"{tensor}.centred"


def bias_per_group(
    centre: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """`b + m_g W`, `[groups, n]`."""
    moved = centre.astype(np.float64) @ weight.astype(np.float64)
    return moved if bias is None else moved + bias.reshape(-1).astype(np.float64)


def _settings(decisions: Mapping[str, Decision], site: Site) -> Quantize | None:
    decision = decisions[site.id]
    if isinstance(decision, Share):
        decision = decisions[decision.site]
    return decision if isinstance(decision, Quantize) else None


def _shift(value: ir.Value) -> int | None:
    """Which input of a value's producer can take the centre: far smaller than the value, and one number per channel."""
    node, shape = value.producer(), value.shape
    if node is None or shape is None or len(shape) < 2 or not isinstance(shape[-1], int):
        return None
    if node.op_type == "LayerNormalization":
        return 2 if len(node.inputs) > 2 and _is_row(node.inputs[2], shape) else None
    if node.op_type != "Add":
        return None
    rows = [index for index, operand in enumerate(node.inputs) if _is_row(operand, shape)]
    return rows[0] if len(rows) == 1 else None


def _is_row(operand: ir.Value | None, shape: ir.Shape) -> bool:
    """`[…, 1, channels]` or `[channels]`: constant along the axis before the channels."""
    if operand is None or operand.shape is None or len(operand.shape) == 0 or operand.shape[-1] != shape[-1]:
        return False
    if len(operand.shape) == 1:
        return True
    # Of rank 2 the axis before the channels is the batch, so such a tensor has no smaller part.
    return len(operand.shape) == len(shape) and len(shape) > 2 and operand.shape[-2] == 1
