"""What the two sparsify passes share: splitting tokens by role, and the products of context tokens."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from sparse_compile.graph.read import argument, hinted_shape, nodes_by_name, tensor_of
from sparse_compile.graph.rewrite import Rewriter
from sparse_compile.graph.sites import Projection
from sparse_compile.graph.vocabulary import LINEAR
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.read.autocast import autocast_dtypes
from sparse_compile.passes.read.four_bit import mark_for_recomputation

_OPS = torch.ops.sparselora


class SparseRows:
    """Inserts the nodes that compute output tokens and context tokens apart.

    Args:
        rewriter: where to insert.
        ctx: holds the rows of each role.
    """

    def __init__(self, rewriter: Rewriter, ctx: PassContext) -> None:
        self.rewriter = rewriter
        self.nodes = nodes_by_name(rewriter.graph)
        assert ctx.facts.rows is not None
        self.rows = tuple(self.nodes[name] for name in ctx.facts.rows)
        self._slots = ctx.facts.slots is not None
        self._quantized = ctx.facts.quantized_weights
        devices = {
            parameter.value.device.type for parameter in ctx.env.parameters.values() if parameter.value is not None
        }
        self.autocast = {device: autocast_dtypes(rewriter.graph, ctx.env.autocast, device) for device in devices}

    @property
    def roles(self) -> fx.Node:
        """The tokens' roles, (B, S) bool, true at output tokens."""
        split = self.rows[0].args[0]
        assert isinstance(split, fx.Node)
        return argument(split, "output_mask")  # type: ignore[no-any-return]

    def split(self, x: fx.Node, columns: fx.Node | None = None) -> tuple[fx.Node, fx.Node]:
        """Flatten the tokens of `x` (..., C) and split them: (n, C) and (N - n, k or C)."""
        flat = self.rewriter.method("reshape", x, -1, hinted_shape(x)[-1])
        taken = self.rewriter.call(_OPS.take_rows.default, flat, *self.rows, columns, **self._tokens(x))
        output, context = self.rewriter.items(taken, 2)
        return output, context

    def merge(
        self, output: fx.Node, context: fx.Node, source: fx.Node, width: int, columns: fx.Node | None = None
    ) -> fx.Node:
        """Merge the tokens again, to (..., width) with the leading sizes of the tensor that was split.

        They are read from `source` and not from the node that is replaced, whose uses all move to what is inserted
        here.
        """
        merged = self.rewriter.call(_OPS.put_rows.default, output, context, *self.rows, columns, **self._tokens(source))
        return self.rewriter.method("reshape", merged, *self.leading_sizes(source), width)

    def _tokens(self, like: fx.Node) -> dict[str, fx.Node | int]:
        """Return the argument that says how many tokens there are, where slots may be spare."""
        if not self._slots:
            return {}
        tokens: fx.Node | int = 1
        for size in self.leading_sizes(like):
            both_known = isinstance(size, int) and isinstance(tokens, int)
            tokens = size * tokens if both_known else self.rewriter.call(operator.mul, tokens, size)  # type: ignore[operator]
        return {"tokens": tokens}

    def gathered(self, x: fx.Node, product: fx.Node, projection: Projection, channels: fx.Node) -> fx.Node:
        """Insert a product with the frozen weight, of some output channels; with its bias, where it has one."""
        x = self.cast(x, product)
        if projection.weight in self._quantized:
            y = self.product(x, self._dequantized(projection, channels, 0), None, projection.in_features)
        else:
            y = self.rewriter.call(_OPS.gathered_linear.default, x, self._weight(projection), channels)
        return self._with_bias(y, product, channels)

    def gathered_input(self, h: fx.Node, product: fx.Node, projection: Projection, channels: fx.Node) -> fx.Node:
        """Insert a product with the frozen weight, of some input channels; with its bias, where it has one."""
        h = self.cast(h, product)
        if projection.weight in self._quantized:
            y = self.product(h, self._dequantized(projection, channels, 1), None, hinted_shape(channels)[0])
        else:
            y = self.rewriter.call(_OPS.gathered_input_linear.default, h, self._weight(projection), channels)
        return self._with_bias(y, product, None)

    def layer_channels(self, kept: Sequence[tuple[Projection, fx.Node]]) -> fx.Node:
        """Insert the rows of a layer's weight that hold the kept channels of it, or of its parts, ascending.

        Args:
            kept: pairs of a projection and its kept channels, all of one layer.
        """
        call, rows = self.rewriter.call, []
        for projection, channels in sorted(kept, key=lambda pair: pair[0].fused.offset if pair[0].fused else 0):
            part = projection.fused
            if part is None:
                return channels
            if part.blocks > 1:
                block, inside = (call(op, channels, part.width) for op in (torch.floor_divide, torch.remainder))
                channels = call(torch.add, call(torch.mul, block, part.stride), inside)
            rows.append(call(torch.add, channels, part.offset))
        joined = call(torch.cat, rows)
        interleaved = any(projection.fused and projection.fused.blocks > 1 for projection, _ in kept)
        return self.rewriter.items(call(torch.sort, joined), 1)[0] if interleaved else joined

    def cast(self, x: fx.Node, at: fx.Node) -> fx.Node:
        """Cast an operand as autocast would at the node `at`: custom ops ignore it."""
        dtype = self._autocast_dtype(at)
        return x if dtype is None else self.rewriter.method("to", x, dtype)

    def cast_like(self, x: fx.Node, like: fx.Node) -> fx.Node:
        """Give a tensor the dtype of another: a block whose adapter is fp32 widens its result, autocast narrows it."""
        dtype = tensor_of(like).dtype
        return x if tensor_of(x).dtype == dtype else self.rewriter.method("to", x, dtype)

    def dense(self, node: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
        """Insert a copy of `node` that reads `values` in place of its operands."""
        if node.target is LINEAR:
            x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
            return self.product(values.get(x, x), values.get(weight, weight), bias, hinted_shape(weight)[-1])
        return self.rewriter.copy(node, lambda operand: values.get(operand, operand))

    def product(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, width: int) -> fx.Node:
        """Insert a linear layer over the tokens of one role.

        Args:
            x: (n, width), n known at run time only.
            weight: (out, width).
            bias: (out,) or None.
            width: number of columns of `x`.
        """
        if width > 1:
            return self.rewriter.call(LINEAR, x, weight, bias)
        # The gradient of `mm` looks at strides: with one column it would compare n with 1, which no guard can decide.
        # `bmm` does not look.
        one, columns = (self.rewriter.method("unsqueeze", each, 0) for each in (x, self.rewriter.method("t", weight)))
        y = self.rewriter.method("squeeze", self.rewriter.call(torch.bmm, one, columns), 0)
        return y if bias is None else self.rewriter.call(torch.add, y, bias)

    def _autocast_dtype(self, at: fx.Node) -> torch.dtype | None:
        value = tensor_of(at)
        # fp64 operands are left alone by autocast.
        dtype = self.autocast.get(value.device.type, {}).get(at.name)
        return None if value.dtype == torch.float64 else dtype

    def _dequantized(self, projection: Projection, channels: fx.Node, dim: int) -> fx.Node:
        """Insert the chosen rows (dim 0) or columns (dim 1) of a weight that is stored in 4 bits."""
        whole = self.nodes[projection.weight]
        dense = self.rewriter.call(_OPS.dequantize_4bit.default, *whole.args, channels, dim)
        mark_for_recomputation(dense)
        return dense

    def _weight(self, projection: Projection) -> fx.Node:
        weight = self.nodes[projection.weight]
        return self.rewriter.method("t", weight) if projection.transposed else weight

    def _with_bias(self, y: fx.Node, product: fx.Node, channels: fx.Node | None) -> fx.Node:
        bias = argument(product, "bias")
        if bias is None:
            return y
        if channels is not None:
            bias = self.rewriter.call(torch.index_select, bias, 0, channels)
        return self.rewriter.call(torch.add, y, self.cast(bias, product))

    def leading_sizes(self, like: fx.Node) -> Sequence[fx.Node | int]:
        """Return the sizes of all dimensions of `like` but the last, symbolic ones as nodes."""
        value = tensor_of(like)
        return [
            size if isinstance(size, int) else self.rewriter.method("size", like, dim)
            for dim, size in enumerate(value.shape[:-1])
        ]
