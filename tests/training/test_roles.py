from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from sparse_compile import reference
from sparse_compile.kernels.roles.given import current_roles
from sparse_compile.training import roles
from sparse_compile.training.roles import token_roles


def _labels(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


class TestOutputTokens:
    def test_a_position_is_output_if_it_carries_a_label_or_predicts_one(self) -> None:
        labels = _labels([-100, -100, -100, 7, 8, -100])
        with token_roles(labels=labels) as mask:
            assert mask.tolist() == [[False, False, True, True, True, False]]

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ([-100, -100, -100], [False, False, False]),
            ([1, 2, 3], [True, True, True]),
            ([-100, -100, 3], [False, True, True]),
            ([3, -100, -100], [True, False, False]),
            # Packed or multi-turn: every run of labels wakes the position before it.
            ([1, -100, -100, 2], [True, False, True, True]),
            ([5], [True]),
            ([-100], [False]),
        ],
    )
    def test_rows(self, row: list[int], expected: list[bool]) -> None:
        with token_roles(labels=_labels(row)):
            mask = current_roles()
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.tolist() == [expected]

    def test_ignore_index_is_the_callers(self) -> None:
        with token_roles(labels=_labels([0, 0, 5]), ignore_index=0) as mask:
            assert mask.tolist() == [[False, True, True]]

    def test_empty_sequence_and_empty_batch(self) -> None:
        for shape in ((2, 0), (0, 3)):
            with token_roles(labels=torch.empty(shape, dtype=torch.long)) as mask:
                assert mask.shape == shape

    def test_agrees_with_the_reference_on_random_labels(self) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 9, (6, 17), generator=generator)
        labels[torch.rand(6, 17, generator=generator) < 0.6] = -100
        with token_roles(labels=labels) as mask:
            assert torch.equal(mask, reference.output_mask_from_labels(labels))

    def test_labels_are_left_alone(self) -> None:
        labels = _labels([-100, 1])
        with token_roles(labels=labels):
            assert labels.tolist() == [[-100, 1]]

    @pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.uint8])
    def test_a_mask_may_be_bool_or_zeros_and_ones(self, dtype: torch.dtype) -> None:
        with token_roles(output_mask=torch.tensor([[0, 1, 1]], dtype=dtype)) as mask:
            assert mask.dtype == torch.bool
            assert mask.tolist() == [[False, True, True]]


class TestMistakes:
    def test_exactly_one_source(self) -> None:
        labels = _labels([1, 2])
        with pytest.raises(ValueError, match="exactly one"):
            token_roles()
        with pytest.raises(ValueError, match="exactly one"):
            token_roles(labels=labels, output_mask=labels > 1)

    @pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
    def test_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"labels must have shape \(batch, sequence\)"):
            token_roles(labels=torch.zeros(shape, dtype=torch.long))
        with pytest.raises(ValueError, match=r"output_mask must have shape \(batch, sequence\)"):
            token_roles(output_mask=torch.zeros(shape, dtype=torch.bool))

    def test_dtype_and_type(self) -> None:
        with pytest.raises(ValueError, match="labels must hold integers"):
            token_roles(labels=torch.zeros(1, 2))
        with pytest.raises(ValueError, match="labels must hold integers"):
            token_roles(labels=torch.zeros(1, 2, dtype=torch.bool))
        with pytest.raises(ValueError, match="output_mask must hold bools"):
            token_roles(output_mask=torch.zeros(1, 2))
        with pytest.raises(ValueError, match="must be a tensor"):
            token_roles(labels=[[1, 2]])  # type: ignore[arg-type]

    def test_an_integer_mask_holds_zeros_and_ones_only(self) -> None:
        # A tensor of labels passed as the mask, most likely.
        with pytest.raises(ValueError, match="only 0 and 1"):
            token_roles(output_mask=_labels([-100, 1]))


class TestBlock:
    def test_nothing_is_given_outside(self) -> None:
        assert current_roles() is None
        assert roles.ROLES_GIVEN is False

    def test_a_block_that_is_made_but_not_entered_gives_nothing(self) -> None:
        token_roles(labels=_labels([1]))
        assert current_roles() is None

    def test_blocks_nest_and_restore(self) -> None:
        with token_roles(output_mask=torch.tensor([[True]])) as outer:
            with token_roles(output_mask=torch.tensor([[False]])) as inner:
                assert current_roles() is inner
                assert roles.ROLES_GIVEN
            assert current_roles() is outer
            assert roles.ROLES_GIVEN
        assert current_roles() is None
        assert not roles.ROLES_GIVEN

    def test_one_block_may_be_entered_again_and_within_itself(self) -> None:
        block = token_roles(output_mask=torch.tensor([[True]]))
        for _ in range(2):
            with block, block:
                assert current_roles() is not None
            assert current_roles() is None
        assert not roles.ROLES_GIVEN

    def test_an_exception_ends_the_roles(self) -> None:
        with pytest.raises(RuntimeError, match="inside"), token_roles(labels=_labels([1])):
            raise RuntimeError("inside")
        assert current_roles() is None
        assert not roles.ROLES_GIVEN

    def test_roles_are_the_threads_own_while_the_guarded_flag_spans_all(self) -> None:
        seen: list[object] = []
        with token_roles(labels=_labels([1])):
            thread = threading.Thread(target=lambda: seen.extend([current_roles(), roles.ROLES_GIVEN]))
            # A thread starts with a context of its own (with a copy of ours only where the interpreter is told so).
            thread.start()
            thread.join()
        assert seen == [None, True]

    def test_the_flag_lasts_until_the_last_thread_leaves(self) -> None:
        inside, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with token_roles(labels=_labels([1])):
                inside.set()
                leave.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        assert inside.wait(10)
        with token_roles(labels=_labels([1])):
            pass
        assert roles.ROLES_GIVEN
        leave.set()
        thread.join()
        assert not roles.ROLES_GIVEN

    def test_tasks_of_one_thread_do_not_mix(self) -> None:
        async def task(value: bool) -> list[list[bool]]:
            with token_roles(output_mask=torch.tensor([[value]])):
                await asyncio.sleep(0)
                mask = current_roles()
                assert mask is not None
                return mask.tolist()

        async def both() -> list[list[list[bool]]]:
            return list(await asyncio.gather(task(True), task(False)))

        assert asyncio.run(both()) == [[[True]], [[False]]]

    def test_dynamo_guards_on_the_flag(self) -> None:
        compiled = 0

        def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
            nonlocal compiled
            compiled += 1
            return gm

        def step(x: torch.Tensor) -> torch.Tensor:
            return x + 1 if roles.ROLES_GIVEN else x - 1

        torch._dynamo.reset()
        fast = torch.compile(step, backend=backend)
        x = torch.zeros(2)
        for _ in range(3):
            assert fast(x).tolist() == [-1, -1]
            with token_roles(labels=_labels([1])):
                assert fast(x).tolist() == [1, 1]
        assert compiled == 2
