"""Compute the products of a sparse feed-forward block and what lies between them in generated kernels.

    %p = gathered_linear(%x, %gate, %kept)                 %f = fused_linear([%x], [%gate, %up], [%kept, %kept],
    %t = linear(%xa, %b)                                            [%xa], [%b], 'p0*p1*sigmoid(p0 + 2.0*t0) + ...')
    %g = silu(%p + 2.0 * %t)                         ->    %h = %f[0]
    %h = %g * gathered_linear(%x, %up, %kept)
    %y = gathered_input_linear(%h, %down, %kept)     ->    %y = fused_linear([%h], [%down], ..., 'p0 + 2.0*t0')[0]
         + 2.0 * linear(%ha, %b)

The elementwise region is lifted from the graph into a formula (`kernels/codegen`), from what is multiplied with the
out-projection, and from the block's result, back to products. A part of a fused gate and up layer becomes a product of
its own rows.

Legal because: the formula is the region, and each product is computed as before; only roundings between them go.

Declines when: the kernels are not asked for (`kernels="triton"`) or do not run on the device; a call has no formula; an
intermediate is read outside the region.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compile.graph import LINEAR, TAG, Rewriter, argument, hinted_shape, op_name, take_over, tensor_value
from sparse_compile.ir import FFNSite, Rejection, SitePlan
from sparse_compile.kernels.codegen.elementwise import NotLiftableError, lift
from sparse_compile.kernels.codegen.formula import Formula, number
from sparse_compile.kernels.codegen.triton_source import gradient_source, product_source
from sparse_compile.kernels.fused_linear import FUSED_LINEAR
from sparse_compile.kernels.fused_linear.triton import gradient_spec, product_spec
from sparse_compile.kernels.providers import REFERENCE, OpCall
from sparse_compile.passes.base import Numerics, PassContext, PassOutcome

_OPS = torch.ops.sparselora
_PRODUCTS = {_OPS.gathered_linear.default: 0, _OPS.gathered_input_linear.default: 1}
"""The frozen products, with the dimension of the weight that each indexes."""

Window = tuple[int, int] | None
"""Which channels of a wider tensor are meant: start and number; None for all."""


@dataclass(frozen=True)
class FuseProducts:
    """Rewrite the context part of the sparse feed-forward sites."""

    name: str = "fuse_products"
    requires: tuple[str, ...] = ("sparse",)
    ensures: tuple[str, ...] = ()
    numerics: Numerics = Numerics.EXACT
    analysis: bool = False
    optimises: bool = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        plans = [plan for plan in ctx.plan.sparse_sites if isinstance(plan.site, FFNSite)]
        rewriter = Rewriter(gm, self.name)
        rejections: dict[Rejection, None] = {}
        fused = 0
        for plan in plans:
            choice = FUSED_LINEAR.choose(_call(plan, ctx), ctx.config.kernels)
            if choice.provider == REFERENCE:
                # Not fused, it is computed by the providers of single products: the op's own reference is none of them.
                rejections |= {
                    Rejection(self.name, "fused_linear", f"{name}: {reason}"): None for name, reason in choice.declined
                }
                continue
            for part, end, dtype in _ends(plan, gm.graph):
                try:
                    found = _Region(end)
                except NotLiftableError as error:
                    rejections[Rejection(self.name, plan.site.name, str(error))] = None
                    continue
                if found.worthwhile:
                    with rewriter.before(end, plan.site.name):
                        take_over(end, found.insert(rewriter, dtype))
                    ctx.kernel_sources |= found.sources(f"{plan.site.name}.{part}")
                    fused += 1
        stats = {"fused": fused, "inserted": rewriter.inserted}
        return PassOutcome(fused > 0, stats, tuple(rejections))


def _call(plan: SitePlan, ctx: PassContext) -> OpCall:
    dtype, device = ctx.weight_kind(plan.site.output)
    return OpCall(device, dtype)


def _ends(plan: SitePlan, graph: fx.Graph) -> Iterator[tuple[str, fx.Node, torch.dtype]]:
    """Yield what ends a region for context tokens, the intermediate and the result: its name, node and dtype."""
    inside = [node for node in graph.nodes if node.meta.get(TAG, {}).get("site") == plan.site.name]
    result = tensor_value(next(node for node in graph.nodes if node.name == plan.site.output.output))
    assert result is not None
    products = [node for node in inside if node.target is _OPS.gathered_input_linear.default]
    if len(products) == 1:
        hidden = argument(products[0], 0, "h")
        while "dtype" not in hidden.meta[TAG]:
            hidden = hidden.args[0]  # a cast as autocast would make it, behind the region's last call
        yield "intermediate", hidden, hidden.meta[TAG]["dtype"]
    for node in inside:
        if node.target is _OPS.put_rows.default:
            context = node.args[1]
            assert isinstance(context, fx.Node)
            yield "result", context, result.dtype


@dataclass
class _Product:
    x: fx.Node
    weight: fx.Node
    channels: fx.Node
    dim: int
    window: Window


@dataclass
class _Thin:
    thin: fx.Node
    factor: fx.Node
    window: Window


@dataclass
class _Region:
    """What lies between some products and a node that is computed from them alone.

    Raises:
        NotLiftableError: it has no formula, or something inside it is read outside.
    """

    end: fx.Node
    products: list[_Product] = field(default_factory=list)
    thins: list[_Thin] = field(default_factory=list)
    vectors: list[tuple[fx.Node, Window]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lifted: dict[tuple[fx.Node, Window], sympy.Expr] = {}
        self.formula = Formula.of(self._lift(self.end, None))
        if not self.products:
            raise NotLiftableError("no product of it loads its weight by index: a 4-bit one is dequantised before")
        inside = {node for node, _ in self._lifted}
        for node in inside - {self.end}:
            strangers = [user for user in node.users if user not in inside]
            if strangers and not _is_vector(node):
                raise NotLiftableError(f"its intermediate {node.name} is also read by {strangers[0].name}")

    @property
    def worthwhile(self) -> bool:
        """Whether there is more than one product to compute: one alone is an op of its own."""
        return len(self._lifted) > 1

    def insert(self, rewriter: Rewriter, dtype: torch.dtype) -> fx.Node:
        """Insert the fused product; return the node that holds its result."""
        xs = list(dict.fromkeys(product.x for product in self.products))
        results = rewriter.call(
            _OPS.fused_linear.default,
            xs,
            [product.weight for product in self.products],
            [_narrowed(rewriter, product.channels, 0, product.window) for product in self.products],
            self._reads,
            [product.dim for product in self.products],
            [thin.thin for thin in self.thins],
            [_narrowed(rewriter, thin.factor, 0, thin.window) for thin in self.thins],
            [_narrowed(rewriter, vector, -1, window) for vector, window in self.vectors],
            self.formula.text,
            dtype,
            [],
            "",
            provider=REFERENCE,
        )
        return rewriter.items(results, 1)[0]

    def sources(self, title: str) -> dict[str, str]:
        """Return the source of the kernels, forward and backward, by name of a file.

        These are the kernels for weights that are indexed in place; where a slice is copied together first, the same
        kernel reads the copy.
        """
        text, vectors = self.formula.text, len(self.vectors)
        dims = [product.dim for product in self.products]
        forward = product_spec(self._reads, dims, len(self.thins), vectors, text)
        sources = {f"{title}.py": product_source(forward, title)}
        if forward.saves:
            derivatives = tuple(each.text for each in self.formula.gradients(self.formula.operands).formulas)
            backward = gradient_spec(len(self.products), len(self.thins), vectors, derivatives)
            sources[f"{title}.backward.py"] = gradient_source(backward, f"{title}, backward")
        return sources

    @property
    def _reads(self) -> list[int]:
        """The index of each product's x among the distinct ones."""
        xs = list(dict.fromkeys(product.x for product in self.products))
        return [xs.index(product.x) for product in self.products]

    def _lift(self, node: fx.Node, window: Window) -> sympy.Expr:
        key = (node, window)
        if key not in self._lifted:
            self._lifted[key] = self._expression(node, window)
        return self._lifted[key]

    def _expression(self, node: fx.Node, window: Window) -> sympy.Expr:
        if _is_vector(node):
            self.vectors.append((node, window if _is_wide(node) else None))
            return sympy.Symbol(f"v{len(self.vectors) - 1}")
        if node.target in _PRODUCTS:
            x, weight, channels = (argument(node, i, name) for i, name in enumerate(("x", "weight", "channels")))
            self.products.append(_Product(x, weight, channels, _PRODUCTS[node.target], window))
            return sympy.Symbol(f"p{len(self.products) - 1}")
        if node.target is LINEAR:
            x, factor, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
            self.thins.append(_Thin(x, factor, window))
            symbol = sympy.Symbol(f"t{len(self.thins) - 1}")
            return symbol if bias is None else symbol + self._lift(bias, window)
        if op_name(node) == "narrow" and argument(node, 1, "dim") == -1:
            start, length = argument(node, 2, "start"), argument(node, 3, "length")
            offset = 0 if window is None else window[0]
            return self._lift(node.args[0], (offset + start, length if window is None else window[1]))  # type: ignore[arg-type]
        return lift(node, lambda operand: self._operand(operand, window))

    def _operand(self, operand: Any, window: Window) -> Any:
        if isinstance(operand, fx.Node):
            return self._lift(operand, window)
        if isinstance(operand, int | float):
            try:
                return number(operand)
            except ValueError as error:
                raise NotLiftableError(str(error)) from error
        if operand is None or isinstance(operand, torch.dtype):
            return None
        raise NotLiftableError(f"{operand!r} is no operand of a formula")


def _narrowed(rewriter: Rewriter, node: fx.Node, dim: int, window: Window) -> fx.Node:
    return node if window is None else rewriter.method("narrow", node, dim, *window)


def _is_vector(node: fx.Node) -> bool:
    """Tell whether a node holds one value a channel, or one in all: what was inserted carries no shape of its own."""
    if tensor_value(node) is not None:
        return set(hinted_shape(node)[:-1]) <= {1}
    if op_name(node) in ("index_select", "to", "reshape", "detach"):
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_vector(source)
    return False


def _is_wide(node: fx.Node) -> bool:
    """Tell whether a vector has a value a channel."""
    value = tensor_value(node)
    return value is None or value.numel() > 1
