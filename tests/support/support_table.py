"""Write `docs/support.md` from the rows of the support matrix: `python tests/support/support_table.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
PAGE = TESTS.parent / "docs" / "support.md"

HEAD = """# What is supported

Written from the tests by `make support`; do not edit. Each entry of a table is a test that passes. Where a model stays
dense, the test shows that it trains as without this backend, and that one warning has the words of the last column.

## In short

* **Models**: decoder models (Llama, Mistral, Qwen2, Qwen3, Gemma 2, Phi-3, GPT-NeoX, GPT-2, OPT, the attention of
  Mixtral, T5's decoder) and hand-written ones. q, k, v and gate, up may be apart or fused in one weight. Heads may be
  grouped. Models are matched by dataflow, not by name.
* **Adapters**: LoRA on any of the layers, or on the attention alone; rsLoRA, adapter dropout and bias, several active
  adapters; DoRA, in one graph, on a 4-bit base too; QLoRA with bitsandbytes (NF4, FP4, nested or not); hand-written
  branches. Adapters may be exchanged, hot-swapped, disabled or merged in between.
* **Precision**: fp32, bf16, fp64; autocast inside or outside the compiled code; fp32 adapters on a bf16 base.
* **Batches**: ragged prompts, padding on the left or right, packing, several turns. Lengths and splits may change at
  every step.
* **Training**: a plain loop, `transformers.Trainer`, TRL, Accelerate, gradient accumulation ([usage.md](usage.md)).
* **Memory**: gradient checkpointing, re-entrant or not; PyTorch's activation memory budget ([memory.md](memory.md)).
* **Several processes**: DDP and FSDP2, tested with two gloo processes on a CPU ([distributed.md](distributed.md)).
* **Devices**: a CPU has providers of its own. Any other device has the reference providers, or generated Triton kernels
  (`kernels="triton"`, [kernels.md](kernels.md)). **Neither has been run on a GPU yet.**
* **Not yet**: DoRA on a fused layer, routed experts, latent attention (DeepSeek), differential attention, feed-forward
  blocks with a norm inside (BitNet) or an activation with a gradient of its own (BLOOM),
  8-bit bases, torchao's quantisation, labels that leave the model
  (label smoothing, `compute_loss_func`), tensor parallel. These train densely, and a warning says so and why.

## Models

Each is a model of one block, of random weights: its loss and the gradient of every adapter equal those of the
masked-dense oracle at sparsity 0.5, and its frozen layers outside of sparse sites are those of the last column (its
embeddings and its head aside). Where nothing is asked for, Inductor gets the very graph that was captured of it: it
trains bit-equal to a compilation without this backend.

| model | sparse feed-forward sites | sparse attention sites | layers that stay dense |
|---|---|---|---|
"""

SECTIONS = {
    "Adapters": "On two blocks of a Llama, against the masked-dense oracle; what is dense, against the eager model.",
    "Training": "Every training forward is sparse, and nothing is warned of; or all are dense, and a warning says why.",
    "Shapes": "Against the masked-dense oracle.",
    "Distributed": "Two processes on CPUs, through gloo, against single ones. See [distributed.md](distributed.md).",
}


BETWEEN_STEPS = """What may change under a compiled model. The next step equals that of a fresh compilation: in fp64,
with the exact passes, with sparse sites and with LoRS. What is computed once from frozen weights follows them in place:
a predictor's factors, and which layers are pruned. An info line says so. On an accelerator a write through `p.data` is
seen one step late. The second column says how many graphs the next step compiles."""


def support_page() -> str:
    """Return the text of the page."""
    import held_rows
    from adapter_rows import ADAPTERS
    from test_adapters_declined import DECLINED_BASES
    from test_hand_written_adapters import SPELLINGS
    from test_training_supported import DENSE_TRAINING, TRAINING

    parts = [HEAD, *_models()]
    own = {
        "Adapters": [
            *_rows(ADAPTERS, "test_adapters_supported.py::test_an_adapter_trains_as_the_oracle_says"),
            *_rows(SPELLINGS, "test_hand_written_adapters.py::test_a_spelling_trains_as_the_oracle_says"),
            *_rows(DECLINED_BASES, "test_adapters_declined.py::test_a_base_that_is_declined_trains_dense_and_says_so"),
        ],
        "Training": [
            *_rows(TRAINING, "test_training_supported.py::test_a_way_to_train_is_sparse_at_every_step"),
            *_rows(DENSE_TRAINING, "test_training_supported.py::test_labels_that_leave_the_model_are_told_of"),
        ],
    }
    elsewhere = {
        "Adapters": held_rows.ADAPTERS,
        "Training": held_rows.TRAINING,
        "Shapes": held_rows.SHAPES,
        "Distributed": held_rows.DISTRIBUTED,
    }
    for section, text in SECTIONS.items():
        lines = [
            *own.get(section, ()),
            *(f"| {row.title} | {row.outcome} | `tests/{row.test}` |\n" for row in elsewhere[section]),
        ]
        parts += [f"\n## {section}\n\n{text}\n\n| | sparse | test |\n|---|---|---|\n", *lines]
    return "".join([*parts, *_changes()])


def _changes() -> Iterable[str]:
    from held_rows import CHANGES as CHANGES_ELSEWHERE
    from test_changes_between_steps import CHANGES

    yield f"\n## Between steps\n\n{BETWEEN_STEPS}\n\n| what changes | compilations | test |\n|---|---|---|\n"
    test = "tests/support/test_changes_between_steps.py::test_the_next_step_is_that_of_a_fresh_compilation"
    for name, change in CHANGES.items():
        few = ", none with the exact passes alone" if change.derived and change.compilations else ""
        yield f"| {change.title} | {change.compilations}{few} | `{test}[{name}]` |\n"
    yield from (f"| {row.title} | {row.outcome} | `tests/{row.test}` |\n" for row in CHANGES_ELSEWHERE)


def _models() -> Iterable[str]:
    from model_zoo import DECLINED, MODELS

    for row in (*MODELS.values(), *DECLINED.values()):
        ffn = sum(isinstance(form, str) for form in row.sites.values())
        kinds = ["yes" if count else "none" for count in (ffn, len(row.sites) - ffn)]
        stays = ", ".join(f"`{part}`" + (f" ({words})" if words else "") for part, words in row.stays.items())
        stays = f'all: "{row.declined}"' if row.declined else stays or "none"
        yield f"| {row.title} | {' | '.join(kinds)} | {stays} |\n"


def _rows(rows: Mapping[str, Any], test: str) -> Iterable[str]:
    for name, row in rows.items():
        outcome = f'dense: "{words}"' if (words := getattr(row, "declined", "")) else "yes"
        yield f"| {row.title} | {outcome} | `tests/support/{test}[{name}]` |\n"


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS / "support"), str(TESTS / "helpers")]
    PAGE.write_text(support_page(), encoding="utf-8")
