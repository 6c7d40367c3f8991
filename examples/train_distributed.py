"""Fine-tune a small model with LoRA on several processes, in a plain loop: data parallel by DDP, or sharded by FSDP2.

    torchrun --nproc-per-node 2 examples/train_distributed.py           # DDP
    torchrun --nproc-per-node 2 examples/train_distributed.py --fsdp    # FSDP2

It makes its model on the spot. What a script of your own needs is in `data_parallel`, `sharded` and `train`.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from finetuning.demo_model import DemoSize, as_records, pretrained
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparse_compile import Schedule, token_roles
from sparse_compile.cli.records import Collator, Example, pad_token_id, tokenize

BACKEND = "sparselora"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="shard by FSDP2 instead of DDP")
    parser.add_argument("--preset", default="o2", help="preset of the backend (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--pretrain-steps", type=int, default=64)
    parser.add_argument("--out", default="out/distributed")
    options = parser.parse_args()

    dist.init_process_group()  # NCCL where there are GPUs, gloo elsewhere
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if dist.get_rank() != 0:
        logging.disable(logging.WARNING)

    size = DemoSize(layers=options.layers, hidden=options.hidden, pretrain_steps=options.pretrain_steps)
    base, tokenizer, problems = pretrained(size, seed=0)
    examples, _ = tokenize(as_records(problems, "stories"), tokenizer, max_length=512)
    torch.manual_seed(0)  # every process starts from the same adapters
    adapted = get_peft_model(
        base, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    ).to(device)
    backend_options = {"preset": options.preset, "schedule": Schedule(total_steps=options.steps)}
    model = sharded(adapted, backend_options) if options.fsdp else data_parallel(adapted, backend_options)

    train(model, examples, Collator(pad_token_id(tokenizer), 32, 512), device, options)
    save(model, options.out)
    dist.destroy_process_group()


def data_parallel(model: PeftModel, options: dict[str, Any]) -> nn.Module:
    """Compile in place, then wrap."""
    # By default Dynamo cuts the graph into buckets of trained parameters, where the blocks never see the labels.
    torch._dynamo.config.optimize_ddp = False
    model.compile(backend=BACKEND, options=options)
    return DistributedDataParallel(model)


def sharded(model: PeftModel, options: dict[str, Any]) -> nn.Module:
    """Compile and shard each block, then shard what is left."""
    for block in model.get_base_model().model.layers:
        block.compile(backend=BACKEND, options=options)
        fully_shard(block)
    return fully_shard(model)


def train(
    model: nn.Module, examples: list[Example], collate: Collator, device: torch.device, options: argparse.Namespace
) -> None:
    """Train the adapters; each process draws batches of its own."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    rng = random.Random(dist.get_rank())
    model.train()
    for step in range(options.steps):
        batch = {key: value.to(device) for key, value in collate(rng.sample(examples, options.batch_size)).items()}
        # A block that is compiled alone never sees the labels.
        with token_roles(labels=batch["labels"]) if options.fsdp else nullcontext():
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if dist.get_rank() == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step}: loss {mean.item() / dist.get_world_size():.4f}", flush=True)


def save(model: nn.Module, folder: str) -> None:
    """Gather what was trained on the first process and write it: a plain PEFT adapter."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    wanted = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    trained = get_model_state_dict(model, options=wanted)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=trained)
        print(f"adapter: {folder}")


if __name__ == "__main__":
    main()
