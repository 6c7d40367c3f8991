"""Name the frozen layers that no pass spoke of: those in no site, not on the rows of the loss, and in no rejection.

A model whose blocks have a form that no matcher looks at would else be told "there was nothing to match". What is said
of a layer is read off the graph: the calls between its output and the next layer, or between the layer before and its
input.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx

from sparse_compile.compiler.runner import PipelineResult
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import nodes_by_name, op_name, tensor_value
from sparse_compile.graph.sites import Projection, Site
from sparse_compile.graph.vocabulary import (
    CASTS,
    COPIES,
    ELEMENTWISE,
    NORMALISATIONS,
    PRODUCTS,
    REDUCTIONS,
    REGROUPINGS,
    SOFTMAXES,
    SPLITS,
    SUMS,
    TRANSPOSES,
)
from sparse_compile.graph.walk import reach
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.read.projections import matrix_operand, read_by

__all__ = ["RULE", "unmatched_layers", "unmatched_of"]

RULE = "unmatched"
_HEAD = "it is the head, no other layer reads its output: all rows are computed where this pass does not apply"
_LAST = "no other layer of this graph reads its output: the graph ends there (a graph break), or it is the head"
_COMPUTED = "its weight is computed in the graph from a stored one: it is not matched as a layer"
_RECURRENCES = re.compile(r"cumsum|cumprod|logcumsumexp|conv|scan|recurr|delta_rule|ssm|wkv")
_BY_ELEMENT = ELEMENTWISE | {"where", "gt", "lt", "ge", "le", "min", "max", "masked_fill"}
_LOSSES = {"cross_entropy", "nll_loss"}
_PRODUCTS = PRODUCTS | {"einsum"}
_ROUTING = ("topk", "sort", "argsort", "one_hot", "bincount", "scatter", "scatter_")
# Calls of which nothing can be learnt: they stand in every block, around every layer.
_PLAIN = {
    *SUMS, *CASTS, *COPIES, *REGROUPINGS, *NORMALISATIONS, *SPLITS, *TRANSPOSES, *REDUCTIONS,
    "mul", "imul", "dropout", "getitem", "size", "expand", "repeat", "repeat_interleave", "pow", "rsqrt", "sqrt", "cat",
    "stack", "neg", "sub", "square", "truediv", "div", "getattr", "index_select", "select_rows", "embedding",
}  # fmt: skip


def unmatched_of(result: PipelineResult, ctx: PassContext) -> tuple[Rejection, ...]:
    """Return what `unmatched_layers` says after a run of the pipeline; nothing where a finder did not run.

    What is reported of a graph must not keep it from being compiled: a failure is a warning, but in strict mode.
    """
    ran = {record.name for record in result.records if not record.skipped} - {each.name for each in result.failed}
    if not ran >= {"find_projections", "find_ffn", "find_attention", "plan_sparsity"}:
        return ()
    try:
        return unmatched_layers(result.canonical.graph, ctx, result.rejections)
    except Exception as error:
        if ctx.env.config.strict:
            raise
        warnings.warn(f"sparselora: layers in no site were not named. {type(error).__name__}: {error}", stacklevel=2)
        return ()


def unmatched_layers(graph: fx.Graph, ctx: PassContext, rejections: Iterable[Rejection]) -> tuple[Rejection, ...]:
    """Return a reason for each frozen layer over tokens that neither a fact nor a rejection speaks of.

    Args:
        graph: the canonical graph.
        ctx: what the passes found in it.
        rejections: what they said.
    """
    finder = _Finder(graph, ctx, tuple(rejections))
    found = {each.node: each for each in finder.find()}
    return tuple(found.values())


@dataclass
class _Finder:
    """Reads the graph around the layers.

    Attributes:
        of_tokens: what depends on an input of the graph that is no stored weight.
        starts: the nodes that read a layer's input, with the layers.
        ends: the outputs of layers.
        learned: what is computed from stored weights alone.
        stream: what is computed from an embedding or a layer.
        softmaxes: what is said of each softmax and of its product with values.
    """

    graph: fx.Graph
    ctx: PassContext
    rejections: tuple[Rejection, ...]
    nodes: dict[str, fx.Node] = field(init=False)
    of_tokens: dict[fx.Node, None] = field(init=False)
    starts: dict[fx.Node, list[Projection]] = field(default_factory=dict)
    learned: dict[fx.Node, None] = field(init=False)
    stream: dict[fx.Node, None] = field(init=False)
    ends: set[fx.Node] = field(init=False)
    softmaxes: dict[fx.Node, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = nodes_by_name(self.graph)
        stored = {*self.ctx.env.parameters, *self.ctx.facts.quantized_weights}
        inputs = [node for node in self.graph.nodes if node.op == "placeholder" and node.name not in stored]
        self.of_tokens = reach(inputs, lambda node: node.users)
        for projection in self.ctx.facts.projections.values():
            for node in read_by(projection, self.nodes) & self.of_tokens.keys():
                self.starts.setdefault(node, []).append(projection)
        learned = (node for node in self.graph.nodes if node.op == "placeholder" and node.name in stored)
        self.learned = reach(learned, lambda node: [each for each in node.users if each not in self.of_tokens])
        self.stream = reach(
            [node for node in self.graph.nodes if op_name(node) == "embedding" or node in self.starts],
            lambda node: node.users,
        )
        self.ends = {self.nodes[each.output] for each in self.ctx.facts.projections.values()}
        self._mark_softmaxes()

    def _mark_softmaxes(self) -> None:
        """Note of each softmax, and of the product of its weights with the values, what is to be said of it."""
        declined = {each.node: each.reason for each in self.rejections if each.rule == "find_attention"}
        projected = reach(self.ends, lambda node: node.users)
        for node in self.graph.nodes:
            if node.name in declined:
                said = f"it is a part of an attention that was declined: {declined[node.name]}"
            elif op_name(node) in SOFTMAXES and node in projected:
                said = self._scores(node, projected)
            else:
                continue
            ahead = reach([node], lambda each: [] if each in self.starts else each.users)
            products = sorted(each for each in ahead if op_name(each) in _PRODUCTS)
            self.softmaxes |= dict.fromkeys([node, *products[:1]], said)

    def _scores(self, softmax: fx.Node, projected: dict[fx.Node, None]) -> str:
        """Say of a softmax that no matcher knows what its scores are made by."""
        behind = reach(
            [softmax],
            lambda node: [each for each in node.all_input_nodes if each in projected and each not in self.ends],
        )
        made = ", ".join(sorted(_telling(behind) - SOFTMAXES)) or "a layer"
        return f"it is a part of a softmax that is not matched as attention over keys: its scores are made by {made}"

    def find(self) -> Iterator[Rejection]:
        """Yield a reason for each layer that nothing speaks of."""
        facts = self.ctx.facts
        sites: tuple[Site, ...] = (*facts.ffn_sites, *facts.attention_sites)
        placed = {projection.base for site in sites for projection in site.projections}
        placed |= facts.loss_rows.nodes if facts.loss_rows is not None else set()
        named = {rejection.node for rejection in self.rejections}
        for projection in facts.projections.values():
            over_tokens = self.nodes[projection.base] in self.of_tokens
            if over_tokens and projection.base not in placed and projection.name not in named:
                reason = self._reason(projection)
                yield Rejection("select_loss_rows" if reason in (_HEAD, _LAST) else RULE, projection.name, reason)
        yield from self._computed(named)

    def _computed(self, named: set[str]) -> Iterator[Rejection]:
        """Name the stored matrices whose products are with something that is computed from them."""
        layers = {projection.weight for projection in self.ctx.facts.projections.values()}
        for node in self.graph.nodes:
            weight = matrix_operand(node)
            if not isinstance(weight, fx.Node) or weight in self.of_tokens or node not in self.of_tokens:
                continue
            for each in reach([weight], lambda node: node.all_input_nodes):
                parameter, value = self.ctx.env.parameters.get(each.name), tensor_value(each)
                if parameter is None or parameter.trained or value is None or value.dim() != 2 or each.name in layers:
                    continue
                name = parameter.path.removesuffix(".weight")
                if name not in named:
                    yield Rejection(RULE, name, _COMPUTED)

    def _reason(self, projection: Projection) -> str:
        """Say why a layer is in no site, by what its output goes through, else by what its input comes from."""
        ahead, reader = self._until_next_layer(projection)
        if reader is None and not _telling(ahead) - _LOSSES - {"slice", "pad", "contiguous"}:
            if _telling(ahead) & _LOSSES:
                return _HEAD
            # What is behind the head is the whole stream, which says nothing of it.
            behind = self._since_last_layer(projection) if self._joins_residual(projection, ahead) else {}
            return self._form(behind, "its input is made by") or _LAST
        for rejection in self.rejections:
            if reader is not None and rejection.rule == "find_ffn" and rejection.node == reader.name:
                return f"it feeds a block that was declined: {rejection.reason}"
        # What only a residual sum and a norm read is the last layer of its block: its input tells what block that is.
        last = not _telling(ahead)
        nodes = self._since_last_layer(projection) if last else ahead
        what = "its input is made by" if last else "its output is read by"
        if form := self._form(nodes, what):
            return form
        if reader is None and not last and not _telling(ahead) & _LOSSES:
            calls = ", ".join(sorted(_telling(ahead)))
            return f"{what} {calls}, but {_LAST}"
        sums = any(op_name(node) in SUMS and len(node.all_input_nodes) > 1 for node in ahead)
        if reader is not None and not _telling(nodes) and not sums:
            what = f"its output is read by another layer, {reader.name}, through"
        return self._fallback(nodes, what)

    def _form(self, nodes: dict[fx.Node, None], what: str) -> str | None:
        """Return what a form is called that no matcher looks for, or None."""
        names = {op_name(node): None for node in nodes}
        if routing := next((name for name in names if name in _ROUTING), None):
            return f"{what} a choice of experts or of tokens ({routing}), which stays dense"
        if softmax := next((self.softmaxes[node] for node in nodes if node in self.softmaxes), None):
            return softmax
        if recurrent := next((name for name in names if _RECURRENCES.search(name)), None):
            return f"{what} a recurrence or a convolution along the tokens ({recurrent}), not by softmax attention"
        if "setitem" in names:
            return f"{what} a tensor that is written place by place (setitem), as in a recurrence that is written out"
        if "autograd_function_apply" in names:
            return (
                f"{what} a function with a gradient of its own (torch.autograd.Function), not known to be elementwise"
            )
        if not _telling(nodes) <= _BY_ELEMENT or not _telling(nodes):
            return None
        if norm := next((name for name in names if name in NORMALISATIONS | REDUCTIONS), None):
            return f"{what} a norm over its channels ({norm}), which takes all of them"
        if any(each in self.learned for node in nodes for each in node.all_input_nodes):
            return f"{what} an elementwise formula with learned parameters, in a form that no feed-forward block has"
        return None

    def _fallback(self, nodes: dict[fx.Node, None], what: str) -> str:
        calls = ", ".join(sorted(_telling(nodes))) or "nothing but sums and norms"
        return f"{what} {calls}: neither a feed-forward block (act(gate) * up -> down) nor softmax attention"

    def _until_next_layer(self, projection: Projection) -> tuple[dict[fx.Node, None], Projection | None]:
        """Return the nodes between a layer and the first one that reads what becomes of its output."""
        start = self.nodes[projection.output]
        met = reach(start.users, lambda node: [] if node in self.starts else node.users)
        readers = [node for node in met if node in self.starts]
        if not readers:
            return {node: None for node in met if node.op != "output"}, None
        first = min(readers)
        back = reach([first], lambda node: [each for each in node.all_input_nodes if each in met])
        # What comes behind the residual sum says nothing of this block.
        before = reach([self.nodes[projection.source]], lambda node: node.all_input_nodes)

        def is_residual(node: fx.Node) -> bool:
            others = [each for each in node.all_input_nodes if each not in met]
            return op_name(node) in SUMS and any(each in before and each in self.stream for each in others)

        near = reach(start.users, lambda node: [] if node in self.starts or is_residual(node) else node.users)
        return {node: None for node in near if node in back and node not in self.starts}, self.starts[first][0]

    def _joins_residual(self, projection: Projection, ahead: dict[fx.Node, None]) -> bool:
        """Return whether a layer's output is added to something that its input was computed from, as a block's is."""
        before = (
            reach([self.nodes[projection.source]], lambda node: node.all_input_nodes).keys() & self.of_tokens.keys()
        )
        return any(op_name(node) in SUMS and not before.isdisjoint(node.all_input_nodes) for node in ahead)

    def _since_last_layer(self, projection: Projection) -> dict[fx.Node, None]:
        """Return the nodes between the layers before and the input of a layer."""
        source = self.nodes[projection.source]
        met = reach([source], lambda node: [] if node in self.ends else node.all_input_nodes)
        return {
            node: None for node in met if node not in self.ends and node in self.of_tokens and node.op != "placeholder"
        }


def _telling(nodes: Iterable[fx.Node]) -> set[str]:
    """Return the names of the calls that say what a block does."""
    return {name for node in nodes if (name := op_name(node)) and name not in _PLAIN}
