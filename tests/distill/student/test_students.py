"""Making students: pruned, random and copied; recognised when finished; measured before training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.toys import make_toy
from transformers import AutoTokenizer, GPT2Config

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.student import calibration
from dpkd.distill.student.calibration import rows_of_cache
from dpkd.distill.student.init import init_student
from dpkd.distill.training import train
from dpkd.teacher_cache.store.reader import TeacherCache


def made(out: Path, teacher: Path, **options: Any) -> ModelSource:
    return locate_model(str(init_student(InitStudentConfig(teacher=str(teacher), out=out, **options))), "student")


def report(student: ModelSource) -> dict[str, Any]:
    return json.loads((student.path / "student.json").read_bytes())


def test_a_student_has_the_layers_and_tokenizer_of_its_teacher(tmp_path: Path, toy_teacher: Path) -> None:
    student, teacher = (
        made(tmp_path / "s", toy_teacher, layers=1, keep="first"),
        locate_model(str(toy_teacher), "teacher"),
    )
    assert student.config.num_hidden_layers == 1
    assert student.tokenizer_identity() == teacher.tokenizer_identity()
    assert student.stop_token_ids() == teacher.stop_token_ids()
    ours, theirs = student.load("float32").state_dict(), teacher.load("float32").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # by hand: embeddings (which are the head too), attention, MLP, two norms, the last norm
    a_layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 128 + 2 * 64
    parameters = 600 * 64 + a_layer + 64
    share = parameters / (parameters + a_layer)
    assert report(student) == {"kept": "layers 0 of 2", "parameters": parameters, "share": share}


def test_a_teacher_in_bfloat16_gives_nearly_the_same_student(
    tmp_path: Path, toy_teacher: Path, toy_cache: Path
) -> None:
    asked: dict[str, Any] = {"layers": 1, "mlp_width": 64, "cache": str(toy_cache)}
    full = made(tmp_path / "full", toy_teacher, **asked)
    half = made(tmp_path / "half", toy_teacher, **asked, dtype="bfloat16")
    weights = load_file(half.path / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    with pytest.raises(UserError, match=r"differing: teacher\.dtype: \"bfloat16\" -> \"float32\""):
        made(tmp_path / "half", toy_teacher, **asked)
    kl, rounded = (report(student)["before_training"]["kl"] for student in (full, half))
    assert report(full)["kept"] == report(half)["kept"]
    assert rounded != kl
    assert rounded == pytest.approx(kl, rel=0.02)


def test_a_teacher_that_does_not_fit_is_one_line(
    tmp_path: Path, toy_teacher: Path, toy_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 40.00 GiB")

    monkeypatch.setattr(calibration, "with_teacher", out_of_memory)
    with pytest.raises(
        UserError, match=r"the teacher does not fit: CUDA out of memory.*Lower --cache-rows, give --dtype bf"
    ):
        made(tmp_path / "s", toy_teacher, layers=1, cache=str(toy_cache))
    assert not (tmp_path / "s").exists()


def test_a_student_is_known_again(tmp_path: Path, toy_teacher: Path) -> None:
    out = made(tmp_path / "s", toy_teacher, layers=1, keep="last").path
    before = (out / "model.safetensors").stat().st_mtime_ns
    made(out, toy_teacher, keep="1")  # the same layer, said otherwise
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds another student; differing: layers: \[1\] -> \[0, 1\]"):
        made(out, toy_teacher, layers=2, keep="last")
    with pytest.raises(UserError, match=r"holds another student; differing: layers: \[1\] -> \[0\]"):
        made(out, toy_teacher, layers=1, keep="spread")
    with pytest.raises(UserError, match="holds another student; differing: checkpoint: "):
        made(out, toy_teacher, from_checkpoint=str(toy_teacher))


def test_listed_layers_are_kept(tmp_path: Path, toy_teacher: Path) -> None:
    ours = made(tmp_path / "s", toy_teacher, keep="1").load("float32").state_dict()
    theirs = locate_model(str(toy_teacher), "teacher").load("float32").state_dict()
    moved = {name: name.replace("layers.0.", "layers.1.") for name in ours}
    assert all(torch.equal(value, theirs[moved[name]]) for name, value in ours.items())


def test_more_layers_than_the_teacher_is_an_error(tmp_path: Path, toy_teacher: Path) -> None:
    with pytest.raises(UserError, match="more layers than the teacher: found 9, expected at most 2"):
        made(tmp_path / "s", toy_teacher, layers=9, keep="first")
    assert not (tmp_path / "s").exists()


def test_another_directory_is_not_overwritten(tmp_path: Path, toy_teacher: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no student of dpkd"):
        made(tmp_path, toy_teacher, layers=1, keep="last")


def test_neurons_are_chosen_on_the_cache(tmp_path: Path, toy_teacher: Path, toy_cache: Path) -> None:
    student = made(tmp_path / "s", toy_teacher, layers=1, keep="last", mlp_width=40, cache=toy_cache)
    ours, theirs = student.load("float32").model, locate_model(str(toy_teacher), "teacher").load("float32").model
    up, all_up = ours.layers[0].mlp.up_proj.weight, theirs.layers[1].mlp.up_proj.weight
    places = [int((all_up == row).all(dim=1).nonzero()) for row in up]
    assert places == sorted(set(places))
    assert len(places) == student.config.intermediate_size == 40
    # those left out write less on the cache's rows, by a pass over each row alone
    heard: list[torch.Tensor] = []
    theirs.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, arguments: heard.append(arguments[0][0]))
    with torch.no_grad():
        for row in (row.chosen for row in rows_of_cache(TeacherCache.open(toy_cache), 64).choose):
            theirs(input_ids=torch.tensor([[*row.prompt_ids, *row.response_ids]]))
    sizes_W = torch.cat(heard).abs().mean(dim=0) * theirs.layers[1].mlp.down_proj.weight.detach().norm(dim=0)
    assert sorted(sizes_W.argsort(descending=True)[:40].tolist()) == places
    with pytest.raises(UserError, match="more neurons than the teacher's: found --mlp-width 129, expected at most 128"):
        made(tmp_path / "t", toy_teacher, mlp_width=129, cache=toy_cache)


def test_every_neuron_kept_is_the_teacher(tmp_path: Path, toy_teacher: Path, toy_cache: Path) -> None:
    ids = torch.arange(20)[None]
    student = made(tmp_path / "s", toy_teacher, mlp_width=128, cache=toy_cache).load("float32")
    teacher = locate_model(str(toy_teacher), "teacher").load("float32")
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, teacher(input_ids=ids).logits)


def test_measures_are_those_of_full_logits(tmp_path: Path, toy_teacher: Path, toy_cache: Path) -> None:
    student = made(tmp_path / "s", toy_teacher, layers=1, keep="last", cache=toy_cache, cache_rows=1000)
    model, rows = student.load("float32"), rows_of_cache(TeacherCache.open(toy_cache), 1000)
    chosen, held = ({row.chosen.example_id for row in part} for part in (rows.choose, rows.held))
    assert (len(rows.choose), len(chosen | held), chosen & held) == (10, 20, set())
    nll = kl = agreements = 0.0
    num_rows = num_tokens = 0
    for row in (row.chosen for row in rows.held):
        with torch.no_grad():
            logits_SV = model(input_ids=torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits[0].double()
        log_q_TV = logits_SV.log_softmax(dim=1)[len(row.prompt_ids) - 1 : -1]
        entry = 0
        for place, token in enumerate(row.response_ids):
            nll -= float(log_q_TV[place, token])
            count, top = row.distributions.counts_T[place], row.distributions
            ids = torch.tensor(top.ids_E[entry : entry + count].astype(int))
            p = torch.tensor([*top.logprobs_E[entry : entry + count], top.log_tail_T[place]]).double().exp()
            q = log_q_TV[place, ids].exp()
            q = torch.cat([q, 1 - q.sum()[None]])
            p = p / p.sum()
            kl += float((p * (p / q).log()).sum())
            agreements += float(log_q_TV[place].argmax() == ids[0])
            entry += count
        num_rows, num_tokens = num_rows + 1, num_tokens + len(row.response_ids)
    measures = report(student)["before_training"]
    assert (measures["rows"], measures["tokens"]) == (num_rows, num_tokens)
    assert measures["perplexity"] == pytest.approx(math.exp(nll / num_tokens), rel=1e-4)
    assert measures["kl"] == pytest.approx(kl / num_tokens, rel=1e-3)
    assert measures["top1_agreement"] == pytest.approx(agreements / num_tokens)


def test_a_student_that_stands_is_measured_once(
    tmp_path: Path, toy_teacher: Path, toy_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = made(tmp_path / "s", toy_teacher, layers=1, keep="first")
    made(student.path, toy_teacher, layers=1, keep="first", cache=toy_cache, cache_rows=5)
    found = report(student)
    assert found["before_training"]["rows"] == 4  # the fifth is for choosing
    assert found["parameters"] == sum(parameter.numel() for parameter in student.load("float32").parameters())
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"the student {student.path}: layers 0 of 2; 0.1M parameters (")
    assert f"before training KL to the teacher {found['before_training']['kl']:.2f} nats a token, top-1" in said
    written = (student.path / "student.json").stat().st_mtime_ns
    made(student.path, toy_teacher, layers=1, keep="first", cache=toy_cache, cache_rows=5)
    assert (student.path / "student.json").stat().st_mtime_ns == written
    assert "; before training KL" in capsys.readouterr().err


def test_the_teacher_has_no_distance_from_itself(tmp_path: Path, toy_teacher: Path, toy_cache: Path) -> None:
    measures = report(made(tmp_path / "s", toy_teacher, layers=2, cache=toy_cache))["before_training"]
    assert measures["kl"] == pytest.approx(0, abs=1e-4)
    assert measures["top1_agreement"] > 0.99


def test_a_random_student_of_a_config(tmp_path: Path, toy_teacher: Path, toy_cache: Path) -> None:
    path = tmp_path / "small.json"
    config = GPT2Config(vocab_size=640, n_embd=16, n_layer=1, n_head=2, n_positions=512)
    path.write_text(json.dumps(config.to_dict()))
    student = made(tmp_path / "s", toy_teacher, from_config=path, cache=toy_cache)
    teacher = locate_model(str(toy_teacher), "teacher")
    assert student.config.model_type == "gpt2"
    assert student.tokenizer_identity() == teacher.tokenizer_identity()
    assert student.stop_token_ids() == teacher.stop_token_ids() == [0]
    # nothing is known yet: about as many guesses as there are places
    assert report(student)["before_training"]["perplexity"] == pytest.approx(640, rel=0.1)
    ours = student.load("float32").state_dict()
    again, other = (
        made(tmp_path / f"s{seed}", toy_teacher, from_config=path, seed=seed).load("float32").state_dict()
        for seed in (0, 1)
    )
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    assert not torch.equal(other["transformer.wte.weight"], ours["transformer.wte.weight"])


def test_unusable_configs(tmp_path: Path, toy_teacher: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="the student's config is missing"):
        made(tmp_path / "s", toy_teacher, from_config=path)
    path.write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UserError, match=r"the student's config cannot be used: .*config\.json"):
        made(tmp_path / "s", toy_teacher, from_config=path)
    path.write_text(json.dumps(GPT2Config(vocab_size=599).to_dict()))
    with pytest.raises(
        UserError, match="smaller than the teacher's tokenizer: found vocab_size 599, expected at least"
    ):
        made(tmp_path / "s", toy_teacher, from_config=path)
    assert not (tmp_path / "s").exists()


def test_a_checkpoint_with_a_padded_vocabulary_is_copied(
    tmp_path: Path, toy_teacher: Path, toy_tokenizer: Path, toy_cache: Path
) -> None:
    checkpoint = make_toy(tmp_path / "wide", toy_tokenizer, layers=1, seed=5, vocab_size=640)
    student = made(tmp_path / "s", toy_teacher, from_checkpoint=str(checkpoint), cache=toy_cache)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (student.path / name).read_bytes() == (checkpoint / name).read_bytes()
    assert report(student)["before_training"]["tokens"] > 0


def test_a_checkpoint_with_another_tokenizer_is_refused(tmp_path: Path, toy_teacher: Path, other_student: Path) -> None:
    with pytest.raises(UserError, match=r"the checkpoint's tokenizer is not the teacher's: found .* \(600 tokens\)"):
        made(tmp_path / "s", toy_teacher, from_checkpoint=str(other_student))
    assert not (tmp_path / "s").exists()


def test_a_base_student_takes_the_teachers_eos(tmp_path: Path, toy_teacher: Path, toy_cache: Path) -> None:
    """`--eos-from-teacher`: a tokenizer that differs in its EOS alone, as those of base models do."""
    base = Path(shutil.copytree(toy_teacher, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|user|>"
    tokenizer.save_pretrained(base)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((base / name).read_text()) | {"eos_token_id": tokenizer.eos_token_id}
        (base / name).write_text(json.dumps(values))
    except_for = r"tokenizer is the teacher's except for its EOS: found '<\|user\|>' of .*, expected '<\|end\|>' of .*"
    with pytest.raises(UserError, match=except_for + r"`dpkd init-student --from .*base --eos-from-teacher`"):
        made(tmp_path / "s", toy_teacher, from_checkpoint=str(base))
    run = {"cache": str(toy_cache), "student": str(base), "out": tmp_path / "run", "steps": 1, "batch_size": 2}
    with pytest.raises(UserError, match="the student's " + except_for + "--eos-from-teacher"):
        train(TrainConfig(**run))
    student = made(tmp_path / "s", toy_teacher, from_checkpoint=str(base), eos_from_teacher=True)
    assert student.tokenizer.eos_token == "<|end|>"
    assert student.stop_token_ids() == locate_model(str(toy_teacher), "teacher").stop_token_ids() == [0]
    assert student.config.eos_token_id == 0
    assert (student.path / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    train(TrainConfig(**run | {"student": str(student.path)}))
    # one with the teacher's tokenizer is copied as without the option
    same = made(tmp_path / "same", toy_teacher, from_checkpoint=str(toy_teacher), eos_from_teacher=True)
    assert (same.path / "config.json").read_bytes() == (toy_teacher / "config.json").read_bytes()


def test_a_cache_of_another_tokenizer_is_refused(tmp_path: Path, other_student: Path, toy_cache: Path) -> None:
    with pytest.raises(UserError, match="the teacher's tokenizer is not the cache's"):
        made(tmp_path / "s", other_student, layers=1, cache=toy_cache)
    assert not (tmp_path / "s").exists()


def test_positions_that_end_before_the_rows_do(tmp_path: Path, toy_teacher: Path, toy_cache: Path) -> None:
    path = tmp_path / "short.json"
    path.write_text(json.dumps(GPT2Config(vocab_size=600, n_embd=16, n_layer=1, n_head=2, n_positions=16).to_dict()))
    with pytest.raises(UserError, match=r"longer than the student's positions: found .* expected at most 16"):
        made(tmp_path / "s", toy_teacher, from_config=path, cache=toy_cache)


def test_a_failure_while_it_is_written_leaves_nothing(
    tmp_path: Path, toy_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="cannot be written: no space left on device"):
        made(tmp_path / "s", toy_teacher, layers=1, keep="last")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say what the student is: --params SHARE, --layers N, --mlp-width N, --heads N, --from-config FILE or"),
        ({"layers": 2}, r"--keep importance \(the default\) chooses on rows: give --cache CACHE, or --data"),
        ({"params": 0.5}, r"--keep importance \(the default\) chooses on rows: give --cache"),
        ({"heads": 2}, "--heads chooses on rows: give --cache"),
        ({"params": 0.5, "layers": 2, "mlp_width": 3, "cache": "c"}, "--params chooses layers or neurons"),
        ({"params": 1.5, "cache": "c"}, "`params` must be 1 or less, found 1.5"),
        ({"params": 0.5, "keep": "last", "cache": "c"}, "--keep last needs --layers N"),
        ({"layers": 2, "cache": "c", "data": "d", "template": "raw"}, "give --cache or --data, not both"),
        ({"layers": 2, "data": "d"}, "--data and --template go together"),
        ({"layers": 2, "cache": "c", "template_arg": {"a": "1"}}, "--template-arg goes with --data; a cache"),
        ({"keep": "first"}, "--keep first needs --layers N"),
        ({"keep": "middle", "layers": 2}, "'middle' is neither importance, spread, first, last nor a list of layers"),
        ({"keep": "3,1"}, "--keep 3,1 must list layers in ascending order, each once"),
        ({"keep": [1, 1]}, "--keep 1,1 must list layers in ascending order, each once"),
        ({"keep": "0,3,7", "layers": 2}, "--keep 0,3,7 lists 3 layers, but --layers says 2"),
        ({"mlp_width": 8}, "--mlp-width chooses on rows: give --cache"),
        ({"from_config": "c.json", "from_checkpoint": "d"}, "give --from-config or --from, not both"),
        ({"from_config": "c.json", "layers": 2}, "--layers selects the teacher's weights .* --from-config"),
        ({"from_checkpoint": "d", "mlp_width": 2, "cache": "c"}, "--mlp-width selects .* does not go with --from"),
        ({"layers": 2, "keep": "last", "cache_rows": 9}, "--cache-rows goes with --cache or --data: nothing else has"),
        ({"from_checkpoint": "d", "cache_rows": 9}, "--cache-rows goes with --cache or --data"),
        ({"layers": 2, "keep": "last", "seed": 1}, "--seed goes with --from-config"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InitStudentConfig.parse({"teacher": "t", "out": "o"} | options, where="the command line")


@pytest.mark.parametrize("keep", ["0,3,7", [0, 3, 7], (0, 3, 7), "0, 3, 7"])
def test_a_list_of_layers_is_text_or_toml(keep: object) -> None:
    config = InitStudentConfig.parse({"teacher": "t", "out": "o", "keep": keep}, where="here")
    assert config.keep == (0, 3, 7)


@pytest.mark.parametrize("options", [{"mlp_width": 3, "cache": "c"}, {"from_checkpoint": "d"}, {"keep": 2}])
def test_saved_options_give_the_same_student(options: dict[str, Any]) -> None:
    import tomllib

    config = InitStudentConfig(teacher="t", out="o", **options)
    assert InitStudentConfig.parse(tomllib.loads(config.to_toml()), where="dpkd.toml") == config
