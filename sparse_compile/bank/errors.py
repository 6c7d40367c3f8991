"""The one error of the room."""

from __future__ import annotations


class BankError(ValueError):
    """A bank, an adapter or data that cannot be used; the message names it, the reason and the way out."""
