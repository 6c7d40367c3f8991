"""What analyses find in a graph: parameters, layers with their adapters, and blocks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

NodeName = str


SiteKind = Literal["ffn", "attention"]


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer that enters the graph as an input.

    Attributes:
        node: its placeholder.
        path: dotted name in the user's model, such as `"layers.0.mlp.up_proj.weight"`.
        trained: whether it requires a gradient.
        value: the live tensor, or None where the graph was handed over with stand-ins only.
    """

    node: NodeName
    path: str
    trained: bool
    value: Tensor | None

    @property
    def is_wrapper(self) -> bool:
        """Whether it is a tensor subclass around other tensors, as torchao's quantised weights are.

        Such a class knows the operators that it implements, and refuses those of this backend.
        """
        return hasattr(self.value, "__tensor_flatten__")


@dataclass(frozen=True)
class LoRABranch:
    """A low-rank branch s (x A') B' beside a frozen product.

    Attributes:
        a: the product with A', (..., in) to (..., r).
        b: the product with B', (..., r) to (..., out).
        output: the last node of the branch (scaled, cast), which is added to the base product.
        dropout: the dropout between x and A', or None.
        factors: placeholders of A and B.
        trained: whether A or B is trained; a frozen adapter that stays active has neither.
    """

    a: NodeName
    b: NodeName
    output: NodeName
    dropout: NodeName | None
    factors: tuple[NodeName, NodeName]
    trained: bool


@dataclass(frozen=True)
class DoRATerm:
    """What a weight-decomposed adapter (DoRA) adds to a layer's output: (v - 1) y' + v s (x A') B'.

    v holds a number for each output channel, the trained magnitude over the norm of the row of W + s B A. y' is the
    output so far without the bias, or x W' of the adapter's own x, which was dropped out.

    Attributes:
        branch: the low-rank branch, scaled by v at its end.
        product: the frozen product of the dropped-out x, or None.
        unbiased: the output so far less the bias, or None.
    """

    branch: LoRABranch
    product: NodeName | None
    unbiased: NodeName | None


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer y = x W' + b with its LoRA branches.

    Attributes:
        name: module path, adapter wrappers left out: `"layers.0.mlp.up_proj"`.
        base: the canonical `linear(x, W, b)` node.
        source: its input x.
        weight: placeholder of the weight, or the node that dequantises one stored in 4 bits.
        transposed: whether that node holds W' (in, out), as Conv1D layers do.
        bias: the node added as bias, or None.
        branches: the LoRA branches added to it, in order; those of DoRA terms are not among them.
        output: the node that carries base, branches and DoRA terms.
        in_features: width of x.
        out_features: width of y.
        dora: the DoRA terms added to it, in order. Only without any is y the sum of base and branches.
        fused: for a part of a layer (query, key and value in one weight), which rows are its own; None for a layer.
            A part's base, weight, bias and branches are those of the layer.
    """

    name: str
    base: NodeName
    source: NodeName
    weight: NodeName
    transposed: bool
    bias: NodeName | None
    branches: tuple[LoRABranch, ...]
    output: NodeName
    in_features: int
    out_features: int
    dora: tuple[DoRATerm, ...] = ()
    fused: FusedRows | None = None

    @property
    def layer(self) -> Projection:
        """The layer that this is a part of, or itself."""
        return self if self.fused is None else self.fused.layer

    @property
    def adapters(self) -> tuple[LoRABranch, ...]:
        """Every low-rank branch, those of DoRA terms last."""
        return (*self.branches, *(term.branch for term in self.dora))

    @property
    def products(self) -> tuple[NodeName, ...]:
        """Every product with the frozen weight, the base first."""
        return (self.base, *(term.product for term in self.dora if term.product is not None))


@dataclass(frozen=True)
class FusedRows:
    """The rows of a fused weight that are one part of it: in each of `blocks` blocks, `width` rows from `offset` on.

    Parts that are concatenated have one block; parts that are interleaved by head have one a head.

    Attributes:
        layer: the fused layer.
        offset: first row of the part within a block.
        width: rows of the part in a block.
        blocks: number of blocks.
        stride: rows of a block, whatever part they are of.
    """

    layer: Projection
    offset: int
    width: int
    blocks: int
    stride: int

    def take(self, tensor: Tensor) -> Tensor:
        """Return the part's rows of a tensor (rows of the layer, ...); a view where there is one block."""
        blocks = tensor.reshape(self.blocks, self.stride, *tensor.shape[1:])
        return blocks.narrow(1, self.offset, self.width).flatten(0, 1)


@dataclass(frozen=True)
class FFNSite:
    """In-projections that share one input, an elementwise region, one out-projection.

    Attributes:
        name: site name, the common module path of its projections.
        index: order of the site among the graph's FFN sites.
        source: the shared input x.
        inputs: the in-projections (gate and up, or one).
        output: the out-projection.
        region: the elementwise nodes between them, in graph order; the last one feeds the out-projection.
        vectors: nodes outside the region that it reads and that have one value a channel.
    """

    name: str
    index: int
    source: NodeName
    inputs: tuple[Projection, ...]
    output: Projection
    region: tuple[NodeName, ...]
    vectors: tuple[NodeName, ...]
    kind: SiteKind = "ffn"

    @property
    def identity(self) -> str:
        """A name of its own: blocks that share their frozen weights share the site name too."""
        return f"{self.name}@{self.output.base}"

    @property
    def channels(self) -> int:
        """Width of the intermediate."""
        return self.output.in_features

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections of the site."""
        return (*self.inputs, self.output)

    @property
    def predicted(self) -> tuple[Projection, ...]:
        """The projections whose outputs the predictor estimates."""
        return self.inputs


@dataclass(frozen=True)
class AttentionSite:
    """Query, key and value projections of one input, softmax attention, one output projection.

    Attributes:
        name: site name, the common module path of its projections.
        index: order of the site among the graph's attention sites.
        source: the shared input x.
        query, key, value, output: the projections.
        attention: the node whose result the heads are: one call, or the last product of a written-out attention.
        kv_heads: number of key/value heads.
        groups: query heads per key/value head; query head h reads key/value head h // groups.
        head_dim: channels of a query or key head.
        value_head_dim: channels of a value head.
        beside: parts of a fused layer that are none of these, such as a gate of the result; they stay dense.
    """

    name: str
    index: int
    source: NodeName
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    attention: NodeName
    kv_heads: int
    groups: int
    head_dim: int
    value_head_dim: int
    beside: tuple[Projection, ...] = ()
    kind: SiteKind = "attention"

    @property
    def identity(self) -> str:
        """A name of its own, as for `FFNSite`."""
        return f"{self.name}@{self.output.base}"

    @property
    def channels(self) -> int:
        """Width of the key projection: the number of (kv head, channel) pairs to choose from."""
        return self.key.out_features

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections of the site."""
        return (self.query, self.key, self.value, self.output)

    @property
    def predicted(self) -> tuple[Projection, ...]:
        """The projections whose outputs the predictor estimates."""
        return (self.query, self.key, self.value)


Site = FFNSite | AttentionSite
