"""What a student keeps: chosen by what the teacher loses, and nearer to the teacher than what is chosen blindly."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_templates import THINKING, chat_tokenizer
from support.commands import dpkd
from support.toys import DOLLY, make_toy
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.distill.batches.batch import Batch
from dpkd.distill.batches.collate import collate
from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.student.calibration import rows_of_data, with_teacher
from dpkd.distill.student.heads import group_sizes, prune_heads
from dpkd.distill.student.importance import Trials
from dpkd.distill.student.init import init_student
from dpkd.distill.student.layers import keep_layers, layer_stack, named_layers
from dpkd.distill.student.measures import batches_of, sample_rows
from dpkd.distill.student.sizes import count_parameters, splits_within
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import unscored_row

WriteRows = Callable[..., Path]
SMALL = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 5, "intermediate_size": 24}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
FAMILIES = {
    "llama, tied": LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True),
    "llama, untied, biases": LlamaConfig(
        **SMALL, **HEADS, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "qwen2": Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=60, n_embd=16, n_layer=5, n_head=2, n_positions=32, n_inner=24),
}
WITH_HEADS = {
    "llama, untied, biases": FAMILIES["llama, untied, biases"],
    "qwen3": Qwen3Config(**SMALL, **HEADS, attention_bias=True),
}


def made(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def rows(*lengths: int) -> list[TrainingRow]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 60, (length,), generator=draw).tolist() for length in lengths]
    return [TrainingRow(unscored_row(tokens[:3], tokens[3:], str(index))) for index, tokens in enumerate(ids)]


def batches(model: PreTrainedModel) -> list[Batch]:
    found = [collate(rows(9, 6), with_distributions=False), collate(rows(8), with_distributions=False)]
    return with_teacher(model, found, num_tokens=60)


@torch.no_grad()
def full_kl(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """KL over all tokens of the vocabulary at every response token, each row alone, in float64."""
    total, count = 0.0, 0
    for part in (rows(9, 6), rows(8)):
        for row in part:
            ids = torch.tensor([[*row.chosen.prompt_ids, *row.chosen.response_ids]])
            log_p, log_q = (
                model.eval().double()(input_ids=ids).logits[0, 2:-1].log_softmax(dim=1) for model in (teacher, student)
            )
            total, count = total + float((log_p.exp() * (log_p - log_q)).sum()), count + len(log_p)
            teacher.float(), student.float()
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trial_is_the_model_without_those_layers(family: str) -> None:
    teacher = made(FAMILIES[family])
    trials = Trials(teacher, batches(teacher), num_tokens=60)
    assert trials.kl(range(5)) == pytest.approx(0, abs=1e-5)
    for kept in ((0, 2, 4), (1, 2, 3, 4), (4,)):
        # all 60 tokens are among the 64 that are compared
        assert trials.kl(kept) == pytest.approx(full_kl(teacher, keep_layers(teacher, kept)), rel=1e-3)
    assert all("forward" not in vars(layer) for layer in layer_stack(teacher)[1])


def test_the_teacher_of_rows_without_a_cache() -> None:
    teacher = made(LlamaConfig(**SMALL | {"vocab_size": 200}, **HEADS))
    (batch,) = with_teacher(teacher, [collate(rows(9, 6), with_distributions=False)], num_tokens=200)
    with torch.no_grad():
        log_p_V = teacher.double()(input_ids=batch.input_ids_BS[:1, :9]).logits[0, 4].log_softmax(dim=0)
    position = 2  # of the first row, whose prompt has 3 tokens
    top = log_p_V.sort(descending=True)
    assert batch.entry_ids_TK[position].tolist() == top.indices[:64].tolist()
    torch.testing.assert_close(batch.entry_logprobs_TK[position].double(), top.values[:64], rtol=1e-4, atol=1e-5)
    assert float(batch.log_tail_T[position]) == pytest.approx(float(top.values[64:].logsumexp(dim=0)), rel=1e-3)
    assert float(batch.teacher_logprob_T[position]) == pytest.approx(float(log_p_V[batch.target_T[position]]), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_removal_is_the_best_of_all(family: str) -> None:
    teacher = made(FAMILIES[family])
    trials = Trials(teacher, batches(teacher), num_tokens=60)
    kept = (0, 1, 2, 3, 4)
    for removal in trials.removals(2, num_tried=5):
        kl_of = {tuple(left): trials.kl(left) for left in itertools.combinations(kept, len(kept) - 1)}
        assert removal.kept == min(kl_of, key=kl_of.__getitem__)
        assert removal.kl == pytest.approx(kl_of[removal.kept], rel=1e-4)
        assert {removal.layer} == {*kept} - {*removal.kept}
        kept = removal.kept
    assert len(kept) == 2


def test_a_layer_that_does_nothing_is_removed_first() -> None:
    teacher = made(FAMILIES["llama, tied"])
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        teacher.model.layers[3].get_submodule(name).weight.data.zero_()
    removal = next(Trials(teacher, batches(teacher), num_tokens=60).removals(4, num_tried=1))
    assert (removal.layer, removal.kl) == (3, pytest.approx(0, abs=1e-5))


def test_layers_that_return_more_than_hidden_states_are_refused() -> None:
    from transformers import BloomConfig

    model = made(BloomConfig(vocab_size=60, hidden_size=16, n_layer=3, n_head=2))
    with pytest.raises(
        UserError, match=r"cannot be chosen by importance.*found a tuple.*type bloom\). Give --keep spread"
    ):
        list(Trials(model, batches(model), num_tokens=60).removals(2))


@pytest.mark.parametrize("family", WITH_HEADS)
def test_removing_silent_heads_keeps_the_logits(family: str, tmp_path: Path) -> None:
    teacher = made(WITH_HEADS[family])
    silent = [1, 0, 2, 1, 0]  # a group of each layer writes nothing
    for layer, group in zip(teacher.model.layers, silent, strict=True):
        layer.self_attn.o_proj.weight.data[:, 8 * group : 8 * group + 8] = 0
    sizes_LG = group_sizes(teacher, batches(teacher))
    assert sizes_LG.argmin(dim=1).tolist() == silent
    student = prune_heads(teacher, 4, sizes_LG)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (4, 2)
    assert full_kl(teacher, student) == pytest.approx(0, abs=1e-6)
    student.save_pretrained(tmp_path / "s")
    assert full_kl(teacher, AutoModelForCausalLM.from_pretrained(tmp_path / "s")) == pytest.approx(0, abs=1e-6)


def test_the_size_of_a_group_is_the_mean_norm_of_what_it_adds() -> None:
    teacher = made(FAMILIES["llama, untied, biases"])
    attention = teacher.model.layers[2].self_attn
    heard: list[torch.Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[0][0]))
    sizes_LG = group_sizes(teacher, [collate(rows(9), with_distributions=False)])
    weight = attention.o_proj.weight.detach()
    for group in range(3):
        part = slice(8 * group, 8 * group + 8)
        added = torch.stack([weight[:, part] @ token[part] for token in heard[0].detach()])
        assert float(sizes_LG[2, group]) == pytest.approx(float((added**2).sum(dim=1).sqrt().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "heads", "message"),
    [
        ("gpt2", 1, "cannot be removed from the model type gpt2: its attention is unknown"),
        ("qwen2", 2, "cannot be removed from the model type qwen2: its config has no size of a head"),
        (
            "llama, tied",
            3,
            "so many attention heads in a layer: found --heads 3, expected one of 2, 4, 6: whole groups",
        ),
        ("llama, tied", 8, "so many attention heads in a layer: found --heads 8"),
    ],
)
def test_heads_that_a_family_cannot_lose(family: str, heads: int, message: str) -> None:
    model = made(FAMILIES[family])
    with pytest.raises(UserError, match=message):
        prune_heads(model, heads, torch.ones(5, 3))


@functools.cache
def counts_by_width(family: str, layers: int) -> dict[int, int]:
    """Parameters of models with every number of neurons, counted in the models themselves."""
    from transformers import AutoConfig

    counts = {}
    for width in range(1, 25):
        name = "n_inner" if family == "gpt2" else "intermediate_size"
        content = FAMILIES[family].to_dict() | {"num_hidden_layers": layers, "n_layer": layers, name: width}
        content.pop("layer_types", None)
        smaller = AutoModelForCausalLM.from_config(AutoConfig.for_model(content.pop("model_type"), **content))
        counts[width] = sum(parameter.numel() for parameter in smaller.parameters())
    return counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.45, 0.7, 0.99])
def test_the_widest_student_within_a_share(family: str, share: float) -> None:
    config = FAMILIES[family]
    most = share * count_parameters(config)
    splits = [split for split in splits_within(config, share, None, None, None) if split.heads is None]
    assert [split.layers for split in splits] == sorted((split.layers for split in splits), reverse=True)
    found = {split.layers: split.width for split in splits}
    for layers in range(1, 6):
        fitting = [width for width, count in counts_by_width(family, layers).items() if count <= most]
        assert (layers in found) == bool(fitting)
        if fitting:
            assert (found[layers] or 24) == max(fitting)


def test_chosen_layers_start_nearer_to_the_real_teacher(teacher_dir: Path, tmp_path: Path) -> None:
    """On rows that they were not chosen on, against layers that are chosen without looking."""
    source = locate_model(str(teacher_dir), "teacher")
    lines = [row for row in map(json.loads, (DOLLY / "train.jsonl").open()) if len(row["output"]) < 120]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row | {"input": ""}) + "\n" for row in lines[:8]))
    found = rows_of_data(str(data), "chat", source, 8)
    model = source.load("float32")
    choose, held = (
        Trials(model, with_teacher(model, list(batches_of(part, torch.device("cpu"))), 49152), 49152)
        for part in (found.choose, found.held)
    )
    *_, last = choose.removals(27)
    ours = held.kl(last.kept)
    assert ours < 0.6 * held.kl(named_layers(30, 27, "spread"))
    assert ours < 0.2 * held.kl(named_layers(30, 27, "last"))


def made_student(out: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    student = init_student(InitStudentConfig(out=out, device="cpu", **options))
    return student, json.loads((student / "student.json").read_bytes())


def test_a_share_is_split_to_stay_nearest_to_the_teacher(
    tmp_path: Path, toy_tokenizer: Path, toy_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = str(make_toy(tmp_path / "teacher", toy_tokenizer, layers=5, seed=1))
    rows = {"teacher": teacher, "data": str(toy_data), "template": "chat"}
    student, report = made_student(tmp_path / "s", params=0.8, **rows)
    said = capsys.readouterr().err
    assert 0.78 < report["share"] <= 0.8
    loaded = AutoModelForCausalLM.from_pretrained(student)
    assert report["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    tried = [float(line.rpartition("KL ")[2]) for line in said.splitlines() if "neurons, all heads: KL" in line]
    assert len(tried) >= 2
    kept = f"{loaded.config.num_hidden_layers} layers, {loaded.config.intermediate_size} neurons"
    assert f"{kept}, all heads: KL {min(tried):.3f}" in said
    assert said.splitlines()[-1].startswith(f"the student {student}: {report['kept']}; ")
    assert "held rows of" in said.splitlines()[-1]
    # the same options give the same student
    again, _ = made_student(tmp_path / "again", params=0.8, **rows)
    assert (again / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"not possible: found --params 0.1, expected at least 0\.\d"):
        made_student(tmp_path / "t", params=0.1, **rows)
    with pytest.raises(UserError, match=r"not possible: found --params 0.3, .* for 5 of 5 layers"):
        made_student(tmp_path / "t", params=0.3, layers=5, **rows)


def test_a_student_with_fewer_heads(tmp_path: Path, toy_tokenizer: Path, toy_data: Path) -> None:
    teacher = make_toy(tmp_path / "teacher", toy_tokenizer, layers=2, seed=1)
    config = LlamaConfig.from_pretrained(teacher, num_key_value_heads=2)  # heads that share none can be removed alone
    AutoModelForCausalLM.from_config(config).save_pretrained(teacher)
    rows = {"teacher": str(teacher), "data": str(toy_data), "template": "chat"}
    student, report = made_student(tmp_path / "s", **rows, heads=1)
    config = AutoModelForCausalLM.from_pretrained(student).config
    assert (config.num_attention_heads, config.num_key_value_heads) == (1, 1)
    assert "1 heads in every layer" in report["kept"]


def test_chosen_layers_are_known_again(tmp_path: Path, toy_teacher: Path, toy_cache: Path) -> None:
    options = {"teacher": str(toy_teacher), "cache": toy_cache, "layers": 1}
    student, report = made_student(tmp_path / "s", **options)
    written = (student / "model.safetensors").stat().st_mtime_ns
    assert made_student(student, **options)[1] == report
    assert (student / "model.safetensors").stat().st_mtime_ns == written
    other, _ = made_student(tmp_path / "other", **options, keep="first" if "layers 1 of" in report["kept"] else "last")
    assert report["before_training"]["kl"] < json.loads((other / "student.json").read_bytes())["before_training"]["kl"]
    with pytest.raises(UserError, match="holds another student; differing: chosen_on"):
        made_student(student, **options, cache_rows=8)


def test_rows_of_data_are_prompts_where_there_are_no_references(
    tmp_path: Path, toy_teacher: Path, write_rows: WriteRows
) -> None:
    data = write_rows([{"prompt": "one two three"}, {"instruction": "say it", "output": "word " * 600}])
    rows = rows_of_data(str(data), "raw", locate_model(str(toy_teacher), "teacher"), 64)
    by_size = sorted((*rows.choose, *rows.held), key=lambda row: len(row.chosen.response_ids))
    assert len(by_size[0].chosen.prompt_ids) == 1
    assert len(by_size[1].chosen.response_ids) == 256
    one, teacher = write_rows([{"prompt": "one two"}], "one.jsonl"), locate_model(str(toy_teacher), "teacher")
    with pytest.raises(UserError, match=r"too few rows to choose .* found rows of 1 examples, expected rows of at"):
        rows_of_data(str(one), "raw", teacher, 64)


def test_rows_of_data_have_the_caches_template_arguments(tmp_path: Path) -> None:
    """The prompts that importance is ranked on are those of the cache, from the command line and from Python."""
    tokenizer = chat_tokenizer(THINKING, directory=tmp_path / "tokenizer")
    teacher = make_toy(tmp_path / "teacher", tmp_path / "tokenizer", layers=3, seed=1)
    data = tmp_path / "data.jsonl"
    lines = [{"id": str(n), "instruction": f"What is {n} and {n}?", "output": str(2 * n)} for n in range(8)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    turns = {line["id"]: [{"role": "user", "content": line["instruction"]}] for line in lines}
    arg = {"enable_thinking": "false"}
    found = rows_of_data(str(data), "chat", locate_model(str(teacher), "teacher"), 8, arg)
    prompts = {row.chosen.example_id: row.chosen.prompt_ids.tolist() for row in (*found.choose, *found.held)}
    for name, ids in prompts.items():
        written = tokenizer.apply_chat_template(turns[name], add_generation_prompt=True, enable_thinking=False)
        assert ids == written["input_ids"]
        assert "<think>\n\n</think>" in tokenizer.decode(ids)
    cache = {"teacher": str(teacher), "data": str(data), "out": str(tmp_path / "cache"), "template": "chat"}
    build_cache(CacheConfig(**cache, template_arg=arg, engine="transformers", max_new_tokens=4, device="cpu"))
    cached = sample_rows(TeacherCache.open(tmp_path / "cache"), 8)
    assert {row.chosen.example_id: row.chosen.prompt_ids.tolist() for row in cached} == prompts

    options = {"teacher": str(teacher), "data": str(data), "template": "chat", "layers": 2}
    python, report = made_student(tmp_path / "python", **options, template_arg=arg)
    _, without = made_student(tmp_path / "without", **options)
    given = ("--data", data, "--template", "chat", "--layers", 2, "--template-arg", "enable_thinking=false")
    result = dpkd("init-student", "--teacher", teacher, "--out", tmp_path / "line", "--device", "cpu", *given)
    assert result.returncode == 0, result.stderr
    for name in ("model.safetensors", "dpkd-student.json", "student.json"):
        assert (tmp_path / "line" / name).read_bytes() == (python / name).read_bytes()
    assert report != without  # metrics on other prompts
