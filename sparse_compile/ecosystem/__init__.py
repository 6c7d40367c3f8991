"""What connects the backend to transformers, PEFT and a pruned model's life after training."""
