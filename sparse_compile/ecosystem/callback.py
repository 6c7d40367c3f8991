"""Tell the schedule where a `transformers.Trainer` run stands, and have its checkpointing work with the compiler.

This module imports transformers; `sparse_compile` itself does not, and loads the class on first use.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_compile.ecosystem.checkpointing import without_input_hooks
from sparse_compile.torch_private.dynamo import whole_graphs_under_ddp
from sparse_compile.torch_private.modules import around_compiled_calls, backend_name
from sparse_compile.training.label_roles import LabelRoles, announced_labels
from sparse_compile.training.session import Session, session_for
from sparse_compile.training.sharded import is_sharded

__all__ = ["SparseLoRACallback"]


class SparseLoRACallback(TrainerCallback):
    """Supply the length of the run and the position in it, and let activation checkpointing be compiled.

        model.compile(backend="sparselora", options={"start_step": 0.1, "end_step": 0.9})
        Trainer(model, args, train_dataset=data, callbacks=[SparseLoRACallback()]).train()

    The trainer's own `global_step` overrides the counted steps before each optimizer step, so that a run which resumes
    from a checkpoint resumes its phase too. The model may be compiled before or after the trainer is made, and may be
    wrapped by accelerate: what ties them together is its trained parameters.

    With `gradient_checkpointing=True`, re-entrant or not, a hook would cut the model's graph behind the embedding. It
    is off while a run lasts, where that changes no gradient (`checkpointing.without_input_hooks`).

    With the option `token_bucket` the output tokens of a batch are counted in the labels that the model is called with:
    for nothing where they are on the CPU, and by waiting for the device once a step where the trainer has moved them.

    In a distributed run TorchDynamo leaves graphs whole under DDP (`torch._dynamo.config.optimize_ddp` is off while the
    run lasts), and under FSDP2, whose blocks are graphs of their own, the labels of a batch give its roles.
    """

    def __init__(self) -> None:
        self._session: Session | None = None
        self._label_roles: LabelRoles | None = None
        self._undo = ExitStack()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the session of the model, or make it, and give it the run's length and position."""
        self._undo.close()  # of a run that an error ended
        trained = [] if model is None else [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Nothing is trained: no graph of this model can be sparse, and there is nothing to tie a session to.
        sharded = model if model is not None and is_sharded(model) else None
        self._session = session_for(trained, sharded=sharded) if trained else None
        self._give_position(state)
        if model is not None and trained:
            self._undo = without_input_hooks(model)
            compiled = [module for module in model.modules() if backend_name(module) == "sparselora"]
            if compiled:
                self._undo.enter_context(whole_graphs_under_ddp())
            for module in compiled:
                self._undo.enter_context(around_compiled_calls(module, announced_labels))
        if sharded is not None and trained:
            self._label_roles = LabelRoles(sharded)
            self._undo.callback(self._label_roles.remove)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring back what was taken off the model."""
        self._undo.close()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the position before the first forward of an optimizer step."""
        self._give_position(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the roles of a batch whose gradients are accumulated."""
        self._close_roles()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the roles of the last batch of an optimizer step."""
        self._close_roles()

    def _close_roles(self) -> None:
        if self._label_roles is not None:
            self._label_roles.close()

    def _give_position(self, state: TrainerState) -> None:
        if self._session is not None:
            # A trainer asked for no epoch at all gives 0 as the length of the run.
            self._session.set_position(state.global_step, state.max_steps if state.max_steps > 0 else None)
