"""The facts that analyses find and transforms act on: frozen, printable, and free of graph objects.

A field of type `NodeName` is the name of a node of the captured graph. Names, unlike nodes, survive a copy of the
graph, so a transform may work on a copy that is thrown away when it fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy
from torch import SymInt

from sparse_compile.graph.sites import (
    NodeName,
    Projection,
    Site,
)


@dataclass(frozen=True)
class TokenRoles:
    """Where the roles of the tokens come from.

    Attributes:
        origin: `"cross_entropy"` (the loss is in the graph), `"labels"` (labels that the graph compares with
            `ignore_index`), `"given"` (`token_roles(...)`).
        labels: for the first two, pairs of a node that holds (B, S) labels and the shift: 1 where position t predicts
            `labels[:, t + 1]`, else 0.
        ignore_index: the label that the loss ignores.
        padding: placeholder of the (B, S) attention mask whose zeros mark padding, or None.
        loss: the cross-entropy nodes the labels were traced from.
    """

    origin: Literal["cross_entropy", "labels", "given"]
    labels: tuple[tuple[NodeName, int], ...]
    ignore_index: int
    padding: NodeName | None
    loss: tuple[NodeName, ...] = ()


@dataclass(frozen=True)
class TokenSlots:
    """The fixed numbers of rows that tokens are computed in.

    Attributes:
        capacity: slots for output tokens, and for rows of the loss.
        bucket: the multiple that the number of output tokens was rounded up to; None for a capacity of the user's.
    """

    capacity: int
    bucket: int | None

    @property
    def option(self) -> str:
        """The option that asks for it."""
        return "token_capacity" if self.bucket is None else "token_bucket"

    def among(self, rows: int | SymInt) -> int:
        """Return the slots for some of so many rows: no more than there are rows, where that number is fixed."""
        return min(self.capacity, rows) if isinstance(rows, int) else self.capacity


@dataclass(frozen=True)
class SitePlan:
    """What is to be done with one site.

    Attributes:
        site: the site.
        sparsity: fraction of channels not computed for context tokens; 0 where the site stays dense.
        kept: channels kept.
        total: channels to choose from.
        reason: why the site stays dense, or a note; empty otherwise.
        mapped: whether the site has an affine map. It stands in the place of a whole feed-forward block, for context
            tokens, and keeps no channel; that of an attention block adds to the stream of the exit.
        online: whether that map is fitted in the run, so that what it is to read and to return is handed on.
        left: whether context tokens have left the residual stream before this site. Of a feed-forward block nothing is
            computed for them. An attention block reads them as keys and values; its map adds to the stream of the exit.
        without_context: base nodes of projections that no context token runs through any more: they stay as they are.
    """

    site: Site
    sparsity: float
    kept: int
    total: int
    reason: str = ""
    mapped: bool = False
    online: bool = False
    left: bool = False
    without_context: tuple[NodeName, ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether the site is rewritten."""
        return self.kept < self.total

    @property
    def predicted(self) -> bool:
        """Whether its channels are chosen for each batch."""
        return self.sparse and not self.mapped and not self.left

    @property
    def split(self) -> bool:
        """Whether it tells output tokens from context."""
        return self.sparse or self.left

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The projections that sparsity is about."""
        return tuple(each for each in self.site.projections if each.base not in self.without_context)


@dataclass(frozen=True)
class SparsityPlan:
    """The decisions for every matched site, in graph order."""

    sites: tuple[SitePlan, ...]

    @property
    def sparse_sites(self) -> tuple[SitePlan, ...]:
        """The sites to rewrite."""
        return tuple(plan for plan in self.sites if plan.sparse)

    @property
    def predicted_sites(self) -> tuple[SitePlan, ...]:
        """Those of them whose channels are chosen for each batch."""
        return tuple(plan for plan in self.sites if plan.predicted)

    @property
    def mapped_sites(self) -> tuple[SitePlan, ...]:
        """The sites that have a map."""
        return tuple(plan for plan in self.sites if plan.mapped)

    @property
    def split_sites(self) -> tuple[SitePlan, ...]:
        """The sites that tell output tokens from context."""
        return tuple(plan for plan in self.sites if plan.split)


@dataclass(frozen=True)
class NarrowedOutput:
    """An output of the graph of which only the rows of the loss are computed.

    Attributes:
        index: its place among the outputs, where the rewritten graph returns (R, ...).
        rows: the place of the output that was added, its rows' positions (R,).
        lead: sizes of the leading dimensions that the R rows are taken from, over the graph's symbols.
    """

    index: int
    rows: int
    lead: tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class LossRows:
    """The part of the graph that runs on the rows of the loss alone.

    Attributes:
        nodes: the nodes that hold R rows, one for each target that is not ignored.
        outputs: the outputs among them, such as the logits.
        spare: whether there may be more rows than that, whose position is -1.
    """

    nodes: frozenset[NodeName]
    outputs: tuple[NarrowedOutput, ...]
    spare: bool = False


@dataclass(frozen=True)
class ProductOrder:
    """The order chosen for the products of one frozen layer and its adapter.

    Attributes:
        projection: the layer.
        order: a name of `kernels/merged_linear`; `"F1B1"` leaves the layer as it was captured.
        tokens: number of tokens seen at tracing, for which the order was chosen.
        costs: by order, cost in FLOPs over N tokens; a moved byte counts as the FLOPs that fit into its time.
        saved_flops: FLOPs alone that the order saves at that number of tokens.
        break_even: for which numbers of tokens another order than F1B1 pays: `"N > 1843"` or `"never"`.
    """

    projection: str
    order: str
    tokens: int
    costs: tuple[tuple[str, str], ...]
    saved_flops: float
    break_even: str


@dataclass(frozen=True)
class MaskedLayer:
    """A pruned layer with an adapter, whose zeros are kept or, where there is a reason, cannot be.

    Attributes:
        projection: the layer.
        base: its base product, as captured.
        sparsity: fraction of its weight that is zero.
        pattern: `"2:4"` (at most 2 of 4 consecutive inputs are not zero), another N:M, or `"unstructured"`.
        added_flops: FLOPs that masking adds to a training step, at the number of tokens seen at tracing; negative
            where it saves some, 0 where that number is not known.
        reason: why the adapter is trained without a mask; empty where it has one.
    """

    projection: str
    base: NodeName
    sparsity: float
    pattern: str
    added_flops: float
    reason: str = ""


@dataclass(frozen=True)
class Rejection:
    """A place where a rule looked and did not apply.

    Attributes:
        rule: the pass, with the rule's name where it has several: `"find_ffn"`.
        node: the node the rule started from, or the site's name.
        reason: what is in the way, in words a user can act on.
    """

    rule: str
    node: str
    reason: str
