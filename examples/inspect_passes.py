"""Look inside: what the `sparselora` backend found in a model, what it decided, and what one pass did to the graph.

    python examples/inspect_passes.py
    python examples/inspect_passes.py --pass sparsify_attention --dump my_dump

Prints the report of `explain`, then compiles and runs one training step with a dump folder, and prints the difference
that one pass made, as `diff -u` between its dump and the one before it does.
"""

import argparse
import difflib
import itertools
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_compile import SparseLoRAConfig, explain

SPARSITY = {"layers.1.mlp": 0.9, "layers.1.self_attn": 0.5}
"""Named sites are made sparse even where, as in a model this small, that saves no time."""


def main() -> None:
    """Explain a model, dump its compilation and print what one pass did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass", dest="pass_name", default="sparsify_ffn", help="default: %(default)s")
    parser.add_argument("--dump", type=Path, default=Path("dumps/inspect_passes"), help="folder (default: %(default)s)")
    options = parser.parse_args()

    config = SparseLoRAConfig(layer_sparsity=SPARSITY, start_step=0, dump_dir=str(options.dump))
    print(explain(build_model(), **training_batch(), config=config), end="\n\n")

    model = build_model()
    model.compile(backend="sparselora", options=config.to_options())
    model(**training_batch()).loss.backward()
    print("\n".join(pass_difference(options.dump, options.pass_name)))


def build_model() -> nn.Module:
    """Build a small Llama with LoRA adapters on its attention, as the SparseLoRA paper trains."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])).train()


def training_batch() -> dict[str, torch.Tensor]:
    """Make a batch of two sequences of 32 tokens; the last 8 of each are the answer, which alone carries loss."""
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :-8] = -100
    return {"input_ids": tokens, "labels": labels}


def pass_difference(dump: Path, pass_name: str) -> list[str]:
    """Return the lines of `diff -u` between a pass's dump and the one before it, from the newest graph that has it.

    Raises:
        SystemExit: no graph was dumped after a pass of that name; says which there are.
    """
    known: set[str] = set()
    for graph in sorted(dump.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True):
        stages = sorted(graph.glob("[0-9][0-9]_*.txt"))
        changes = {after.stem[3:]: (before, after) for before, after in itertools.pairwise(stages)}
        if pass_name in changes:
            before, after = (path.read_text(encoding="utf-8").splitlines() for path in changes[pass_name])
            return list(difflib.unified_diff(before, after, *map(str, changes[pass_name]), lineterm=""))
        known |= changes.keys()
    raise SystemExit(f"no pass {pass_name!r} in {dump}; there are: {', '.join(sorted(known))}")


if __name__ == "__main__":
    main()
