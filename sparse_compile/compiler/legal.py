"""The legal graph of each stage: one table of rules, read from top to bottom.

A rule holds from its stage on. The verifier checks it after every pass (`verify.py`), a broken graph for each stands in
the tests, and `passes/README.md` shows the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

import sparse_compile.kernels  # noqa: F401  (registers torch.ops.sparselora)
from sparse_compile.graph.read import argument, calls_torch, nodes_by_name, op_name, stored_matrix, tensor_value
from sparse_compile.graph.vocabulary import LINEAR, MATMULS, TAG
from sparse_compile.graph.walk import reach
from sparse_compile.kernels.tables import PROVIDERS
from sparse_compile.passes.context import Facts, PassContext
from sparse_compile.torch_private.fx import flattened

__all__ = ["RULES", "STAGES", "Checked", "Rule"]

STAGES: Final = (
    "captured", "canonical", "projections", "ffn", "attention", "roles", "plan", "predictors", "sparse", "lowered",
)  # fmt: skip
"""What the graph and its facts have gone through, in the order in which a full run reaches it."""

_OPS = torch.ops.sparselora
_SPLITS: Final = (_OPS.split_tokens.default, _OPS.token_slots.default)
_GATHERED: Final = (_OPS.gathered_linear.default, _OPS.gathered_input_linear.default)
_NEVER_AGAIN: Final[Mapping[Any, str]] = {
    _OPS.top_channels.default: "a near tie would choose other channels",
    _OPS.given_output_mask.default: "the roles may have closed by then",
    _OPS.split_tokens.default: "each split is a host synchronisation",
    _OPS.token_slots.default: "the roles may have closed by then",
}
"""Ops whose result is saved for the backward, with what would happen if it were computed again."""


@dataclass(frozen=True)
class Checked:
    """What rules look at.

    Attributes:
        gm: the graph after a pass.
        captured: the graph as it was captured.
        stages: the stages reached.
        ctx: environment and facts.
    """

    gm: fx.GraphModule
    captured: fx.GraphModule
    stages: Set[str]
    ctx: PassContext

    @property
    def facts(self) -> Facts:
        """The facts found so far."""
        return self.ctx.facts

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The nodes of the graph by name."""
        return nodes_by_name(self.gm.graph)

    def calls(self, *targets: object) -> list[fx.Node]:
        """Return the calls of some ops, in order."""
        return [node for node in self.gm.graph.nodes if node.op == "call_function" and node.target in targets]


@dataclass(frozen=True)
class Rule:
    """One rule of the legal graph.

    Attributes:
        stage: the stage from which on it holds.
        holds: what holds, as a sentence.
        faults: yields what is wrong with a graph, naming the node.
    """

    stage: str
    holds: str
    faults: Callable[[Checked], Iterator[str]]


def _interface(checked: Checked) -> Iterator[str]:
    before, after = (
        [node.name for node in module.graph.nodes if node.op == "placeholder"]
        for module in (checked.captured, checked.gm)
    )
    if before != after:
        yield f"the inputs changed: {set(before) ^ set(after) or 'their order'}"
    loss_rows = checked.facts.loss_rows
    added = len({output.rows for output in loss_rows.outputs}) if loss_rows else 0
    returned: Any = checked.gm.graph.output_node().args[0]
    if added:
        assert isinstance(returned, tuple | list), "positions of rows are added to several outputs"
        returned = returned[:-added]
    structures = [flattened(each)[1] for each in (checked.captured.graph.output_node().args[0], returned)]
    if structures[0] != structures[1]:
        yield f"the outputs changed from {structures[0]} to {structures[1]}"


def _tags(checked: Checked) -> Iterator[str]:
    known = {node.name for node in checked.captured.graph.nodes}
    for node in checked.gm.graph.nodes:
        if node.name not in known and "ac_graph_id" not in node.meta and TAG not in node.meta:
            yield f"{node.name} was inserted without a tag: use Rewriter"


