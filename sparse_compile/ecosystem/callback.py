"""Tell the schedule where a `transformers.Trainer` run stands, and have its checkpointing work with the compiler.

This module imports transformers; `sparse_compile` itself does not, and loads the class on first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_compile.ecosystem.checkpointing import InputHooksOff
from sparse_compile.ecosystem.run_numbers import RunNumbers
from sparse_compile.ecosystem.trainer_logs import added_to_logs
from sparse_compile.torch_private.dynamo import whole_graphs_under_ddp
from sparse_compile.torch_private.modules import around_compiled_calls, backend_name
from sparse_compile.training.label_roles import LabelRoles, announced_labels
from sparse_compile.training.news import say
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
    is off while a run lasts, where that changes no gradient (`checkpointing.InputHooksOff`).

    With the option `token_bucket` the output tokens of a batch are counted in the labels that the model is called with:
    for nothing where they are on the CPU, and by waiting for the device once a step where the trainer has moved them.

    The numbers of a run are in what the trainer logs, and so in its progress bar, in TensorBoard, W&B and MLflow:
    docs/usage.md lists them. A line at the end says what the run came to.

    In a distributed run TorchDynamo leaves graphs whole under DDP (`torch._dynamo.config.optimize_ddp` is off while the
    run lasts), and under FSDP2, whose blocks are graphs of their own, the labels of a batch give its roles.
    """

    def __init__(self) -> None:
        self._session: Session | None = None
        self._numbers: RunNumbers | None = None
        self._label_roles: LabelRoles | None = None
        self._input_hooks: InputHooksOff | None = None
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
        self._numbers = None
        self._input_hooks = None
        self._give_position(state)
        if model is not None and trained:
            self._input_hooks = InputHooksOff(model)
            self._undo.callback(self._input_hooks.close)
            compiled = [module for module in model.modules() if backend_name(module) == "sparselora"]
            if compiled:
                self._undo.enter_context(whole_graphs_under_ddp())
                self._watch_run(trained[0].device)
            for module in compiled:
                self._undo.enter_context(around_compiled_calls(module, self._announced))
        if sharded is not None and trained:
            self._label_roles = LabelRoles(sharded)
            self._undo.callback(self._label_roles.remove)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring back what was taken off the model, and say what the run came to."""
        self._undo.close()
        if self._numbers is not None and (line := self._numbers.closing_line()):
            say(line)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the position before the first forward of an optimizer step."""
        self._give_position(state)
        self._renew_input_hooks()
        if self._numbers is not None:
            self._numbers.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the time of an optimizer step."""
        if self._numbers is not None:
            self._numbers.end()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the roles of a batch whose gradients are accumulated."""
        self._close_roles()
        self._renew_input_hooks()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the roles of the last batch of an optimizer step, and note which function it computed."""
        self._close_roles()
        if self._numbers is not None:
            self._numbers.computed()

    def _watch_run(self, device: torch.device) -> None:
        """Measure the run, and have the trainer log it."""
        if self._session is not None:
            self._numbers = RunNumbers(self._session, device)
            self._undo.enter_context(added_to_logs(self, self._numbers.take))

    def _announced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return what stands around a call of the compiled model; its labels are counted."""
        labels = kwargs.get("labels")
        if self._numbers is not None and torch.is_grad_enabled() and isinstance(labels, Tensor) and labels.dim() == 2:
            config = None if self._session is None else self._session.config
            self._numbers.called_with(labels, -100 if config is None else config.ignore_index)
        return announced_labels(args, kwargs)

    def _renew_input_hooks(self) -> None:
        if self._input_hooks is not None:
            self._input_hooks.renew()

    def _close_roles(self) -> None:
        if self._label_roles is not None:
            self._label_roles.close()

    def _give_position(self, state: TrainerState) -> None:
        if self._session is not None:
            # A trainer asked for no epoch at all gives 0 as the length of the run.
            self._session.set_position(state.global_step, state.max_steps if state.max_steps > 0 else None)
