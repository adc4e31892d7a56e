"""The commands one after the other, as you run them, with real vLLM and a toy model."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.commands import Command

pytestmark = pytest.mark.engine


def dpkd(*arguments: object) -> str:
    """A process for each command, as on the command line."""
    result = Command(*arguments).finish()
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_cache_train_eval_with_a_round(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    cache, student = tmp_path / "cache", tmp_path / "student"
    dpkd("init-student", "--teacher", toy_teacher, "--out", student, "--layers", 1, "--keep", "last")
    asked = ("--teacher", toy_teacher, "--out", cache, "--engine", "vllm", "--max-new-tokens", 16, "--top-k", 24)
    dpkd("cache-teacher", *asked, "--data", toy_data, "--template", "chat", "--responses", "both")
    dpkd("cache-teacher", *asked, "--student", student, "--round", "first", "--top-k", 0)
    assert "sound: 80 rows" in dpkd("cache", "verify", cache)
    facts = json.loads(dpkd("cache", "info", cache, "--json"))
    assert facts["identities"]["generation"]["engine"] == "vllm"

    learn = ("--cache", cache, "--student", student, "--steps", 3, "--batch-size", 8)
    dpkd("train", *learn, "--out", tmp_path / "token", "--set", "sft_weight=0.5")
    dpkd("train", *learn, "--out", tmp_path / "sequence", "--level", "sequence", "--round", "first", "--beta", 1)
    dpkd("train", *learn, "--out", tmp_path / "sft", "--objective", "sft", "--responses", "reference")

    models = [f"{name}={path}" for name, path in (("teacher", toy_teacher), ("token", tmp_path / "token"))]
    ask = ("eval", "--model", models[0], "--model", models[1], "--data", f"dolly={toy_data}", "--template", "chat")
    printed = dpkd(*ask, "--out", tmp_path / "report", "--seeds", "10,20", "--max-new-tokens", 16, "--engine", "vllm")
    assert "`teacher`" in printed
    assert "report.json" in printed
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    for name in ("teacher", "token"):
        result = report["models"][name]["data"]["dolly"]
        assert result["n"] == 20
        assert [(bucket["low"], bucket["high"]) for bucket in result["buckets"]] == [(0, 30), (30, 70), (70, None)]
        assert sum(bucket["n"] for bucket in result["buckets"]) == 20
        assert result["rouge_l"]["low"] <= result["rouge_l"]["mean"] <= result["rouge_l"]["high"]
    assert pq.read_table(tmp_path / "report" / "per_example.parquet").num_rows == 2 * 20 * 2
    assert (tmp_path / "report" / "rouge_by_length.svg").read_text().startswith("<svg ")