def _saved(checked: Checked) -> Iterator[str]:
    for node in checked.calls(*_NEVER_AGAIN):
        if node.meta.get("recompute") is not CheckpointPolicy.MUST_SAVE:
            yield f"{node.name} could be recomputed: {_NEVER_AGAIN[node.target]}"


def _one_split(checked: Checked) -> Iterator[str]:
    if len(checked.calls(*_SPLITS)) > 1:
        yield "tokens are split by role more than once: each split is a host synchronisation"


def _nothing_chosen_early(checked: Checked) -> Iterator[str]:
    if "predictors" not in checked.stages:
        for node in checked.calls(_OPS.top_channels.default, *_SPLITS, *_GATHERED):
            yield f"{node.name} stands in a graph without predictors"


def _spelling(checked: Checked) -> Iterator[str]:
    for node in checked.gm.graph.nodes:
        if not calls_torch(node) or op_name(node) not in MATMULS:
            continue
        x, weight = tensor_value(argument(node, "input")), argument(node, "other")
        value = tensor_value(weight)
        if x is not None and x.dim() < 2:
            continue  # a vector has no tokens
        is_parameter = isinstance(weight, fx.Node) and weight.name in checked.ctx.env.parameters
        if is_parameter and value is not None and value.dim() == 2:
            yield f"{node.name} multiplies with the parameter {weight} and is no linear"


def _frozen_layers(checked: Checked) -> Iterator[str]:
    for projection in checked.facts.projections.values():
        parameter = checked.ctx.env.parameters.get(projection.weight)
        if parameter is None and projection.weight not in checked.facts.quantized_weights:
            yield f"the weight of {projection.name} is neither a parameter nor dequantised"
        elif parameter is not None and parameter.trained:
            yield f"{projection.name} is no frozen layer: {parameter.path} is trained"
        base = checked.nodes.get(projection.base)
        if base is not None and base.target is LINEAR:
            stored, _ = stored_matrix(argument(base, "weight"))
            # What was cast is known by its name, what was dequantised by the call.
            if stored.name != projection.weight and argument(base, "weight").name != projection.weight:
                yield f"{base.name} multiplies with {stored.name}, not with the weight of {projection.name}"


def _known_layers(checked: Checked, kind: str) -> Iterator[str]:
    for site in checked.facts.sites:
        for projection in site.projections if site.kind == kind else ():
            if projection.base not in checked.facts.projections:
                yield f"{site.name} holds {projection.name}, which is no frozen layer of the graph"


def _ffn_sites(checked: Checked) -> Iterator[str]:
    yield from _known_layers(checked, "ffn")
    for site in checked.facts.ffn_sites:
        widths = {projection.out_features for projection in site.inputs}
        if widths != {site.output.in_features}:
            yield f"{site.name}: in-projections of width {sorted(widths)} feed {site.output.in_features} channels"


def _attention_sites(checked: Checked) -> Iterator[str]:
    yield from _known_layers(checked, "attention")
    for site in checked.facts.attention_sites:
        heads = site.kv_heads * site.groups
        wanted = {
            "query": (site.query.out_features, heads * site.head_dim),
            "key": (site.key.out_features, site.kv_heads * site.head_dim),
            "value": (site.value.out_features, site.kv_heads * site.value_head_dim),
            "output": (site.output.in_features, heads * site.value_head_dim),
        }
        for name, (width, channels) in wanted.items():
            if width != channels:
                yield f"{site.name}: the {name} projection has {width} channels, its heads have {channels}"


def _role_sources(checked: Checked) -> Iterator[str]:
    roles = checked.facts.roles
    if roles is None or "predictors" in checked.stages:
        return  # once they are read, what they were read from may go
    for name in (*(label for label, _ in roles.labels), *([roles.padding] if roles.padding else [])):
        value = tensor_value(checked.nodes.get(name))
        if value is None or value.is_floating_point():
            yield f"roles are read from {name}, which holds no integers of the graph"


