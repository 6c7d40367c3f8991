"""Compute DoRA's norm from the factors of its adapter, without forming their product.

    %e = eye(in)                                         %n = sparselora.dora_norm(%W, detach(%A), detach(%B), s)
    %p = linear(linear(%e, A), B).T      (out, in)
    %v = add(%W, mul(s, detach(%p)))     (out, in)  ->
    %n = norm(%v, dim=1)                 (out,)

`B @ A` instead of the products with the identity is the same, in any order of operands, with casts, and with W stored
either way round. PEFT multiplies with an identity of in x in, keeps B A, its transpose and the sum, each as large as W;
the op forms a block of rows at a time (`kernels/dora_norm`).

Legal because: the op computes the same norm, and no gradient flows through it: DoRA holds it constant (arXiv
2402.09353, section 4.3). It computes in fp32 at least, where under autocast PEFT rounds B A to the lower precision.
Declines when: a gradient flows through the norm, it is none of each row's L2 norms, or B has a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import (
    argument,
    calls_torch,
    op_name,
    shape_of,
    stored_matrix,
    strip_casts,
    strip_transposes,
    tensor_of,
    tensor_value,
)
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.vocabulary import CASTS, LINEAR, MATMULS, MULTIPLICATIONS, VECTOR_NORMS
from sparse_compile.graph.walk import readers
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.lora_branch import is_sum

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Product:
    """The product s B A beside a weight.

    Attributes:
        a: A (r, in), or A' where `a_transposed`.
        b: B (out, r).
        scale: s.
        biased: whether something is added to the product with A or B.
    """

    a: fx.Node
    b: fx.Node
    a_transposed: bool
    scale: float
    biased: bool = False


class FactorDoRANorm(Pass):
    """Replace every norm of the rows of W + s B A."""

    requires = ("canonical",)
    # The analyses follow the norm's vector, not what it is computed from.
    after = ("find_projections", "find_ffn", "find_attention")
    optimises = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        rewriter = Rewriter(gm, self.name)
        rejections: list[Rejection] = []
        norms = erased = 0
        for node in list(gm.graph.nodes):
            found = _match(node, ctx)
            if found is None:
                continue
            try:
                _check_norm(node, *found, ctx)
            except Declined as declined:
                rejections.append(declined.by(self.name))
                continue
            norms += 1
            erased += _rewrite(node, *found, rewriter)
        stats = {"norms": norms, "erased": erased}
        return PassOutcome(bool(norms), stats, tuple(rejections))


def _match(norm: fx.Node, ctx: PassContext) -> tuple[fx.Node, _Product] | None:
    """Return the weight and the product beside it where `norm` is a norm of their sum."""
    if op_name(norm) not in VECTOR_NORMS or not calls_torch(norm):
        return None
    whole = argument(norm, "input")
    if not isinstance(whole, fx.Node):
        return None
    total = strip_casts(whole)
    if not is_sum(total) or not calls_torch(total):
        return None
    operands = [operand for operand in total.args if isinstance(operand, fx.Node)]
    if len(operands) != 2:
        return None
    for weight, other in (operands, reversed(operands)):
        product = _product(other) if stored_matrix(weight)[0].name in ctx.env.parameters else None
        if product is not None and shape_of(weight) == shape_of(other):
            return weight, product
    return None


def _product(node: fx.Node) -> _Product | None:
    """Match s B A, (out, in), spelt as a product of two factors or as layers applied to an identity matrix."""
    scale = 1.0
    while calls_torch(node):
        if op_name(node) in MULTIPLICATIONS:
            numbers = [arg for arg in node.args if isinstance(arg, int | float)]
            tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
            if len(numbers) != 1 or len(tensors) != 1:
                return None
            scale, node = scale * numbers[0], tensors[0]
        elif op_name(node) in CASTS or op_name(node) == "detach":
            node = argument(node, "input")
        else:
            break
    node, transposes = strip_transposes(node)
    x, weight = argument(node, "input"), argument(node, "weight" if node.target is LINEAR else "other")
    if node.target is LINEAR:
        inner = strip_casts(x)
        if transposes % 2 and inner.target is LINEAR and _is_identity(strip_casts(argument(inner, "input"))):
            biased = any(argument(layer, "bias") is not None for layer in (inner, node))
            return _Product(argument(inner, "weight"), weight, False, scale, biased)
        if transposes % 2 == 0 and _is_matrix(x):
            return _Product(weight, x, True, scale, argument(node, "bias") is not None)
    elif op_name(node) in MATMULS and transposes % 2 == 0 and _is_matrix(x) and _is_matrix(weight):
        return _Product(weight, x, False, scale)
    return None


def _is_identity(node: fx.Node) -> bool:
    shape = shape_of(node)
    return node.target is torch.eye and len(shape) == 2 and shape[0] == shape[1]


def _is_matrix(node: object) -> bool:
    return isinstance(node, fx.Node) and len(shape_of(node)) == 2


def _check_norm(norm: fx.Node, weight: fx.Node, product: _Product, ctx: PassContext) -> None:
    """Decline a norm that the op does not compute, or that is differentiated."""
    order = argument(norm, "ord")
    dim = argument(norm, "dim")
    dims = list(dim) if isinstance(dim, list | tuple) else [dim]
    if order not in (None, 2, "fro") or dims not in ([1], [-1]) or argument(norm, "keepdim", False):
        raise Declined(norm, "it is not the L2 norm of each row")
    value = tensor_value(norm)
    operands = (tensor_of(strip_casts(each)) for each in (stored_matrix(weight)[0], product.a, product.b))
    if value is None or value.dim() != 1 or any(each.dtype not in _DTYPES for each in operands):
        raise Declined(norm, "its operands are no floating-point matrices")
    if value.requires_grad and not _is_detached(norm):
        raise Declined(norm, "a gradient flows through the norm")
    if product.biased:
        raise Declined(norm, "an adapter with a bias is more than the product of its factors")
    if ctx.env.parameters[stored_matrix(weight)[0].name].trained:
        raise Declined(norm, "its weight is trained")


def _is_detached(node: fx.Node) -> bool:
    """Tell whether every use of `node` is of a detached copy."""
    found = readers(node, through=lambda user: op_name(user) in CASTS and calls_torch(user))
    return all(op_name(user) == "detach" for user in found)


def _rewrite(norm: fx.Node, weight: fx.Node, product: _Product, rewriter: Rewriter) -> int:
    stored, transposed = stored_matrix(weight)
    value = tensor_of(norm)
    a, b = (strip_casts(each) for each in (product.a, product.b))
    with rewriter.before(norm):
        # Uncast: the op casts a block at a time.
        matrix = rewriter.method("t", stored) if transposed else stored
        a, b = (rewriter.method("detach", each) for each in (a, b))
        a = rewriter.method("t", a) if product.a_transposed else a
        norms = rewriter.call(torch.ops.sparselora.dora_norm.default, matrix, a, b, product.scale)
        if at_least_fp32(*(tensor_of(each) for each in (matrix, a, b))) != value.dtype:
            norms = rewriter.method("to", norms, value.dtype)
    return take_over(norm, norms)
