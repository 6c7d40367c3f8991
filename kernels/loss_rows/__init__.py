"""Rows of the loss: which they are, taking them, and putting them back."""

from sparse_compile.kernels.loss_rows.op import loss_rows, loss_slots, place_rows, select_rows

__all__ = ["loss_rows", "loss_slots", "place_rows", "select_rows"]