def _decisions(checked: Checked) -> Iterator[str]:
    known = {site.identity for site in checked.facts.sites}
    for plan in checked.facts.plan.sites:
        if plan.site.identity not in known:
            yield f"the plan names {plan.site.name}, which is no site of the graph"
        if not (0 if plan.mapped or plan.left else 1) <= plan.kept <= plan.total:
            yield f"the plan keeps {plan.kept} of {plan.total} channels of {plan.site.name}"
        if plan.mapped and plan.site.identity not in checked.facts.surrogates:
            yield f"{plan.site.name} is to have a map, and there is none"
        if plan.split and checked.facts.roles is None:
            yield f"{plan.site.name} is to be sparse, and nothing tells context tokens from output tokens"
        if plan.predicted and checked.ctx.env.config.channel_selection == "svd":
            for projection in plan.site.predicted:
                if projection.name not in checked.facts.factors:
                    yield f"{plan.site.name} is to be sparse, and {projection.name} has no factors"


def _choices(checked: Checked) -> Iterator[str]:
    for plan in checked.facts.plan.predicted_sites:
        for name in checked.facts.selections.get(plan.site.identity, ()):
            node = checked.nodes.get(name)
            if node is None or node.target is not _OPS.top_channels.default:
                yield f"the choice {name} of {plan.site.name} is no top_channels"
            elif op_name(node.args[0]) != "detach":  # type: ignore[arg-type]
                yield f"{name} ranks a score that a gradient could reach"
        if plan.site.identity not in checked.facts.selections:
            yield f"{plan.site.name} is to be sparse, and nothing chooses its channels"


def _rows(checked: Checked) -> Iterator[str]:
    rows = {user for split in checked.calls(*_SPLITS) for user in split.users}
    for node in checked.calls(_OPS.take_rows.default, _OPS.put_rows.default):
        if not {argument(node, name) for name in ("output_rows", "context_rows")} <= rows:
            yield f"{node.name} does not use the rows of the one split"


def _gathers(checked: Checked) -> Iterator[str]:
    for node in checked.calls(*_GATHERED):
        met = reach([argument(node, "channels")], lambda each: each.all_input_nodes)
        if not any(each.target is _OPS.top_channels.default for each in met):
            yield f"{node.name} gathers channels that no predictor chose"


def _providers(checked: Checked) -> Iterator[str]:
    for node in checked.calls(*PROVIDERS):
        provider = argument(node, "provider")
        if provider is None:
            yield f"{node.name} has no provider"
        elif provider not in PROVIDERS[node.target].names:
            yield f"{node.name} names the provider {provider!r}, which its op does not have"


RULES: Final = (
    Rule("captured", "Inputs and the structure of outputs stay; rows of the loss add their positions.", _interface),
    Rule("captured", "Each inserted node names the pass it comes from.", _tags),
    Rule("captured", "Choices of channels, roles and splits are saved for the backward.", _saved),
    Rule("captured", "Tokens are split by role at most once.", _one_split),
    Rule("captured", "Before `predictors`, no node chooses channels, splits tokens or gathers.", _nothing_chosen_early),
    Rule("canonical", "A product with a parameter is `linear`; no matmul has one as its second operand.", _spelling),
    Rule("projections", "Each projection is a `linear` with a weight that is not trained.", _frozen_layers),
    Rule("ffn", "A feed-forward site holds projections, whose widths meet in the intermediate.", _ffn_sites),
    Rule("attention", "An attention site holds projections, whose widths are those of the heads.", _attention_sites),
    Rule("roles", "Labels and padding are tensors of the graph, and no floating-point ones.", _role_sources),
    Rule(
        "plan", "A sparse site is a matched site, has roles, and factors and a channel or more, or a map.", _decisions
    ),
    Rule("predictors", "Each site without a map has its choices, `top_channels` of a detached score.", _choices),
    Rule("sparse", "`take_rows` and `put_rows` use the rows of the one split.", _rows),
    Rule("sparse", "Gathered products use channels that come from a `top_channels`.", _gathers),
    Rule("lowered", "Each op that has providers names one of them.", _providers),
)
"""All rules, in the order of the stages."""
