"""Rows of the support matrix that tests elsewhere in the suite hold."""

from __future__ import annotations

from support_rows import Held

DENSE = "dense, without a warning"

ADAPTERS = (
    Held("dropout", "compiler/test_oracle.py::test_dropout_draws_what_the_eager_model_draws"),
    Held("adapters on a few projections", "compiler/test_oracle.py::test_blocks_with_few_adapters"),
    Held("fp32 adapters on a bf16 base", "compiler/test_oracle.py::test_bf16_base_with_fp32_adapters"),
    Held("DoRA, one graph under any backend", "compiler/test_peft_support.py::test_one_graph_bit_equal_to_eager"),
    Held(
        "QLoRA with bitsandbytes: NF4 or FP4, nested or not",
        "compiler/test_four_bit.py::test_a_qlora_model_trains_as_the_oracle_says",
    ),
    Held(
        "QLoRA: bf16 layers between fp32 norms (`prepare_model_for_kbit_training`)",
        "compiler/test_four_bit.py::test_a_bf16_layer_in_an_fp32_model",
    ),
    Held(
        "QLoRA under gradient checkpointing; no dense weight is kept for the backward",
        "compiler/test_four_bit.py::test_no_dense_weight_is_saved_for_the_backward",
    ),
    Held(
        "DoRA on a 4-bit base (bitsandbytes), with dropout or without",
        "compiler/test_four_bit.py::test_a_dora_adapter_trains_as_the_oracle_says",
    ),
    Held(
        "`disable_adapter()`, between sparse steps or before them",
        "support/test_adapter_states.py::test_disabled_adapters_run_dense_and_silent",
        DENSE,
    ),
    Held(
        "`merge_adapter()`; after `unmerge_adapter()` sparse again",
        "support/test_adapter_states.py::test_merged_adapters_are_told_of_once_and_train_again_once_unmerged",
        'dense: "merged into the base or switched off"',
    ),
    Held(
        "`set_adapter` to another adapter, and back",
        "support/test_adapter_states.py::test_another_adapter_trains_after_set_adapter",
    ),
    Held(
        "a frozen adapter that stays active beside the trained one",
        "support/test_adapter_states.py::test_a_frozen_adapter_is_a_part_of_its_layer",
    ),
    Held(
        "`hotswap_adapter`, without recompilation",
        "support/test_adapter_states.py::test_a_hot_swapped_adapter_trains_without_recompilation",
    ),
    Held(
        "`merge_and_unload()` after training",
        "support/test_adapter_states.py::test_a_trained_model_that_is_merged_and_unloaded_computes_the_same",
        "the outputs of the trained model",
    ),
)

TRAINING = (
    Held("plain loop", "compiler/test_backend.py::test_phases_switch_by_optimizer_steps_in_one_graph"),
    Held("`Trainer`", "compiler/test_backend.py::test_trainer_with_the_callback"),
    Held("`Trainer` with gradient checkpointing", "ecosystem/test_checkpointing.py::test_trainer_with_the_callback"),
    Held("`Trainer` with `bf16=True`", "ecosystem/test_checkpointing.py::test_trainer_with_bf16_autocast"),
    Held("autocast around the model (bf16, fp16) or in it (bf16)", "compiler/test_oracle.py::test_autocast"),
    Held(
        "a gradient scaler that skips steps",
        "training/test_registry.py::TestCounting::test_steps_that_the_gradient_scaler_skips",
    ),
    Held(
        "`resume_from_checkpoint`, the position of the schedule included",
        "ecosystem/test_callback.py::TestCallback::test_a_resumed_run_resumes_its_phase",
    ),
    Held("evaluation between steps", "compiler/test_backend.py::test_evaluation_runs_dense_and_silent", DENSE),
    Held("`generate` between steps", "compiler/test_backend.py::test_generate_runs_dense_and_silent", DENSE),
    Held(
        "a loss outside the model, with `token_roles`",
        "compiler/test_backend.py::test_given_roles_equal_those_of_a_loss_inside_the_graph",
    ),
    Held("merging a pruned model (`merge_masked`)", "ecosystem/test_merge.py::test_zeros_survive_training_and_merging"),
)

