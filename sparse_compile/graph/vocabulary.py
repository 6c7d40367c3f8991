"""The vocabulary of captured graphs: kinds of calls by their names, and the names of their parameters.

A call is known by its bare name (`read.op_name`), whichever of `torch.add`, `operator.add`, `Tensor.add` and
`aten.add.Tensor` it is spelt as. Every pass takes its sets of names from here, so that a spelling that one pass knows
is known to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sparse_compile.torch_private.aten import LINEAR

__all__ = [
    "CASTS",
    "CONJUNCTIONS",
    "COPIES",
    "DIFFERENCES",
    "ELEMENTWISE",
    "EQUALITIES",
    "IN_PLACE",
    "LINEAR",
    "MATMULS",
    "MODE_SWITCHES",
    "MULTIPLICATIONS",
    "NORMALISATIONS",
    "NOT_AFTER",
    "NOT_BEFORE",
    "PARAMETERS",
    "PRODUCTS",
    "REDUCTIONS",
    "REGROUPINGS",
    "SOFTMAXES",
    "SPLITS",
    "SUMS",
    "TAG",
    "TRANSPOSES",
    "VECTOR_NORMS",
    "VIEWS",
]

TAG: Final = "sparselora"
"""Key of `node.meta` under which a rewrite records its pass and site."""

# --- Kinds of calls ---------------------------------------------------------------------------------------------------

CASTS: Final = frozenset({"to", "type", "float", "double", "half", "bfloat16", "type_as"})
"""Calls that change the dtype (or the device) of a tensor and nothing else."""

COPIES: Final = frozenset({"contiguous", "clone", "detach"})
"""Calls whose result holds the same values in the same places."""

REGROUPINGS: Final = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
)
"""Calls that keep the row-major order of a tensor and give it other dimensions."""

VIEWS: Final = REGROUPINGS - {"view_as", "reshape_as"}
"""Regroupings whose shape stands in the call itself."""

TRANSPOSES: Final = frozenset({"t", "transpose", "permute", "swapaxes", "swapdims", "numpy_T", "adjoint"})
"""Calls that may exchange dimensions."""

SPLITS: Final = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind"})
"""Calls that return the parts of a tensor along one dimension."""

# Element by element, of two operands.
SUMS: Final = frozenset({"add", "iadd", "add_", "__add__", "__iadd__"})
DIFFERENCES: Final = frozenset({"sub", "__sub__", "isub"})
MULTIPLICATIONS: Final = frozenset({"mul", "__mul__", "imul"})

MATMULS: Final = frozenset({"matmul", "__matmul__", "mm", "bmm"})
"""Matrix products of two operands."""
PRODUCTS: Final = MATMULS | {"baddbmm"}
"""Matrix products; `baddbmm` adds a tensor to one, such as the bias of positions (ALiBi)."""

SOFTMAXES: Final = frozenset({"softmax", "_softmax", "_safe_softmax"})
NORMALISATIONS: Final = frozenset({"layer_norm", "rms_norm"})
VECTOR_NORMS: Final = frozenset({"norm", "linalg_norm", "linalg_vector_norm", "vector_norm"})
REDUCTIONS: Final = VECTOR_NORMS | {"mean", "sum", "var", "std", "amax", "amin", "logsumexp"}
"""Calls that make one value of all along some dimensions."""

EQUALITIES: Final = frozenset({"ne", "eq", "__ne__", "__eq__"})
CONJUNCTIONS: Final = frozenset({"and_", "__and__", "logical_and", "bitwise_and"})
NOT_AFTER: Final = frozenset({"le", "__le__", "lt", "__lt__", "less", "less_equal"})
NOT_BEFORE: Final = frozenset({"ge", "__ge__", "gt", "__gt__", "greater", "greater_equal"})

_UNARY = {
    "abs", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos", "elu", "erf", "erfc", "exp", "expm1", "gelu",
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log1p", "logsigmoid", "mish", "neg", "negative",
    "pow", "reciprocal", "relu", "relu6", "rsqrt", "selu", "sigmoid", "silu", "sin", "softplus", "softsign", "sqrt",
    "square", "tanh",
}  # fmt: skip
_BINARY = {"add", "sub", "subtract", "mul", "multiply", "div", "divide", "truediv", "maximum", "minimum"}
ELEMENTWISE: Final = frozenset(
    _UNARY | _BINARY | CASTS | NOT_AFTER | NOT_BEFORE | {"contiguous", "clone", "dropout", "where"}
)
"""Calls that map each element of their tensors on its own (dropout draws for each element: it does)."""

IN_PLACE: Final = frozenset({
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "setitem",
})  # fmt: skip
"""Functions of `operator` that may write to their first operand."""

MODE_SWITCHES: Final = frozenset({
    "_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode",
})  # fmt: skip
"""Calls that change how the calls after them are executed, and compute nothing."""

# --- Parameters -------------------------------------------------------------------------------------------------------

_PARAMETERS: Final = {
    "addmm": "input mat1 mat2",
    "baddbmm": "input batch1 batch2",
    "cat concat stack": "tensors dim",
    "chunk": "input chunks dim",
    "cross_entropy": "input target weight size_average ignore_index reduce reduction label_smoothing",
    "dropout": "input p training|train inplace",
    "_enter_autocast": "device_type dtype enabled cache_enabled",
    "layer_norm": "input normalized_shape weight bias eps",
    "linear": "input weight bias",
    "matmul __matmul__ mm bmm": "input other|mat2|tensor2",
    "narrow": "input dim start length",
    "mean sum amax amin logsumexp": "input dim keepdim",
    "norm linalg_norm linalg_vector_norm vector_norm": "input|x ord|p dim keepdim dtype",
    "pad": "input pad mode value",
    "permute": "input dims",
    "rms_norm": "input normalized_shape weight eps",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale",
    "softmax _safe_softmax log_softmax": "input dim dtype",
    "_softmax": "input dim half_to_float",
    "split split_with_sizes tensor_split": (
        "input|tensor sizes|split_size|split_sizes|split_size_or_sections|indices_or_sections dim"
    ),
    "sub __sub__ isub ne eq __ne__ __eq__": "input other",
    "swapaxes swapdims transpose": "input dim0|axis0 dim1|axis1",
    "tril": "input diagonal",
    "unsqueeze squeeze unbind": "input dim",
    "var std": "input dim unbiased|correction keepdim",
}
"""Names of calls to the names of their parameters, in order; `a|b` are two spellings of one."""

PARAMETERS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    name: tuple(tuple(parameter.split("|")) for parameter in parameters.split())
    for names, parameters in _PARAMETERS.items()
    for name in names.split()
}
"""By name of a call, the spellings of each of its parameters, in order: builtins of PyTorch have no signature."""
