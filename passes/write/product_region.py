"""A region of a graph that one generated kernel computes: frozen products, adapters, and what joins them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import argument, hinted_shape, op_name, tensor_value
from sparse_compile.graph.rewrite import Rewriter
from sparse_compile.graph.vocabulary import LINEAR
from sparse_compile.kernels.codegen.elementwise import constant, lift
from sparse_compile.kernels.codegen.formula import Formula
from sparse_compile.kernels.codegen.triton_source import gradient_source, product_source
from sparse_compile.kernels.dequantize_4bit.packed import PackedFormat
from sparse_compile.kernels.fused_linear.operands import WHOLE, kernel_layout
from sparse_compile.kernels.fused_linear.triton import gradient_spec, product_spec
from sparse_compile.kernels.providers import REFERENCE
from sparse_compile.passes.read.mutation import overwritten

_OPS = torch.ops.sparselora
_GATHERED = {_OPS.gathered_linear.default: 0, _OPS.gathered_input_linear.default: 1}
"""Products with a dense weight, with the dimension of it that each indexes."""

Window = tuple[int, int] | None
"""Which channels of a wider tensor are meant: start and number; None for all."""


@dataclass(frozen=True)
class FrozenProduct:
    """A product with a frozen weight or chosen channels of it, as it stands in a graph.

    Attributes:
        x, weight, channels: its operands; of a weight in 4 bits the packed data.
        dim: the dimension of the weight that is indexed; `WHOLE`, without channels, if none is.
        scales: of a weight in 4 bits its scales, as `fused_linear` takes them.
        form: of a weight in 4 bits its format.
    """

    x: fx.Node
    weight: fx.Node
    channels: fx.Node | None
    dim: int
    scales: tuple[fx.Node, ...] = ()
    form: PackedFormat | None = None


def chosen_of_4bit(node: fx.Node) -> fx.Node | None:
    """Return the dequantised channels that a node multiplies with, where it is a product with such and nothing else.

    The call that dequantises them has as arguments the packed data, four tensors of scales, shape, blocksize, type,
    dtype, channels and their dimension.
    """
    if node.target is not LINEAR or argument(node, "bias") is not None:
        return None
    dense = argument(node, "weight")
    is_chosen = dense.target is _OPS.dequantize_4bit.default and len(dense.args) == 11
    return dense if is_chosen else None


def match_product(node: fx.Node) -> FrozenProduct | None:
    """Return the gathered product that a node is, or None.

    Raises:
        Declined: its weight is in 4 bits, in a format that no kernel reads.
    """
    if node.target in _GATHERED:
        dim = _GATHERED[node.target]
        x, weight, channels = (argument(node, name) for name in ("h" if dim else "x", "weight", "channels"))
        return FrozenProduct(x, weight, channels, dim)
    dense = chosen_of_4bit(node)
    if dense is None:
        return None
    operands: tuple[Any, ...] = dense.args
    data, *tensors = operands[:5]
    (rows, width), blocksize, quant_type, _, channels, dim = operands[5:]
    scales = tuple(each for each in tensors if each is not None)
    if reason := PackedFormat.reason_against(quant_type, blocksize, width):
        raise Declined(node, f"its weight in 4 bits is dequantised before the product: {reason}")
    form = PackedFormat(quant_type, blocksize, rows, width, nested=len(scales) > 1)
    value = tensor_value(data)
    if not form.whole_rows and value is not None and value.device.type == "cpu":
        reason = "bitsandbytes counts blocks anew in each of its rows on a CPU"
        raise Declined(node, f"its weight in 4 bits is dequantised before the product: {reason}")
    return FrozenProduct(argument(node, "input"), data, channels, dim, scales, form)


@dataclass
class _Thin:
    thin: fx.Node
    factor: fx.Node
    window: Window


@dataclass
class ProductRegion:
    """What lies between some products and a node that is computed from them alone.

    Attributes:
        end: the node.
        whole: linear layers that count as products with a whole frozen weight.
        products: gathered products with frozen weights, and which of their channels are meant.
        thins: second products of adapters.
        vectors: values of one a channel.
        formula: what is computed of them.

    Raises:
        Declined: it has no formula, or something inside it is read outside.
    """

    end: fx.Node
    whole: frozenset[fx.Node] = frozenset()
    products: list[tuple[FrozenProduct, Window]] = field(default_factory=list)
    thins: list[_Thin] = field(default_factory=list)
    vectors: list[tuple[fx.Node, Window]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lifted: dict[tuple[fx.Node, Window], sympy.Expr] = {}
        self.formula = Formula.of(self._lift(self.end, None))
        if not self.products:
            raise Declined(self.end, "it holds no product with a frozen weight")
        inside = {node for node, _ in self._lifted}
        for node in inside - {self.end}:
            strangers = [user for user in node.users if user not in inside]
            if strangers and not _is_vector(node):
                raise Declined(node, f"its intermediate {node.name} is also read by {strangers[0].name}")

    @property
    def nodes(self) -> set[fx.Node]:
        """What it computes."""
        return {node for node, _ in self._lifted if not _is_vector(node)}

    @property
    def worthwhile(self) -> bool:
        """Whether there is more than one product to compute, or one with a weight in 4 bits.

        One with a dense weight alone is an op of its own.
        """
        return len(self._lifted) > 1 or any(product.form is not None for product, _ in self.products)

    def insert(
        self,
        rewriter: Rewriter,
        dtype: torch.dtype,
        provider: str = REFERENCE,
        x_dtype: torch.dtype | None = None,
    ) -> fx.Node:
        """Insert the fused product; return the node that holds its result, (tokens, columns).

        Args:
            rewriter: where to insert.
            dtype: of the result.
            provider: what runs it.
            x_dtype: what the inputs of frozen products are cast to; None leaves them as they are.
        """
        products = [product for product, _ in self.products]
        xs = list(dict.fromkeys(product.x for product in products))
        formats = [product.form.text if product.form else "" for product in products]
        results = rewriter.call(
            _OPS.fused_linear.default,
            [_flat(rewriter, x) if x_dtype is None else rewriter.method("to", _flat(rewriter, x), x_dtype) for x in xs],
            [product.weight for product in products],
            [_narrowed(rewriter, each.channels, 0, window) for each, window in self.products if each.channels],
            self._reads,
            [product.dim for product in products],
            [_flat(rewriter, thin.thin) for thin in self.thins],
            [_narrowed(rewriter, thin.factor, 0, thin.window) for thin in self.thins],
            [_narrowed(rewriter, vector, -1, window) for vector, window in self.vectors],
            self.formula.text,
            dtype,
            [scale for product in products for scale in product.scales],
            ";".join(formats) if any(formats) else "",
            provider=provider,
        )
        return rewriter.items(results, 1)[0]

    def sources(self, title: str) -> dict[str, str]:
        """Return the source of the kernels, forward and backward, by name of a file.

        These are the kernels for weights that are indexed in place; where a slice is copied together first, the same
        kernel reads the copy.
        """
        text, vectors = self.formula.text, len(self.vectors)
        layouts = [
            ("none" if product.dim == WHOLE else product.dim, None)
            if product.form is None
            else kernel_layout(product.form, product.dim)
            for product, _ in self.products
        ]
        gathers, packed = zip(*layouts, strict=True)
        forward = product_spec(self._reads, gathers, len(self.thins), vectors, text, packed)
        sources = {f"{title}.py": product_source(forward, title)}
        if forward.saves:
            derivatives = tuple(each.text for each in self.formula.gradients(self.formula.operands).formulas)
            backward = gradient_spec(len(self.products), len(self.thins), vectors, derivatives)
            sources[f"{title}.backward.py"] = gradient_source(backward, f"{title}, backward")
        return sources

    @property
    def _reads(self) -> list[int]:
        """The index of each product's x among the distinct ones."""
        xs = list(dict.fromkeys(product.x for product, _ in self.products))
        return [xs.index(product.x) for product, _ in self.products]

    def _lift(self, node: fx.Node, window: Window) -> sympy.Expr:
        key = (node, window)
        if key not in self._lifted:
            self._lifted[key] = self._expression(node, window)
        return self._lifted[key]

    def _expression(self, node: fx.Node, window: Window) -> sympy.Expr:
        if _is_vector(node):
            self.vectors.append((node, window if _is_wide(node) else None))
            return sympy.Symbol(f"v{len(self.vectors) - 1}")
        if node in self.whole:
            x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
            self.products.append((FrozenProduct(x, weight, None, WHOLE), None))
            symbol = sympy.Symbol(f"p{len(self.products) - 1}")
            return symbol if bias is None else symbol + self._lift(bias, None)
        if (product := match_product(node)) is not None:
            self.products.append((product, window))
            return sympy.Symbol(f"p{len(self.products) - 1}")
        if node.target is LINEAR:
            x, factor, bias = (argument(node, name) for name in ("input", "weight", "bias"))
            self.thins.append(_Thin(x, factor, window))
            symbol = sympy.Symbol(f"t{len(self.thins) - 1}")
            return symbol if bias is None else symbol + self._lift(bias, window)
        if op_name(node) == "narrow" and argument(node, "dim") == -1:
            start, length = argument(node, "start"), argument(node, "length")
            offset = 0 if window is None else window[0]
            return self._lift(node.args[0], (offset + start, length if window is None else window[1]))  # type: ignore[arg-type]
        if (written := overwritten(node)) is not None:
            raise Declined(node, f"{op_name(node)} writes to {written.name}, which is read again")
        return lift(node, lambda operand: self._operand(operand, window))

    def _operand(self, operand: Any, window: Window) -> Any:
        return self._lift(operand, window) if isinstance(operand, fx.Node) else constant(operand)


def _flat(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """Return a tensor as a matrix."""
    shape = hinted_shape(node)
    return node if len(shape) == 2 else rewriter.method("reshape", node, -1, shape[-1])


def _narrowed(rewriter: Rewriter, node: fx.Node, dim: int, window: Window) -> fx.Node:
    return node if window is None else rewriter.method("narrow", node, dim, *window)


def _is_vector(node: fx.Node) -> bool:
    """Tell whether a node holds one value a channel, or one in all."""
    return tensor_value(node) is not None and set(hinted_shape(node)[:-1]) <= {1}


def _is_wide(node: fx.Node) -> bool:
    """Tell whether a vector has a value a channel."""
    return math.prod(hinted_shape(node)) > 1