SHAPES = (
    Held(
        "ragged prompts, padding on the left or right, packing",
        "compiler/test_oracle.py::test_every_batch_equals_the_oracle",
    ),
    Held(
        "padding to the longest: a new length at each step",
        "compiler/test_recompilation.py::test_ten_lengths_ten_splits_and_two_phases_compile_at_most_twice",
    ),
    Held(
        "dynamic batch size, all or no tokens context",
        "compiler/test_recompilation.py::test_batch_sizes_and_extreme_splits_change_without_recompilation",
    ),
    Held("`dynamic=True`: one graph", "compiler/test_oracle.py::test_every_length_and_split_equals_the_oracle"),
    Held(
        "lengths from 1 up, one row, no context or no output token",
        "compiler/test_bad_input.py::test_extreme_batches_equal_the_oracle",
    ),
    Held(
        "`mark_dynamic` on the batch and the length: one graph",
        "support/test_shapes_supported.py::test_sizes_marked_dynamic_are_one_graph",
    ),
    Held(
        "examples flattened into one row with `position_ids` (`DataCollatorWithFlattening`, its arguments for flash "
        "attention among them; attention itself is SDPA)",
        "support/test_shapes_supported.py::test_examples_flattened_into_one_row",
    ),
)

DISTRIBUTED = (
    Held(
        "DDP, compiled then wrapped or wrapped then compiled; FSDP2, blocks compiled or the whole model",
        "ecosystem/test_distributed.py::test_sparse_ranks_train_as_the_mean_of_two_processes_alone",
    ),
    Held(
        "the exact passes, and nothing asked for, under DDP and FSDP2: the gradients of one process on both batches",
        "ecosystem/test_distributed.py::test_two_ranks_train_as_one_process_does_on_both_batches",
    ),
    Held("FSDP2 with gradient checkpointing", "ecosystem/test_distributed.py::test_checkpoints_around_compiled_blocks"),
    Held(
        "FSDP2, the schedule by steps of the sharded optimizer",
        "ecosystem/test_distributed.py::test_steps_of_an_optimizer_of_shards_move_the_schedule",
    ),
    Held("factors are computed once a job", "ecosystem/test_distributed.py::test_a_job_computes_each_factor_once"),
    Held(
        "`Trainer` on two processes, by `accelerate launch`",
        "ecosystem/test_distributed.py::test_a_trainer_under_accelerate_launch_is_sparse_on_every_rank",
    ),
    Held(
        "DDP with Dynamo's DDP optimizer on",
        "ecosystem/test_distributed.py::test_the_ddp_optimizer_leaves_a_model_dense_and_one_warning_says_what_to_set",
        'dense: "torch._dynamo.config.optimize_ddp = False"',
    ),
    Held(
        "FSDP2 without roles",
        "ecosystem/test_distributed.py::test_blocks_without_roles_are_dense_and_one_warning_names_token_roles",
        'dense: "token_roles(labels="',
    ),
    Held(
        "tensor parallel",
        "ecosystem/test_distributed.py::test_tensor_parallel_is_dense_and_said_so",
        'dense: "tensor parallel"',
    ),
)

CHANGES = (
    Held(
        "a 4-bit layer is quantised again in place",
        "compiler/test_weight_watch.py::test_a_layer_that_is_quantised_again",
        "0",
    ),
    Held(
        "`merge_adapter()` and `unmerge_adapter()`",
        "compiler/test_weight_watch.py::test_a_merge_and_its_reverse",
        "0",
    ),
    Held(
        "frozen weights, in the dense phase",
        "compiler/test_weight_watch.py::test_a_change_in_the_dense_phase_is_seen_by_the_first_sparse_step",
        "0",
    ),
    Held(
        "frozen weights become NaN: told of, factors stay",
        "compiler/test_weight_watch.py::test_weights_that_are_not_finite_keep_their_factors_and_are_told_of",
        "0",
    ),
    Held(
        "frozen weights with published factors: told of, factors stay",
        "compiler/test_weight_watch.py::test_published_factors_stay_and_are_told_of",
        "0",
    ),
    Held(
        "a layer ceases to be pruned, or becomes so (LoRS): told of, counted anew one step later",
        "passes/requested/test_preserve_weight_mask.py::test_a_layer_that_ceases_to_be_pruned_is_compiled_anew",
        "1",
    ),
    Held(
        "`set_adapter` to another adapter, and back",
        "support/test_adapter_states.py::test_another_adapter_trains_after_set_adapter",
        "1",
    ),
    Held(
        "`hotswap_adapter`",
        "support/test_adapter_states.py::test_a_hot_swapped_adapter_trains_without_recompilation",
        "0",
    ),
)
