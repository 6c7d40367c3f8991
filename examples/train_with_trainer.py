"""Fine-tune a model with LoRA, `transformers.Trainer` and the `sparselora` backend: the shortest honest use.

    python examples/train_with_trainer.py                                     # a small model made on the spot
    python examples/train_with_trainer.py --model DIR_OR_HUB_ID --data train.jsonl --steps 300

Two lines make the difference: `model.compile(backend="sparselora")`, and the callback that tells the backend how long
the run is, so that its first twentieth stays dense.
"""

import argparse

import torch
from finetuning.demo_model import DemoSize, as_records, pretrained
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sparse_compile import SparseLoRACallback
from sparse_compile.cli.records import Collator, pad_token_id, read_records, tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a causal language model")
    parser.add_argument("--data", help=".jsonl file or hub id of the rows to learn")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pretrain-steps", type=int, default=64, help="of the model made on the spot")
    parser.add_argument("--layers", type=int, default=8, help="of the model made on the spot")
    parser.add_argument("--out", default="out/adapter")
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")

    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
        records = read_records(options.data)
    else:
        size = DemoSize(layers=options.layers, pretrain_steps=options.pretrain_steps)
        model, tokenizer, problems = pretrained(size, seed=0)
        records = as_records(problems, "stories")
    examples, _ = tokenize(records, tokenizer, max_length=512)

    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    model.compile(backend="sparselora", options={"preset": "o1"})
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=10,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.accelerator.is_available(),  # several processes would find no device else
            remove_unused_columns=False,  # the collator below takes the examples as they are
        ),
        train_dataset=examples,
        data_collator=Collator(pad_token_id(tokenizer), multiple_of=32, max_length=512),
        callbacks=[SparseLoRACallback()],
    )
    trainer.train()
    model.save_pretrained(options.out)  # a plain PEFT adapter: nothing of the backend is in it
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    main()
