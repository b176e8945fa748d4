"""The exporter's notes: the module path is kept, everything else (file paths among it) goes."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

from quantempo.export.passes.base import GraphPass, Violation
from quantempo.export.passes.edit import MODULE

BATCH_SIZE = re.compile(r"(\d+\*)?(?:s\d+|batch)")
SCOPES = "pkg.torch.onnx.name_scopes"


class KeepModulePaths(GraphPass):
    """No metadata but the module path of each node."""

    def __init__(self, wrapper: str = "denoiser", batch: str = "batch") -> None:
        self._wrapper = wrapper
        self._batch = batch

    def apply(self, model: ir.Model) -> int:
        for node in model.graph:
            path = module_path(node.metadata_props.get(SCOPES, "[]"), self._wrapper)
            node.metadata_props.clear()
            node.metadata_props[MODULE] = path
            node.doc_string = None
            for value in node.outputs:
                self._clean(value)
        for value in [*model.graph.inputs, *model.graph.initializers.values()]:
            self._clean(value)
        model.metadata_props.clear()
        model.graph.metadata_props.clear()
        model.graph.doc_string = None
        model.doc_string = None
        model.producer_name, model.producer_version = "quantempo", None
        return len(model.graph)

    def _clean(self, value: ir.Value) -> None:
        value.metadata_props.clear()
        value.doc_string = None
        if value.shape is None:
            return
        value.shape = ir.Shape([dim if isinstance(dim, int) else self._size(dim.value) for dim in value.shape])

    def _size(self, name: str | None) -> str | None:
        """A size by the batch's name; `None` for one that depends on contents, which the exporter calls u0, u1, ...

        The exporter names the one dynamic dimension by a counter: s0, 2*s77.
        """
        found = BATCH_SIZE.fullmatch(name or "")
        return None if found is None else (found[1] or "") + self._batch

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if set(node.metadata_props) != {MODULE}:
                raise Violation(f"node {node.name!r} with metadata {sorted(node.metadata_props)}")


def module_path(scopes: str, wrapper: str) -> str:
    """The innermost module of an exporter's scope list, without the wrapper's own name.

    The list runs from the outermost module to the torch operation: `['', 'denoiser', 'denoiser.block', 'linear']`.
    """
    names = [str(name) for name in ast.literal_eval(scopes)][:-1]
    path = next((name for name in reversed(names) if name and not name.startswith("_empty_nn_module")), "")
    return "" if path == wrapper else path.removeprefix(wrapper + ".")
