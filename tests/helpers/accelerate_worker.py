"""One process of `accelerate launch`: two steps of a Trainer, sparse from the first; what it saw goes to a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import sparse_compile.compiler.executable as executable
from adapter_rows import SITES, peft
from distributed_worker import op_by_op
from models import batch
from oracle import told
from sparse_compile import SparseLoRACallback
from sparse_compile.kernels.channel_selection import record_channels

STEPS = 2


def main(out: Path) -> None:
    executable.compile_with_inductor = op_by_op  # type: ignore[assignment]
    torch.manual_seed(0)
    model = peft()()
    model.compile(backend="sparselora", options={"layer_sparsity": SITES, "preset": "none", "start_step": 0})
    data = batch(97, rows=8, length=12)
    rows: Any = [{name: values[i] for name, values in data.items()} for i in range(8)]
    settings = TrainingArguments(
        output_dir=str(out / "run"), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[SparseLoRACallback()])
    with told() as messages, record_channels() as record:
        trainer.train()
    trained = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    found = {"ranks": settings.world_size, "told": messages, "trained": trained, "chosen": dict(record)}
    torch.save(found, out / f"rank{settings.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
