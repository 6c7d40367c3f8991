"""Which ops have providers: the table of each, by op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from sparse_compile.kernels.causal_attention.op import CAUSAL_ATTENTION, CAUSAL_ATTENTION_BACKWARD
from sparse_compile.kernels.channel_selection.op import PREDICTED_NORMS, PREDICTED_SCORES, TOP_CHANNELS
from sparse_compile.kernels.frozen_linear.op import FROZEN_LINEAR
from sparse_compile.kernels.fused_linear.op import FUSED_LINEAR, GRADIENTS
from sparse_compile.kernels.gathered_linear.op import GATHERED_INPUT_LINEAR, GATHERED_LINEAR
from sparse_compile.kernels.masked_linear.op import EXACT_GRADIENTS, MASKED_INPUT_GRADIENT, MASKED_LINEAR
from sparse_compile.kernels.providers import ProviderTable
from sparse_compile.kernels.queried_attention.op import QUERIED_ATTENTION, QUERIED_ATTENTION_BACKWARD
from sparse_compile.kernels.token_rows.op import PUT_ROWS, TAKE_ROWS

_OPS = torch.ops.sparselora

PROVIDERS: Final[Mapping[Any, ProviderTable]] = {
    _OPS.take_rows.default: TAKE_ROWS,
    _OPS.put_rows.default: PUT_ROWS,
    _OPS.gathered_linear.default: GATHERED_LINEAR,
    _OPS.gathered_input_linear.default: GATHERED_INPUT_LINEAR,
    _OPS.fused_linear.default: FUSED_LINEAR,
    _OPS.fused_linear_gradients.default: GRADIENTS,
    _OPS.predicted_norms.default: PREDICTED_NORMS,
    _OPS.predicted_scores.default: PREDICTED_SCORES,
    _OPS.top_channels.default: TOP_CHANNELS,
    _OPS.frozen_linear.default: FROZEN_LINEAR,
    _OPS.causal_attention.default: CAUSAL_ATTENTION,
    _OPS.causal_attention_backward.default: CAUSAL_ATTENTION_BACKWARD,
    _OPS.queried_attention.default: QUERIED_ATTENTION,
    _OPS.queried_attention_backward.default: QUERIED_ATTENTION_BACKWARD,
    _OPS.masked_linear.default: MASKED_LINEAR,
    _OPS.masked_input_gradient.default: MASKED_INPUT_GRADIENT,
    _OPS.masked_factor_gradients.default: EXACT_GRADIENTS,
}
"""By op, its providers: every op with a parameter `provider`."""
