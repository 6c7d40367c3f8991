"""Write a product with a weight in 4 bits as a product with the dequantised weight, the form that all passes know.

    %y = autograd_function_apply(%fwd, %bwd, %x, ...)           ->  %w = dequantize_4bit(%packed, %absmax, ...)
         (%fwd: %out = bitsandbytes.gemm_4bit(%x, %packed, ...))     %y = linear(%x, %w, b)
    %y = bitsandbytes.gemm_4bit(%x, %packed, ...)               ->  the same (where no gradient reaches x)
    %q, %k = %x.to(bf16), %x.to(bf16)                           ->  one cast, which both layers read
    clone(%y)                                                   ->  %y
    %v = bitsandbytes.dequantize_4bit(%packed, %absmax, ...)    ->  %w, once it is there (PEFT's DoRA layers)

Legal because: bitsandbytes computes these very products; its backward dequantises again, and so does this one: the
dequantisation is marked MUST_RECOMPUTE, so that no dense weight is saved. (Its backward dequantises in the dtype the
weight was quantised from, this one in that of x: they differ by the rounding of that dtype.) A clone of a product that
nothing else reads is that product.
Declines when: autocast would cast the dense product to another dtype than the layer computes in, the layer is not what
was described, or the weight is not at hand.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import calls_torch, op_name, strip_casts, tensor_of, tensor_value
from sparse_compile.graph.rewrite import Rewriter, erase_unused, forward_to, take_over
from sparse_compile.graph.vocabulary import CASTS, LINEAR, SUMS
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.quantized_weight import QuantizedWeight
from sparse_compile.passes.read.autocast import autocast_dtypes
from sparse_compile.passes.read.four_bit import calls_bitsandbytes, mark_for_recomputation
from sparse_compile.passes.read.mutation import mutation_between

_VIEWS = {"view", "reshape", "detach", "contiguous", "t"}


# Of bitsandbytes' schema, which names its operands.
_OPERANDS = (
    "A",
    "B",
    "shapeB",
    "absmax",
    "blocksize",
    "quant_type",
    "bias",
    "absmax_8bit",
    "absmax_code",
    "absmax_offset",
)


_SCALES = ("absmax", "absmax_8bit", "absmax_code", "absmax_offset")


class Expose4BitWeights(Pass):
    """Rewrite products with weights that bitsandbytes holds in 4 bits to `linear(x, dequantize_4bit(...), b)`."""

    # Every pass but the first sees one flat graph.
    after = ("inline_checkpoint_bodies",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        ctx.facts = replace(ctx.facts, quantized_weights={})
        rewriter = Rewriter(gm, self.name)
        casts = _Casts()
        rejections: list[Rejection] = []
        linears = 0
        exposed: dict[str, fx.Node] = {}
        for node in list(gm.graph.nodes):
            if calls_bitsandbytes(node, "dequantize_4bit"):
                _share(node, exposed, ctx)
                continue
            layer = _match(node, gm)
            if layer is None:
                continue
            try:
                weight = _weight(layer, ctx)
                _check_autocast(layer, gm, ctx)
            except Declined as declined:
                rejections.append(declined.by(self.name, at=_path(layer, ctx) or node))
                continue
            exposed[layer.operand("B").name] = _rewrite(casts.shared(layer), weight, rewriter, ctx)
            linears += 1
        return PassOutcome(linears > 0, {"linears": linears}, tuple(rejections))


@dataclass(frozen=True)
class _Layer:
    """A product with a weight in 4 bits.

    Attributes:
        node: the call.
        product: what holds its result: the call, or the element of the tuple that it returns.
        operands: by the names of `_OPERANDS`, nodes and plain values of the graph.
    """

    node: fx.Node
    product: fx.Node
    operands: Mapping[str, Any]

    def operand(self, name: str) -> Any:
        """Return an operand; None where it was left out."""
        return self.operands.get(name)


def _match(node: fx.Node, gm: fx.GraphModule) -> _Layer | None:
    if _is_product(node):
        return _Layer(node, node, _named(node, {}))
    if op_name(node) != "autograd_function_apply" or len(node.args) < 2:
        return None
    holder = node.args[0]
    body = getattr(gm, str(holder.target), None) if isinstance(holder, fx.Node) and holder.op == "get_attr" else None
    if not isinstance(body, fx.GraphModule):
        return None
    products = [each for each in body.graph.nodes if _is_product(each)]
    users = list(node.users)
    if len(products) != 1 or len(users) != 1 or op_name(users[0]) != "getitem" or users[0].args[1] != 0:
        return None
    returned: Any = body.graph.output_node().args[0]
    # (outputs, what is saved for the backward); one output may stand without its tuple.
    outputs = returned[0] if isinstance(returned, tuple | list) and returned else returned
    first = outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
    if first is not products[0]:
        return None
    inputs = [each for each in body.graph.nodes if each.op == "placeholder"]
    if len(inputs) != len(node.args) - 2:
        return None
    return _Layer(node, users[0], _named(products[0], dict(zip(inputs, node.args[2:], strict=True))))


def _is_product(node: fx.Node) -> bool:
    return calls_bitsandbytes(node, "gemm_4bit")


def _named(product: fx.Node, inputs: Mapping[fx.Node, Any]) -> dict[str, Any]:
    """Return the operands of a product by name; what is an input of its body as what is passed for it."""
    found: dict[str, Any] = {**dict(zip(_OPERANDS, product.args, strict=False)), **product.kwargs}
    for name, value in found.items():
        if isinstance(value, fx.Node) and value not in inputs and name not in ("A", "bias"):
            value = _stored(value)
        found[name] = inputs.get(value, value) if isinstance(value, fx.Node) else value
        if name in ("B", *_SCALES) and isinstance(found[name], fx.Node):
            found[name] = _stored(found[name])
    return found


def _stored(node: fx.Node) -> fx.Node:
    """Follow views of packed data, whose order in memory is all that counts, back to what is stored."""
    while _is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_view(node: fx.Node) -> bool:
    # `.data`, as Dynamo writes it, is no function of torch's public modules.
    return op_name(node) == "_get_data_attr" or (calls_torch(node) and op_name(node) in _VIEWS)


def _path(layer: _Layer, ctx: PassContext) -> str:
    packed = layer.operand("B")
    parameter = ctx.env.parameters.get(packed.name) if isinstance(packed, fx.Node) else None
    return parameter.path if parameter else ""


def _weight(layer: _Layer, ctx: PassContext) -> QuantizedWeight:
    """Return the weight of a layer; decline one that cannot be read."""
    nodes = [layer.operand(name) for name in ("B", *_SCALES)]
    shape, blocksize, quant_type = (layer.operand(name) for name in ("shapeB", "blocksize", "quant_type"))
    value = tensor_value(layer.operand("A"))
    is_plain = isinstance(shape, Sequence) and all(isinstance(size, int) for size in shape)
    if value is None or not is_plain or not isinstance(blocksize, int) or not isinstance(quant_type, str):
        raise Declined(layer.node, "its shape or the format of its weight is computed in the graph")
    if any(node is not None and (not isinstance(node, fx.Node) or node.op != "placeholder") for node in nodes):
        raise Declined(layer.node, "its weight is computed in the graph, not a parameter")
    parameter = ctx.env.parameters.get(nodes[0].name)
    if parameter is None or parameter.trained:
        raise Declined(layer.node, "its packed weight is not a frozen parameter")
    live = tuple(None if node is None else ctx.env.values.get(node.name) for node in nodes)
    if any(node is not None and tensor is None for node, tensor in zip(nodes, live, strict=True)):
        raise Declined(layer.node, "its weight is not at hand while compiling")
    return QuantizedWeight(
        path=parameter.path,
        operands=tuple(None if node is None else node.name for node in nodes),
        values=live,
        shape=(int(shape[0]), int(shape[1])),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=value.dtype,
    )


def _check_autocast(layer: _Layer, gm: fx.GraphModule, ctx: PassContext) -> None:
    """Decline a layer that computes in another dtype than autocast would have the dense product compute in."""
    value = tensor_of(layer.operand("A"))
    cast = autocast_dtypes(gm.graph, ctx.env.autocast, value.device.type)[layer.node.name]
    if cast is not None and cast != value.dtype:
        wanted, given = (str(dtype).removeprefix("torch.") for dtype in (cast, value.dtype))
        raise Declined(
            layer.node,
            f"it computes in {given} under autocast to {wanted}: set bnb_4bit_compute_dtype=torch.{wanted}, "
            "and the layer can be sparse",
        )


def _rewrite(layer: _Layer, weight: QuantizedWeight, rewriter: Rewriter, ctx: PassContext) -> fx.Node:
    """Write a product with the dequantised weight; return that."""
    x, bias = layer.operand("A"), layer.operand("bias")
    packed, *scales = (layer.operand(name) for name in ("B", *_SCALES))
    with rewriter.before(layer.node):
        dense = rewriter.call(
            torch.ops.sparselora.dequantize_4bit.default,
            packed, *scales, list(weight.shape), weight.blocksize, weight.quant_type, weight.dtype,
        )  # fmt: skip
        mark_for_recomputation(dense)
        product = rewriter.call(LINEAR, x, dense, bias)
    ctx.facts = replace(ctx.facts, quantized_weights={**ctx.facts.quantized_weights, dense.name: weight})
    take_over(layer.product, product)
    _drop_clones(product)
    return dense


def _share(node: fx.Node, exposed: Mapping[str, fx.Node], ctx: PassContext) -> None:
    """Have what reads another dequantisation of an exposed weight read the first one."""
    if len(node.args) < 6:  # called by keywords, as bitsandbytes itself never does
        return
    packed, absmax, *form = node.args
    dense = exposed.get(_stored(packed).name) if isinstance(packed, fx.Node) else None
    if dense is None or not isinstance(absmax, fx.Node):
        return
    weight = ctx.facts.quantized_weights[dense.name]
    blocksize, quant_type, shape, dtype = form
    is_same = (blocksize, quant_type, dtype) == (weight.blocksize, weight.quant_type, weight.dtype)
    is_same = is_same and isinstance(shape, Sequence) and tuple(shape) == weight.shape
    if is_same and _are_scales(absmax, weight) and mutation_between(node, node.graph.output_node()) is None:
        node.replace_all_uses_with(dense)
        erase_unused(node)


def _are_scales(node: fx.Node, weight: QuantizedWeight) -> bool:
    """Tell whether a tensor holds the scales of a weight: those that are stored, or dequantised from them."""
    node = _stored(strip_casts(_stored(node)))
    if node.op == "placeholder":
        return node.name in weight.operands
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    # Quantised scales are stored without their mean.
    is_sum = calls_torch(node) and op_name(node) in SUMS and len(operands) == len(node.args) == 2
    is_dequantised = calls_bitsandbytes(node, "dequantize_blockwise")
    return (is_sum or is_dequantised) and all(_are_scales(each, weight) for each in operands)


def _drop_clones(product: fx.Node) -> None:
    """Forward clones of a product that are all that reads it; PEFT makes one before it adds an adapter's output."""
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        if op_name(user) == "clone" and calls_torch(user) and len(user.args) == 1 and not user.kwargs:
            forward_to(user, node)
        elif op_name(user) in CASTS and calls_torch(user):
            node = user
        else:
            return


class _Casts:
    """Gives layers that cast the same tensor to the same dtype one cast, so that they read one tensor."""

    def __init__(self) -> None:
        self.first: dict[Hashable, fx.Node] = {}

    def shared(self, layer: _Layer) -> _Layer:
        """Return the layer, reading an earlier cast in place of its own where there is one."""
        cast = layer.operand("A")
        if not (calls_torch(cast) and op_name(cast) in CASTS and isinstance(cast.args[0], fx.Node)):
            return layer
        value = tensor_value(cast)
        marks = cast.meta.get("ac_graph_id"), cast.meta.get("recompute")
        key = (cast.args[0], value.dtype if value is not None else None, marks)
        first = self.first.setdefault(key, cast)
        if first is cast or mutation_between(first, cast) is not None:
            return layer
        cast.replace_all_uses_with(first)
        erase_unused(cast)
        return replace(layer, operands={**layer.operands, "A": first})
