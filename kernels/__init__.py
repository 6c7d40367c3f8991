"""The semantic ops of the `sparselora` library; importing this package registers them with PyTorch."""

if __name__ == "kernels":
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(__file__), "stand_aside.py"))["stand_aside"](__name__, __file__)
else:
    from sparse_compile.kernels import (
        causal_attention,
        channel_selection,
        dequantize_4bit,
        dora_norm,
        flop_formulas,
        frozen_linear,
        fused_linear,
        gathered_linear,
        loss_rows,
        masked_linear,
        merged_linear,
        observed_rows,
        queried_attention,
        roles,
        token_rows,
    )

__all__ = [
    "causal_attention",
    "channel_selection",
    "dequantize_4bit",
    "dora_norm",
    "flop_formulas",
    "frozen_linear",
    "fused_linear",
    "gathered_linear",
    "loss_rows",
    "masked_linear",
    "merged_linear",
    "observed_rows",
    "queried_attention",
    "roles",
    "token_rows",
]
