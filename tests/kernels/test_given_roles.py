"""The roles that a training loop gives, as the op reads them."""

from __future__ import annotations

from contextvars import copy_context

import pytest
import torch

from sparse_compile.kernels.roles import given_output_mask
from sparse_compile.kernels.roles.given import current_roles, pop_roles, push_roles


def test_the_last_roles_are_in_force() -> None:
    outer, inner = torch.tensor([[True]]), torch.tensor([[False]])
    assert current_roles() is None
    push_roles(outer)
    push_roles(inner)
    assert current_roles() is inner
    pop_roles()
    assert current_roles() is outer
    pop_roles()
    assert current_roles() is None


def test_a_copied_context_changes_nothing_here() -> None:
    mask = torch.tensor([[True]])
    push_roles(mask)
    copy_context().run(pop_roles)
    assert current_roles() is mask
    pop_roles()


def test_the_op_reads_them_and_says_where_there_are_none() -> None:
    tokens = torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError, match="which has closed"):
        given_output_mask(tokens)
    push_roles(torch.tensor([[False, True]]))
    assert given_output_mask(tokens).tolist() == [[False, True]]
    with pytest.raises(ValueError, match=r"roles of shape \(1, 2\) for tokens of \(1, 3\)"):
        given_output_mask(torch.zeros(1, 3, 3))
    pop_roles()
