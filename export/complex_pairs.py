"""Complex tensors as pairs of reals: ONNX has no complex type.

A complex tensor of shape S is held as a real one of shape (*S, 2), real part first, which is how torch stores it; so
`view_as_complex` and `view_as_real` cost nothing, axes count from the front as before, and each operation is the one
that complex arithmetic is made of.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from quantempo.errors import ExportError
from quantempo.export.fx_edit import Builder, aten, settle, value_of

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}


CHECKS = (aten._assert_tensor_metadata.default,)
"""What torch.export adds for its own use; the program computes nothing with it."""


def real_pairs(program: ExportedProgram) -> int:
    """Rewrite every complex value of a program, in place; returns how many operations there were.

    Raises:
        ExportError: an operation on complex numbers that has no rule; names it.
    """
    found = [node for node in program.graph.nodes if _involves_complex(node)]
    if not found:
        return 0
    for node in [each for each in found if each.target in CHECKS]:
        program.graph.erase_node(node)
        found.remove(node)
    pairs: dict[Node, Node] = {}
    for node in found:
        if node.op == "placeholder":
            _store_pair(program, node)
            pairs[node] = node
            continue
        rule = RULES.get(node.target)
        if rule is None:
            raise ExportError(
                f"operation {node.target} in {_module(node)}", found="complex numbers",
                wanted="an operation that has a rule for pairs of reals", cause="ONNX has no complex type",
                remedy="add the rule to quantempo/export/complex_pairs.py, or report the model's class",
            )
        made = rule(Pairs(Builder(node), pairs, node))
        if _is_complex(node.meta["val"]):
            pairs[node] = made
        else:
            node.replace_all_uses_with(made)
    for node in reversed(found):
        if node.op != "placeholder":
            program.graph.erase_node(node)
    settle(program)
    return len(found)


def _is_complex(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_complex(item) for item in value)
    return isinstance(value, torch.Tensor) and value.is_complex()


def _involves_complex(node: Node) -> bool:
    if node.op == "output":
        return False
    return any(_is_complex(each.meta.get("val")) for each in (node, *node.all_input_nodes))


def _module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values())) if path), "the model")


def _store_pair(program: ExportedProgram, node: Node) -> None:
    """Let a stored complex tensor be a pair."""
    spec = next(s for s in program.graph_signature.input_specs if s.arg.name == node.name)
    place: Any = program.state_dict if spec.target in program.state_dict else program.constants
    place[spec.target] = torch.view_as_real(place[spec.target].detach().resolve_conj()).contiguous()
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = torch.empty((*value.shape, 2), dtype=REAL[value.dtype])


class Pairs:
    """One complex operation while it is rewritten.

    Args:
        build: adds nodes before it.
        known: the pair of each complex node so far.
        node: the operation.
    """

    def __init__(self, build: Builder, known: Mapping[Node, Node], node: Node) -> None:
        self.build, self._known, self.node = build, known, node
        schema: Any = getattr(node.target, "_schema", None)
        arguments = schema.arguments if schema is not None else ()
        self.names = [argument.name for argument in arguments]
        self.defaults = {argument.name: argument.default_value for argument in arguments}
        self.given: dict[str, Any] = {
            **self.defaults, **dict(zip(self.names, node.args, strict=False)), **node.kwargs
        }

    def pair(self, argument: Any) -> Any:
        """The pair of an argument; of a real tensor, itself with a second, zero part."""
        if isinstance(argument, (tuple, list)):
            return [self.pair(item) for item in argument]
        if argument in self._known:
            return self._known[argument]
        return self.join(argument, self.build(aten.zeros_like.default, argument))

    def is_complex(self, argument: Any) -> bool:
        """Whether an argument is complex."""
        return isinstance(argument, Node) and argument in self._known

    def parts(self, argument: Any) -> tuple[Any, Any]:
        """Real and imaginary part of an argument, which may be a real tensor or a number."""
        if self.is_complex(argument):
            pair = self._known[argument]
            return self.build(aten.select.int, pair, -1, 0), self.build(aten.select.int, pair, -1, 1)
        if isinstance(argument, complex):
            return argument.real, argument.imag
        return argument, None

    def join(self, real: Any, imaginary: Any) -> Node:
        """A pair from its parts."""
        return self.build(aten.stack.default, [real, imaginary], -1)

    def rank(self) -> int:
        """Rank of the first argument as a complex tensor."""
        first: Any = self.node.args[0]
        value = value_of(first)
        return int(value[0].ndim if isinstance(value, (tuple, list)) else value.ndim)


Rule = Callable[[Pairs], Node]


def _same(p: Pairs) -> Node:
    return p.build(aten.alias.default, p.pair(p.node.args[0]))


def _from_real(p: Pairs) -> Node:
    """`view_as_complex`: the pair is there already."""
    return p.build(aten.alias.default, p.node.args[0])


def _polar(p: Pairs) -> Node:
    size, angle = p.node.args
    parts = (p.build(f, angle) for f in (aten.cos.default, aten.sin.default))
    return p.join(*(p.build(aten.mul.Tensor, size, part) for part in parts))


def _complex(p: Pairs) -> Node:
    return p.join(*p.node.args)


def _mul(p: Pairs) -> Node:
    """(a + bi)(c + di) = (ac - bd) + (ad + bc)i."""
    (a, b), (c, d) = p.parts(p.node.args[0]), p.parts(p.node.args[1])

    def mul(x: Any, y: Any) -> Any:
        return p.build(aten.mul.Tensor, x, y) if isinstance(x, Node) else p.build(aten.mul.Tensor, y, x)

    if b is None:
        return p.join(mul(a, c), mul(a, d))
    if d is None:
        return p.join(mul(a, c), mul(b, c))
    return p.join(p.build(aten.sub.Tensor, mul(a, c), mul(b, d)), p.build(aten.add.Tensor, mul(a, d), mul(b, c)))


def _sum(target: Any) -> Rule:
    def rule(p: Pairs) -> Node:
        (a, b), (c, d) = p.parts(p.node.args[0]), p.parts(p.node.args[1])
        real = p.build(target, a, c)
        if b is None and target is aten.sub.Tensor:
            imaginary = p.build(aten.neg.default, d)
        elif b is None or d is None:
            imaginary = b if d is None else d
        else:
            imaginary = p.build(target, b, d)
        shape = list(value_of(real).shape)
        if list(value_of(imaginary).shape) != shape:
            imaginary = p.build(aten.add.Tensor, imaginary, p.build(aten.zeros_like.default, real))
        return p.join(real, imaginary)

    return rule


def _divide(p: Pairs) -> Node:
    (a, b), (c, d) = p.parts(p.node.args[0]), p.parts(p.node.args[1])
    if d is not None:
        raise NotImplementedError("division by a complex tensor")
    return p.join(p.build(aten.div.Tensor, a, c), p.build(aten.div.Tensor, b, c))


def _real(p: Pairs) -> Node:
    return p.build(aten.alias.default, p.parts(p.node.args[0])[0])


def _imag(p: Pairs) -> Node:
    return p.build(aten.alias.default, p.parts(p.node.args[0])[1])


def _abs(p: Pairs) -> Node:
    a, b = p.parts(p.node.args[0])
    squares = (p.build(aten.mul.Tensor, part, part) for part in (a, b))
    return p.build(aten.sqrt.default, p.build(aten.add.Tensor, *squares))


def _conj(p: Pairs) -> Node:
    a, b = p.parts(p.node.args[0])
    return p.join(a, p.build(aten.neg.default, b))


def _moved(p: Pairs) -> Node:
    """An operation that only moves items about: the same on pairs, with axes counted from the front."""
    rank, given = p.rank(), dict(p.given)
    extra = 1 if p.node.target in (aten.unsqueeze.default, aten.stack.default) else 0
    for name in ("dim", "dim0", "dim1", "start_dim", "end_dim"):
        if isinstance(given.get(name), int):
            given[name] = given[name] % (rank + extra)
    if "dims" in given:
        given["dims"] = [d % rank for d in given["dims"]] + ([rank] if p.node.target is aten.permute.default else [])
    for name in ("size", "repeats", "shape"):
        if name in given:
            given[name] = [*given[name], 1 if name == "repeats" else 2]
    first = p.names[0]
    source = p.pair(given.pop(first))
    changed = {name: item for name, item in given.items() if item != p.defaults[name]}
    return p.build(p.node.target, source, **changed)  # type: ignore[arg-type]


def _made(p: Pairs) -> Node:
    """A new complex tensor of zeros, or of whatever is in memory."""
    options = {name: item for name, item in p.given.items() if item != p.defaults[name] and name != "dtype"}
    size: Any = options.pop("size")
    value = value_of(p.node)
    with value.fake_mode:
        return p.build(p.node.target, [*size, 2], dtype=REAL[value.dtype], **options)  # type: ignore[arg-type]


def _copied(p: Pairs) -> Node:
    """`copy_` into a complex tensor."""
    return p.build(aten.copy_.default, p.pair(p.node.args[0]), p.pair(p.node.args[1]))


def _gather(p: Pairs) -> Node:
    """The same index for both parts."""
    source, dim, index = (p.given[name] for name in ("self", "dim", "index"))
    both = p.build(aten.stack.default, [index, index], -1)
    return p.build(aten.gather.default, p.pair(source), int(dim) % p.rank(), both)


def _item(p: Pairs) -> Node:
    """One of the results of `split` and the like."""
    source, index = p.node.args
    return p.build(operator.getitem, p.pair(source), index)


def _converted(p: Pairs) -> Node:
    """`to` and the like: of a complex tensor to another complex type, or of a real one to complex."""
    source = p.node.args[0]
    wanted = value_of(p.node).dtype
    pair = p.pair(source)
    if wanted not in REAL:
        return p.build(aten.select.int, pair, -1, 0)
    return p.build(aten.to.dtype, pair, REAL[wanted])


def _filled(p: Pairs) -> Node:
    value: Any = 1.0 if p.node.target is aten.ones_like.default else 0.0
    real = p.parts(p.node.args[0])[0]
    return p.join(p.build(aten.full_like.default, real, value), p.build(aten.zeros_like.default, real))


MOVES = (
    "slice.Tensor", "select.int", "unsqueeze.default", "squeeze.dim", "expand.default", "view.default",
    "reshape.default", "_unsafe_view.default", "transpose.int", "permute.default", "flatten.using_ints",
    "repeat.default", "cat.default", "stack.default", "index.Tensor", "index_select.default", "narrow.default",
    "split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default", "unbind.int", "clone.default",
    "contiguous.default", "detach.default", "detach_.default", "alias.default", "roll.default",
    "repeat_interleave.self_int", "pad_sequence.default",
)  # fmt: skip
RULES: dict[Any, Rule] = {
    aten.view_as_complex.default: _from_real,
    aten.view_as_real.default: _same,
    aten._conj.default: _conj,
    aten.conj.default: _conj,
    aten.polar.default: _polar,
    aten.complex.default: _complex,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.add.Tensor: _sum(aten.add.Tensor),
    aten.sub.Tensor: _sum(aten.sub.Tensor),
    aten.div.Tensor: _divide,
    aten.real.default: _real,
    aten.imag.default: _imag,
    aten.abs.default: _abs,
    aten.to.dtype: _converted,
    aten.to.dtype_layout: _converted,
    aten._to_copy.default: _converted,
    aten.ones_like.default: _filled,
    aten.zeros_like.default: _filled,
    aten.lift_fresh_copy.default: _same,
    aten.zeros.default: _made,
    aten.empty.memory_format: _made,
    aten.copy_.default: _copied,
    aten.gather.default: _gather,
    operator.getitem: _item,
}
for _name in MOVES:
    _op, _, _overload = _name.partition(".")
    if hasattr(aten, _op) and hasattr(getattr(aten, _op), _overload):
        RULES[getattr(getattr(aten, _op), _overload)] = _moved
