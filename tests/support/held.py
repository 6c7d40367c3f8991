"""Rows of the support matrix that tests elsewhere in the suite hold."""

from __future__ import annotations

from support.rows import Held

DENSE = "dense, without a warning"

ADAPTERS = (
    Held("dropout", "test_oracle.py::test_dropout_draws_what_the_eager_model_draws"),
    Held("adapters on a few projections", "test_oracle.py::test_blocks_with_few_adapters"),
    Held("fp32 adapters on a bf16 base", "test_oracle.py::test_bf16_base_with_fp32_adapters"),
    Held("DoRA, one graph under any backend", "test_peft_support.py::test_one_graph_bit_equal_to_eager"),
    Held(
        "QLoRA with bitsandbytes: NF4 or FP4, nested or not",
        "test_four_bit.py::test_a_qlora_model_trains_as_the_oracle_says",
    ),
    Held(
        "QLoRA: bf16 layers between fp32 norms (`prepare_model_for_kbit_training`)",
        "test_four_bit.py::test_a_bf16_layer_in_an_fp32_model",
    ),
    Held(
        "QLoRA under gradient checkpointing; no dense weight is kept for the backward",
        "test_four_bit.py::test_no_dense_weight_is_saved_for_the_backward",
    ),
)

TRAINING = (
    Held("plain loop", "test_backend.py::test_phases_switch_by_optimizer_steps_in_one_graph"),
    Held("`Trainer`", "test_backend.py::test_trainer_with_the_callback"),
    Held("`Trainer` with gradient checkpointing", "test_checkpointing.py::test_trainer_with_the_callback"),
    Held("`Trainer` with `bf16=True`", "test_checkpointing.py::test_trainer_with_bf16_autocast"),
    Held("autocast around the model or in it", "test_oracle.py::test_autocast"),
    Held(
        "a gradient scaler that skips steps",
        "test_schedule.py::TestCounting::test_steps_that_the_gradient_scaler_skips",
    ),
    Held(
        "`resume_from_checkpoint`, the position of the schedule included",
        "test_schedule.py::TestCallback::test_a_resumed_run_resumes_its_phase",
    ),
    Held("evaluation between steps", "test_backend.py::test_evaluation_runs_dense_and_silent", DENSE),
    Held("`generate` between steps", "test_backend.py::test_generate_runs_dense_and_silent", DENSE),
    Held(
        "a loss outside the model, with `token_roles`",
        "test_backend.py::test_given_roles_equal_those_of_a_loss_inside_the_graph",
    ),
    Held("merging a pruned model (`merge_masked`)", "test_merge.py::test_zeros_survive_training_and_merging"),
)

SHAPES = (
    Held("ragged prompts, padding on the left or right, packing", "test_oracle.py::test_every_batch_equals_the_oracle"),
    Held(
        "padding to the longest: a new length at each step",
        "test_recompilation.py::test_ten_lengths_ten_splits_and_two_phases_compile_at_most_twice",
    ),
    Held(
        "dynamic batch size, all or no tokens context",
        "test_recompilation.py::test_batch_sizes_and_extreme_splits_change_without_recompilation",
    ),
    Held("`dynamic=True`: one graph", "test_oracle.py::test_every_length_and_split_equals_the_oracle"),
    Held(
        "lengths from 1 up, one row, no context or no output token",
        "test_bad_input.py::test_extreme_batches_equal_the_oracle",
    ),
)
