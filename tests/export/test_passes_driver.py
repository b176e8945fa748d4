import onnx_ir as ir
import pytest
from support.tiny_graphs import graph_of

from quantempo.errors import ExportError
from quantempo.export.passes import GraphPass, Violation, run_passes

TEXT = "g (float[batch, 4] x) => (float[batch, 4] y) { y = Identity(x) }"


class Counting(GraphPass):
    """Every node is counted."""

    def apply(self, model: ir.Model) -> int:
        return len(model.graph)


class Unfit(Counting):
    """Needs an empty graph."""

    def requires(self, model: ir.Model) -> None:
        raise Violation("a node too many")


class Broken(Counting):
    """Leaves nothing behind.

    More words.
    """

    def ensures(self, model: ir.Model) -> None:
        raise Violation("something left behind")


def test_driver_reports_the_changes_of_each_pass():
    assert run_passes(graph_of(TEXT), [Counting(), Counting()]) == (("Counting", 1), ("Counting", 1))


def test_broken_post_condition_names_the_pass_and_those_before_it():
    with pytest.raises(
        ExportError,
        match=r"pass Broken, post-condition: found something left behind, wanted Leaves nothing(?s:.*)Counting",
    ):
        run_passes(graph_of(TEXT), [Counting(), Broken()])


def test_broken_pre_condition_stops_before_the_pass():
    with pytest.raises(ExportError, match=r"pass Unfit, pre-condition: found a node too many"):
        run_passes(graph_of(TEXT), [Unfit(), Broken()])
