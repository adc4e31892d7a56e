"""Every option changes something: a small job with another value of it leaves something else, beyond its record."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from support.judge_endpoints import Answer, completion, serving
from support.toys import ROOT, dolly_texts

from dpkd.core.errors import UserError
from dpkd.pipelines.commands.registry import COMMANDS

Options = dict[str, Any]
Job = Callable[[Options], Any]

SEQUENCE: Options = {"level": "sequence", "round": "r0"}
FROM_DATA: Options = {"cache": None, "data": "{data}", "objective": "sft", "batch_size": 1}
CORPUS: Options = {"lm_data": "{corpus}", "lm_length": 32}
VALIDATED: Options = {"validation_examples": 4}
LORA: Options = {"lora_rank": 2}
MADE_ANEW: Options = {"layers": None, "keep": "importance"}
CHOSEN_ON_DATA: Options = {"data": "{data}", "template": "chat"}
CONTRASTED: Options = {"objective": "distillm2", "round": "r0", "steps": 4}
ROUND: Options = {"data": None, "limit": None, "student": "{student}", "round": "one"}
PREDICTIONS: Options = {"model": {}, "predictions": {"a": "{answers}", "b": "{second}"}, "limit": None}
TWO_MODELS: Options = {"model": {"m": "{teacher}", "n": "{student}"}}

#: by command and option: what both jobs have, and the other value; the first job has the default, or that of `BASE`
CHANGES: dict[str, dict[str, tuple[Options, Any]]] = {
    "prepare-data": {
        "data": ({}, "{other_data}"),
        "min_response_words": ({}, 30),
        "limit": ({}, 3),
        "form": ({}, "text"),
        "part": ({}, "2/2"),
    },
    "cache-teacher": {
        "teacher": ({}, "{student}"),
        "data": ({}, "{other_data}"),
        "responses": ({}, "reference"),
        "template": ({}, "alpaca"),
        "limit": ({}, 2),
        "max_prompt_tokens": ({}, 20),
        "student": (ROUND, "{teacher}"),
        "round": (ROUND, "two"),
        "teacher_mix": (ROUND, 0.5),
        "max_new_tokens": ({}, 3),
        "temperature": ({}, 0.0),
        "top_p": ({}, 0.3),
        "num_samples": ({}, 2),
        "seed": ({}, 1),
        "top_k": ({}, 4),
        "top_mass": ({"top_k": None}, 0.5),
        "max_top_k": ({"top_mass": 0.99, "top_k": None}, 3),
        "dtype": ({}, "bfloat16"),
        "rows_per_shard": ({}, 2),
    },
    "init-student": {
        "teacher": ({}, "{student}"),
        "layers": ({}, 2),
        "keep": ({}, "last"),
        "mlp_width": ({"cache": "{cache}"}, 64),
        "from_config": (MADE_ANEW | {"from_config": "{config}"}, "{other_config}"),
        "from_checkpoint": (MADE_ANEW | {"from_checkpoint": "{student}"}, "{teacher}"),
        "params": ({"layers": None, "keep": "importance", "cache": "{cache}", "params": 0.8}, 0.9),
        "cache": ({}, "{cache}"),
        "cache_rows": ({"cache": "{cache}"}, 3),
        "data": (CHOSEN_ON_DATA, "{other_data}"),
        "template": (CHOSEN_ON_DATA, "alpaca"),
        "seed": (MADE_ANEW | {"from_config": "{config}"}, 1),
        "dtype": ({}, "bfloat16"),
    },
    "eval": {
        "data": ({}, {"d": "{other_data}"}),
        "template": ({}, "raw"),
        "temperature": ({}, 0.0),
        "top_p": ({}, 0.3),
        "seeds": ({}, "7"),
        "max_new_tokens": ({}, 3),
        "baseline": (TWO_MODELS, "n"),
        "num_sign_flips": (PREDICTIONS, 101),
        "sign_flip_seed": (PREDICTIONS, 1),
        "dtype": ({}, "bfloat16"),
    },
    "judge": {
        "predictions": ({}, {"other": "{answers}", "b": "{second}"}),
        "data": ({}, {"d": "{longer_data}"}),
        "buckets": ({}, "5,9"),
        "mode": ({}, "pairwise"),
        "grade_reference": ({}, True),
        "num_sign_flips": ({}, 101),
        "sign_flip_seed": ({}, 1),
    },
    "report": {
        "evaluations": ({}, "{evaluation}"),
        "baseline": ({}, "other_evaluation"),
        "num_sign_flips": ({}, 101),
        "sign_flip_seed": ({}, 1),
    },
    "add-noise": {
        "model": ({}, "{student}"),
        "cache": ({}, "{other_cache}"),
        "scales": ({}, "0.2"),
        "seeds": ({}, "6"),
        "cache_rows": ({}, 3),
        "beta": ({}, 0.5),
    },
    "cache info": {
        "location": ({}, "{other_cache}"),
        "samples": ({}, 1),
        "as_json": ({}, True),
    },
    "cache fidelity": {
        "cache": ({}, "{other_cache}"),
        "limit": ({}, 3),
        "dtype": ({}, "bfloat16"),
        "as_json": ({}, True),
    },
    "recipes": {
        "recipe": ({}, "quickstart"),
    },
    "run": {
        "recipe": ({}, "rounds"),
        "set": ({}, {"teacher": "another"}),
    },
    "reproduce": {
        "recipe": ({}, "paper/table1-gpt2-120m"),
    },
    "train": {
        "cache": ({}, "{other_cache}"),
        "cache_weights": ({"cache": ["a:{cache}=1", "b:{other_cache}=1"], "steps": 4}, "tokens"),
        "student": ({}, "{teacher}"),
        "data": (FROM_DATA, "{other_data}"),
        "template": (FROM_DATA, "chat"),
        "max_prompt_tokens": (FROM_DATA, 80),
        "max_new_tokens": (FROM_DATA, 4),
        "responses": ({}, "reference"),
        "objective": ({}, "forward-kl"),
        "level": ({"round": "r0"}, "sequence"),
        "preset": ({"lm_weight": 0}, "released-code"),
        "beta": ({}, 0.1),
        "sft_weight": ({}, 0.5),
        "kd_weight": ({}, 0.5),
        "lm_weight": (CORPUS, 0.1),
        "dpkd_weight": ({}, 0.1),
        "minillm_weight": ({"objective": "minillm", "student_samples": "cached", "round": "r0"}, 0.5),
        "lm_data": (CORPUS, "{other_corpus}"),
        "lm_length": (CORPUS, 16),
        "length_normalize": (SEQUENCE, False),
        "token_pairs": ({}, "argmax"),
        "label_smoothing": ({}, 0.2),
        "teacher_floor": (SEQUENCE | {"label_smoothing": 0.0, "learning_rate": 0.1, "steps": 5}, True),
        "gamma": ({"objective": "simpo", **SEQUENCE}, 2.0),
        "dpop_lambda": ({"objective": "dpop", **SEQUENCE}, 1.0),
        "tail": ({"objective": "forward-kl"}, "renormalise"),
        "jsd_beta": ({"objective": "jsd"}, 0.2),
        "akl_mu": ({"objective": "akl"}, 0.2),
        "skew_alpha": ({}, 0.5),
        "skew_anchor_chosen": (CONTRASTED, 0.3),
        "skew_anchor_rejected": (CONTRASTED, 0.3),
        "skew_schedule": (CONTRASTED, False),
        "kd_temperature": ({"objective": "forward-kl"}, 2.0),
        "minillm_clip": (
            {"objective": "minillm", "student_samples": "cached", "round": "r0", "steps": 4, "learning_rate": 0.1},
            0.001,
        ),
        "ab_alpha": ({"objective": "alpha-beta"}, 0.5),
        "ab_beta": ({"objective": "alpha-beta"}, 0.3),
        "round": (SEQUENCE, "r1"),
        "mix": ({"round": "r0"}, 0.5),
        "top_k": ({}, 4),
        "top_mass": ({}, 0.1),
        "pairing": (SEQUENCE | {"cache": "{other_cache}"}, "all"),
        "steps": ({}, 3),
        "epochs": ({"steps": None, "epochs": 0.2}, 0.4),
        "batch_size": ({}, 3),
        "gradient_accumulation_steps": ({}, 2),
        "batch_tokens": ({}, 300),
        "learning_rate": ({}, 1e-2),
        "warmup_ratio": ({}, 0.9),
        "weight_decay": ({}, 0.5),
        "max_grad_norm": ({}, 1e-9),
        "adam_beta1": ({}, 0.1),
        "adam_beta2": ({}, 0.1),
        "dropout": ({"student": "{with_dropout}"}, True),
        "seed": ({}, 1),
        "validation_examples": ({}, 4),
        "validate_every": (VALIDATED, 1),
        # at this rate every step makes it worse
        "best_metric": (VALIDATED | {"validate_every": 1, "learning_rate": 1.0, "steps": 3}, "last"),
        "patience": (VALIDATED | {"best_metric": "kld", "validate_every": 1, "learning_rate": 1.0, "steps": 5}, 1),
        "save_every": ({}, 1),
        "keep_checkpoints": ({"save_every": 1, "steps": 4}, 1),
        "tracker": ({}, "tensorboard"),
        "lora_rank": ({}, 2),
        "lora_alpha": (LORA, 1.0),
        "lora_target_modules": (LORA, "q_proj"),
        "lora_save": (LORA, "adapter"),
        "dtype": ({}, "bfloat16"),
    },
}
#: what every job of a command has, unless a change says otherwise
BASE: dict[str, Options] = {
    "prepare-data": {"data": "{data}"},
    "cache-teacher": {
        "teacher": "{teacher}", "data": "{data}", "engine": "transformers", "device": "cpu", "template": "chat",
        "limit": 4, "max_new_tokens": 6, "top_k": 8,
    },
    "init-student": {"teacher": "{teacher}", "layers": 1, "keep": "spread", "device": "cpu"},
    "eval": {
        "model": {"m": "{teacher}"}, "data": {"d": "{data}"}, "engine": "transformers", "device": "cpu",
        "template": "chat", "seeds": "10", "max_new_tokens": 6, "limit": 8, "num_sign_flips": 100,
    },
    "judge": {
        "predictions": {"a": "{answers}", "b": "{second}"}, "data": {"d": "{data}"}, "judge_url": "{judge}",
        "judge_model": "judge", "num_sign_flips": 100,
    },
    "report": {"evaluations": ["{evaluation}", "{other_evaluation}"], "num_sign_flips": 100},
    "add-noise": {
        "model": "{teacher}", "cache": "{cache}", "scales": "0.1", "seeds": "5", "cache_rows": 6, "device": "cpu",
    },
    "cache info": {"location": "{cache}"},
    "cache fidelity": {
        "cache": "{cache}", "teacher": "{teacher}", "limit": 6, "engine": "transformers", "device": "cpu",
    },
    "recipes": {},
    "run": {"recipe": "quickstart", "dry_run": True},
    "reproduce": {"artefact": "table1", "recipe": "paper/table1-tiny", "dry_run": True},
    "train": {
        "cache": "{cache}", "student": "{student}", "steps": 2, "batch_size": 4, "learning_rate": 1e-3,
        "tracker": "none", "device": "cpu",
    },
}  # fmt: skip

#: commands that run a model in this process
ON_DEVICES = ("cache-teacher", "init-student", "train", "eval", "add-noise", "cache fidelity")

#: options whose effect another test shows, on engines, servers, several processes, memory, or after a crash:
#: by file and test, "COMMAND: OPTIONS"
ELSEWHERE: dict[str, dict[str, str]] = {
    "teacher_cache/build/test_ray_engine.py": {
        "test_vllm_and_ray_resume_each_others_jobs": "cache-teacher: engine",
        "test_an_engine_that_does_not_start_says_so": "cache-teacher: engine_arg",
        "test_a_killed_replica_costs_no_row_and_the_cache_is_that_of_vllm": "cache-teacher: ray_replicas ray_gpus",
        "test_replicas_without_room_are_refused": "cache-teacher: ray_cpus",
    },
    "teacher_cache/build/test_unkillable.py": {
        "test_a_failing_vllm_is_restarted_and_the_failing_row_found": "cache-teacher: max_num_seqs",
    },
    "teacher_cache/build/test_importing.py": {
        "test_texts_alone_train_seqkd": "cache import: source out tokenizer",
        "test_json_lines_have_the_models_values": "cache import: source_format template rows_per_shard",
        "test_what_distillkit_does_not_store_is_unknown_and_refused": "cache import: teacher_name",
        "test_a_wrong_compression_config_is_found": "cache import: compression limit",
    },
    "teacher_cache/engines/test_openai.py": {
        "test_the_cache_has_the_models_values": "cache-teacher: teacher_url teacher_model teacher_api",
        "test_the_key_comes_from_the_environment_and_stays_there": "cache-teacher: api_key_env",
        "test_trouble_changes_no_byte": "cache-teacher: timeout_s tries",
        "test_a_budget_stops_the_job_and_the_next_run_goes_on": "cache-teacher: max_cost price_in price_out",
    },
    "teacher_cache/engines/test_server_engine.py": {
        "test_a_cache_is_filled_by_both_servers": "cache-teacher: server_url",
    },
    "distill/rows/test_following.py": {
        "test_both_processes_run_and_a_killed_trainer_resumes": "train: follow",
        "test_a_cache_that_stops_growing_is_an_error_that_keeps_the_checkpoint": "train: follow_timeout_s",
    },
    "distill/live/test_live_training.py": {
        "test_every_kind_of_objective_trains_on_live_samples": "train: student_samples teacher_url",
    },
    "distill/live/test_samplers.py": {
        "test_a_vllm_engine_takes_over_the_weights": "train: sampler",
        "test_the_sampler_follows_the_options": "train: sample_temperature sample_top_p staleness",
    },
    "distill/live/test_live.py": {
        "test_pairs_of_several_samples": "train: num_student_samples",
        "test_responses_that_do_not_fit_the_student_are_refused": "train: sample_max_new_tokens",
        "test_samples_are_drawn_with_the_weights_that_they_should": "train: sample_every",
        "test_a_server_with_another_model_is_refused": "train: teacher_tolerance",
    },
    "core/test_conversations.py": {
        "test_arguments_reach_the_template_and_its_identity": "cache-teacher: template_arg; train: template_arg; "
        "eval: template_arg",
    },
    "teacher_cache/build/test_conversation_cache.py": {
        "test_all_turns_of_a_given_conversation_are_one_row": "cache-teacher: turns",
    },
    "distill/rows/test_spans.py": {"test_runs_on_spans": "train: turns"},
    "teacher_cache/build/test_thinking.py": {
        "test_dropped_thinking_is_the_teachers_alone": "cache-teacher: thinking",
    },
    "distill/student/test_students.py": {
        "test_a_base_student_takes_the_teachers_eos": "init-student: eos_from_teacher",
    },
    "evaluate/test_turns.py": {"test_a_model_is_asked_after_its_own_answers": "eval: turns"},
    "distill/student/test_importance.py": {
        "test_a_student_with_fewer_heads": "init-student: heads",
        "test_rows_of_data_have_the_caches_template_arguments": "init-student: template_arg",
    },
    "distill/test_alarms.py": {
        "test_the_released_loss_alone_gives_three_alarms_and_the_run_can_stop": "train: on_alarm",
    },
    "teacher_cache/build/test_cost.py": {
        "test_an_estimate_is_near_the_real_job": "cache-teacher: dry_run",
        "test_the_command_prints_the_estimate_and_writes_nothing": "cache-teacher: pilot_rows price_per_hour",
    },
    "teacher_cache/build/test_rounds.py": {
        "test_the_offset_of_pairs_is_that_of_both_models": "train: offset; cache-teacher: score_cached",
    },
    "distill/run/test_checkpoints.py": {
        "test_a_corrupt_checkpoint_is_named_and_the_run_resumes_from_the_one_before": "train: resume_from",
    },
    "distill/run/test_distributed.py": {
        "test_fsdp2_gives_the_run_of_one_process": "train: sharding",
    },
    "distill/run/test_outputs.py": {
        "test_saving_memory_or_time_changes_no_number": "train: gradient_checkpointing compile",
    },
    "distill/batches/test_shared_prompts.py": {
        "test_a_run_with_shared_prompts_is_the_run_without": "train: share_prompt",
    },
    "distill/test_training.py": {
        "test_a_chunked_head_changes_nothing": "train: logits_chunk",
    },
    "evaluate/inputs/test_named_sets.py": {
        "test_a_known_name_is_found_in_the_data_directory": "eval: data_dir; judge: data_dir",
        "test_fields_by_option": "eval: field; judge: field",
        "test_prompts_of_the_training_data_are_counted": "eval: train_data",
    },
    "evaluate/test_evaluation.py": {
        "test_another_metric_generates_nothing": "eval: generations buckets bucket_by bucket_of rouge_tokenizer",
        "test_a_killed_evaluation_resumes_and_ends_as_if_never_killed": "eval: engine",
        "test_a_finished_evaluation_is_left_as_it_is": "eval: max_num_seqs",
    },
    "evaluate/merge/test_merging.py": {
        "test_answers_that_were_drawn_otherwise_compare_when_asked": "report: allow_different_decoding",
        "test_common_rows_are_compared_when_asked": "report: common_rows",
    },
    "evaluate/merge/test_grades.py": {"test_grades_and_reasons_are_beside_the_answers": "report: judge"},
    "evaluate/judge/test_judge_rows.py": {
        "test_a_report_and_the_same_predictions_give_the_same_questions": "judge: report",
        "test_rows_are_limited_and_drawn": "judge: only limit sample",
        "test_pairs_are_judged_in_both_orders": "judge: sets",
        "test_each_answer_once_row_by_row": "judge: answer_seeds",
        "test_a_baseline_decides_who_is_asked_about_first": "judge: baseline",
    },
    "evaluate/judge/test_judge_client.py": {
        "test_the_request_is_the_one_that_the_options_say": "judge: seed extra_body max_tokens",
        "test_the_key_is_read_from_the_environment": "judge: api_key_env",
        "test_a_key_goes_over_plain_http_to_this_machine_alone": "judge: allow_plain_http",
        "test_a_missing_server_and_a_slow_one": "judge: timeout_s",
        "test_delays_grow": "judge: tries retry_delay_s",
    },
    "evaluate/judge/test_judge_config.py": {
        "test_the_url_may_have_a_path_or_a_slash": "judge: judge_url",
    },
    "evaluate/judge/test_judge.py": {
        "test_a_model_that_the_server_does_not_have": "judge: judge_model",
    },
    "evaluate/judge/test_judge_runs.py": {
        "test_as_many_at_once_as_allowed": "judge: concurrency",
        "test_a_second_request_continues_from_the_first_reply": "judge: reask",
        "test_verdicts_are_shared_by_runs_over_other_rows": "judge: verdicts",
        "test_an_estimate_asks_and_writes_nothing": "judge: estimate price_in price_out",
    },
    "evaluate/judge/test_judge_questions.py": {
        "test_a_prompt_of_ones_own": "judge: prompt",
    },
    "pipelines/test_serve_teacher.py": {
        "test_the_server_is_told_what_scoring_needs": "serve-teacher: cache port engine_arg",
        "test_another_teacher_is_refused": "serve-teacher: teacher",
        "test_a_taken_port_is_one_clear_line": "serve-teacher: host",
        "test_other_machines_need_a_key_or_a_word": "serve-teacher: insecure",
        "test_what_cannot_be_served_is_refused": "serve-teacher: device max_length",
        "test_the_teacher_is_served_until_it_is_stopped": "serve-teacher: log",
        "test_a_server_that_is_too_slow_is_a_clear_error": "serve-teacher: start_timeout_s",
    },
    "pipelines/test_cli.py": {
        "test_info_as_json_has_the_main_facts": "cache verify: location",
    },
    "teacher_cache/build/test_derived.py": {
        "test_a_merged_cache_is_the_cache_of_the_union": "cache merge: caches out",
        "test_equal_keys_are_refused_renumbered_or_renamed": "cache merge: duplicates",
        "test_a_filtered_cache_is_the_cache_of_those_rows": "cache filter: cache out",
        "test_exactly_the_rows_that_meet_the_rules_stay": (
            "cache filter: min_tokens max_tokens finish_reason min_logprob where"
        ),
    },
    "teacher_cache/build/test_repair.py": {
        "test_one_bad_shard_costs_one_shard": "cache repair: location",
    },
    "teacher_cache/audit/test_fidelity.py": {
        "test_another_teacher_is_refused": "cache fidelity: teacher",
        "test_vllm_scores_a_cache_of_its_own": "cache fidelity: engine max_num_seqs",
    },
    "pipelines/test_plan.py": {
        "test_the_command_prints_times_and_the_price": "plan: recipe pilot_rows price_per_hour set",
    },
    "pipelines/test_pilot_of_k.py": {
        "test_a_student_learns_more_from_more_entries": "cache fidelity: pilot student pilot_k pilot_steps pilot_seeds "
        "pilot_learning_rate",
    },
    "pipelines/recipe/test_recipe.py": {
        "test_a_dry_run_prints_the_plan_and_writes_nothing": "run: dry_run",
    },
    "pipelines/reproduce/test_reproduce_recipes.py": {
        "test_a_recipe_leads_to_one_artefact": "reproduce: artefact dry_run",
    },
    "evaluate/report/test_eval_report.py": {
        "test_roles_are_names_of_models": "eval: teacher_name; report: teacher_name",
    },
    "evaluate/inputs/test_eval_sets.py": {
        "test_limit_counts_rows_of_the_file": "eval: limit",
        "test_the_longest_prompt_that_fits_is_kept": "eval: max_prompt_tokens",
    },
    "evaluate/answers/test_predictions.py": {
        "test_predictions_with_a_model_and_for_several_sets": "eval: model predictions",
    },
    "evaluate/report/test_curves.py": {"test_a_model_that_is_a_run_brings_its_curves": "eval: run"},
    "pipelines/test_model_measures.py": {
        "test_perplexity_is_transformers_own_loss": "eval: perplexity",
        "test_what_was_measured_is_kept": "eval: cache_rows",
    },
    "pipelines/test_contamination.py": {"test_prompts_of_the_cache_are_counted": "eval: cache"},
}


@pytest.fixture(scope="module")
def judge_endpoint() -> Iterator[str]:
    """Address of a judge whose grades depend on the question alone."""

    def answer(body: dict[str, Any]) -> Answer:
        question = body["messages"][0]["content"]
        drawn = int(hashlib.sha256(question.encode()).hexdigest(), 16)
        grade = drawn % 5 + (1 if "zzz" in question else 6)  # the two answers to a row never get the same one
        if "Verdict" in question:
            return completion(f"Verdict: {'A' if drawn % 2 else 'B'}")
        return completion(f"Scores: {grade} 7" if "Scores" in question else f"Score: {grade}")

    with serving(answer) as endpoint:
        yield endpoint.url


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_student: Path, toy_data: Path, toy_cache: Path,
    judge_endpoint: str,
) -> dict[str, str]:  # fmt: skip
    """What the values of the jobs name: toys, data, caches with rounds, evaluations, a run."""
    folder = tmp_path_factory.mktemp("world")
    lines = toy_data.read_text().splitlines()
    (folder / "other.jsonl").write_text("\n".join(lines[6:14]) + "\n")
    for name, texts in (("corpus", dolly_texts("heldout")[:20]), ("other", dolly_texts("heldout")[20:40])):
        (folder / f"{name}.txt").write_text("\n\n".join(texts))
    rows = [json.loads(line) for line in lines]
    for name, right in (("answers", range(12)), ("second", range(12, 20))):  # so many rows that flips are drawn
        answers = [{"prediction": row["output"] if index in right else "zzz"} for index, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    longer = [row | {"output": f"{row['output']} {row['output']}"} for row in rows]
    (folder / "longer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    shutil.copytree(toy_student, folder / "dropout")
    model = json.loads((toy_student / "config.json").read_text())
    (folder / "dropout" / "config.json").write_text(json.dumps(model | {"attention_dropout": 0.5}))
    places = {
        "teacher": toy_teacher, "student": toy_student, "data": toy_data, "other_data": folder / "other.jsonl",
        "corpus": folder / "corpus.txt", "answers": folder / "answers.jsonl", "config": toy_student / "config.json",
        "other_config": toy_teacher / "config.json", "other_corpus": folder / "other.txt",
        "cache": folder / "cache", "other_cache": folder / "other-cache", "run": folder / "run",
        "evaluation": folder / "evaluation", "other_evaluation": folder / "other-evaluation",
        "second": folder / "second.jsonl", "longer_data": folder / "longer.jsonl", "with_dropout": folder / "dropout",
    }  # fmt: skip
    world = {name: str(place) for name, place in places.items()} | {"judge": judge_endpoint}
    shutil.copytree(toy_cache, folder / "cache")
    of_cache = BASE["cache-teacher"] | {"limit": None}
    start("cache-teacher", of_cache | ROUND | {"student": "{teacher}", "round": "r1", "out": world["cache"]}, world)
    of_other = of_cache | {"seed": 3, "num_samples": 2, "out": world["other_cache"]}
    start("cache-teacher", of_other, world)
    start("cache-teacher", {k: v for k, v in of_other.items() if k != "num_samples"} | ROUND | {"round": "r0"}, world)
    start("train", BASE["train"] | {"out": world["run"]}, world)
    for name, answers_of in (("evaluation", "{answers}"), ("other_evaluation", "{second}")):
        given = {"model": {}, "predictions": {name: answers_of}, "limit": None, "out": world[name]}
        start("eval", BASE["eval"] | given, world)
    return world


def filled(value: Any, world: dict[str, str]) -> Any:
    """`value` with the names in its texts replaced."""
    if isinstance(value, dict):
        return {key: filled(item, world) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, world) for item in value]
    return value.format_map(world) if isinstance(value, str) else value


def start(command: str, options: Options, world: dict[str, str]) -> str:
    """Run a command; what it printed to standard output."""
    row, printed = COMMANDS[command], io.StringIO()
    config = row.options_class().parse(filled(options, world), where="a test")
    with redirect_stdout(printed):
        assert row.run(config) == 0
    return printed.getvalue()


def result_of(command: str, options: Options, world: dict[str, str], out: Path) -> Any:
    """What a job leaves: its numbers, weights and file names, without the records of its options and times."""
    if "out" not in COMMANDS[command].options_class().model_fields:
        return start(command, options, world)
    if command == "cache-teacher" and "round" in options:
        shutil.copytree(world["cache"], out)
    start(command, options | {"out": out}, world)
    if command == "prepare-data":
        return out.read_text()
    if command == "cache-teacher":
        return [sorted(str(path.relative_to(out)) for path in out.rglob("*.parquet")), *map(rows_of, sources_of(out))]
    names = sorted({path.relative_to(out).parts[0] for path in out.rglob("*")})
    weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*.safetensors"))]
    if command == "train":
        logs = [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]
        steps = [{key: log[key] for key in log if not key.endswith(("_s", "_bytes"))} for log in logs]
        return names, weights, steps
    reports = [json.loads(path.read_text()) for path in out.glob("*.json") if path.name != "dpkd-student.json"]
    kept = (
        "models", "data", "comparisons", "runs", "overlap", "duplicates", "roles", "pairs", "copies", "before_training",
        "parameters",
    )  # fmt: skip
    return names, weights, [strip({key: report[key] for key in kept if key in report}, out) for report in reports]


def sources_of(out: Path) -> list[Any]:
    from dpkd.teacher_cache.store.reader import TeacherCache

    cache = TeacherCache.open(out)
    return [cache, *(cache.round(name) for name in cache.round_names)]


def rows_of(source: Any) -> list[Any]:
    """Every row of a cache or a round as numbers."""
    from dpkd.teacher_cache.store.shards import read_shard

    rows = []
    for record in source.manifest.shards:
        shard = read_shard(source.folder, record)
        for row in map(shard.row, range(len(shard))):
            kept = None if row.distributions is None else row.distributions.counts_T.tolist()
            ids = row.prompt_ids.tolist(), row.response_ids.tolist()
            rows.append((row.example_id, row.sample, *ids, row.response_logprobs.tolist(), kept))
    return rows


def strip(value: Any, out: Path) -> Any:
    """`value` without what a report records of the options, and without the place of the output."""
    if isinstance(value, dict):
        return {key: strip(item, out) for key, item in value.items() if key not in ("decoding", "file", "identity")}
    if isinstance(value, list):
        return [strip(item, out) for item in value]
    return value.replace(str(out), "OUT") if isinstance(value, str) else value


@pytest.fixture(scope="module")
def results(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Options], Any]:
    """The result of a job with these options; equal jobs run once."""
    known: dict[str, Any] = {}

    def result(command: str, options: Options) -> Any:
        key = json.dumps([command, options], default=str)
        if key not in known:
            known[key] = result_of(command, options, world, tmp_path_factory.mktemp("job") / "out")
        return known[key]

    return result


@pytest.mark.parametrize("command", CHANGES)
def test_equal_options_leave_equal_results(command: str, results: Any, world: dict[str, str], tmp_path: Path) -> None:
    """Otherwise the test below would hold for any option."""
    assert results(command, BASE[command]) == result_of(command, BASE[command], world, tmp_path / "out")


@pytest.mark.parametrize(("command", "key"), [(name, key) for name, changes in CHANGES.items() for key in changes])
def test_another_value_leaves_another_result(command: str, key: str, results: Any) -> None:
    shared, value = CHANGES[command][key]
    assert results(command, BASE[command] | shared) != results(command, BASE[command] | shared | {key: value})


def options_elsewhere() -> dict[tuple[str, str], tuple[str, str]]:
    """File and test of each option of `ELSEWHERE`."""
    return {
        (command, key): (file, test)
        for file, tests in ELSEWHERE.items()
        for test, texts in tests.items()
        for command, _, keys in (text.partition(": ") for text in texts.split("; "))
        for key in keys.split()
    }


def text_of(source: str, test: str) -> str:
    """The text of a test, and of the functions, fixtures and constants of its file that it names."""
    lines, parts = source.splitlines(), {}
    for node in ast.parse(source).body:
        stored = [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else stored
        first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
        parts |= dict.fromkeys(names, "\n".join(lines[first - 1 : node.end_lineno]))
    found, due = dict[str, str](), [test]
    while due:
        name = due.pop()
        if name in parts and name not in found:
            found[name] = parts[name]
            due += re.findall(r"\w+", parts[name])
    return "\n".join(found.values())


def test_every_option_is_shown_to_change_something() -> None:
    elsewhere, here = options_elsewhere(), {(command, key) for command, keys in CHANGES.items() for key in keys}
    everything = {(name, key) for name, command in COMMANDS.items() for key in command.options_class().model_fields}
    here |= {(command, "out") for command in CHANGES} & everything  # where every result is read from
    here |= {(command, "device") for command in ON_DEVICES} | {("train", "verify")}
    assert here | elsewhere.keys() == everything
    assert not here & elsewhere.keys()
    for (command, key), (file, test) in elsewhere.items():
        source = (ROOT / "tests" / file).read_text()
        assert f"def {test}(" in source, test
        names = [key, key.replace("_", "-")]
        if COMMANDS[command].options_class().is_positional(key):  # on a command line its value follows the command
            names.append(command.split()[-1])
        assert re.search(rf"\b({'|'.join(names)})\b", text_of(source, test)), (test, key)


@pytest.mark.parametrize("command", ON_DEVICES)
def test_a_device_that_is_missing_is_refused(
    command: str, world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = BASE[command] | {"device": "cuda"} | ({"cache": "{cache}"} if command == "init-student" else {})
    with pytest.raises(UserError, match="CUDA was requested but is not available"):
        result_of(command, options, world, tmp_path / "out")


def test_checksums_are_verified_before_the_first_step_or_as_shards_are_read(
    world: dict[str, str], cache_copy: Path, tmp_path: Path
) -> None:
    for shard in (cache_copy / "shards").iterdir():
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    for verify in ("start", "read"):
        options = BASE["train"] | {"cache": str(cache_copy), "verify": verify}
        with pytest.raises(UserError, match="corrupt"):
            result_of("train", options, world, tmp_path / verify)
    assert [path.name for path in (tmp_path / "start", tmp_path / "read") if path.exists()] == ["read"]
