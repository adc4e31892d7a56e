"""The engine `openai` against a real vLLM server: its log-probs are those of the engine `vllm` at the same ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.conversations import conversations
from support.toys import make_toy
from support.vllm_servers import VllmServer
from support.world import learn, rows

from dpkd.core.models import locate_model
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.engines.engine import EngineOptions, ScoreRequest, results_only
from dpkd.teacher_cache.engines.open import open_engine
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.codec import MAX_ERROR_NATS
from dpkd.teacher_cache.store.reader import TeacherCache

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def teacher_that_ends(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    """A toy that has learned when to stop, so that responses have an EOS; its template knows tools."""
    directory = make_toy(tmp_path_factory.mktemp("learned") / "teacher", toy_tokenizer, layers=1, seed=4)
    template = directory / "chat_template.jinja"
    turn = "{{ message['content'] }}"
    plain = template.read_text(encoding="utf-8")
    assert turn in plain
    template.write_text(
        "{% if tools %}<|user|>{{ tools | tojson }}<|end|>{% endif %}"
        + plain.replace(
            turn,
            turn + "{% for call in message.tool_calls or () %}{{ call.function.name }}"
            "{{ call.function.arguments | tojson }}{% endfor %}",
        ),
        encoding="utf-8",
    )
    learn(directory, 60)
    return directory


@pytest.fixture(scope="module")
def server(teacher_that_ends: Path) -> Iterator[VllmServer]:
    with VllmServer(teacher_that_ends, arguments=["--max-logprobs", "20", "--served-model-name", "toy"]) as running:
        yield running


def test_a_vllm_endpoint_gives_the_vllm_engines_values(
    server: VllmServer, teacher_that_ends: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (talk,) = [row for row in conversations() if "tools" in row]
    talk["messages"] = talk["messages"][:3]  # a question, a call of a tool, its result
    (tool,) = talk["tools"]
    function = tool["function"]
    ordered = {"name": function["name"], "description": "The weather.", "parameters": function["parameters"]}
    # vLLM orders the keys of a tool, and writes a missing description as null: other prompts than the tokenizer's
    others = {"no description": tool, "other order": tool | {"function": dict(reversed(ordered.items()))}}
    talks = [talk | {"tools": [tool | {"function": ordered}]}]
    talks += [talk | {"id": name, "tools": [other]} for name, other in others.items()]
    data = write_rows([*list(rows())[:20], *talks])
    for api in ("completions", "chat"):
        config = CacheConfig(
            engine="openai", teacher_url=f"{server.url}/v1", teacher_model="toy", teacher=str(teacher_that_ends),
            teacher_api=api, data=str(data), out=str(tmp_path / api), template="chat", max_new_tokens=24,
        )  # fmt: skip
        manifest = build_cache(config)
        assert [row["example_id"] for row in manifest.failed] == (list(others) if api == "chat" else [])
        for row in manifest.failed:
            assert re.match(r"the endpoint reads the prompt as (\d+|other) tokens", row["reason"])
        # the server's own limit, found by asking
        facts = manifest.identities["generation"]["endpoint"]
        assert (facts["top_k"], facts["token_ids"], facts["end"]) == (20, True, "known")
        assert facts["prompt_tokens"] == "as the tokenizer"
        assert facts.get("tools") == ("calls in the text" if api == "chat" else None)
        verify_cache(tmp_path / api)

    teacher = locate_model(str(teacher_that_ends), "teacher")
    options = EngineOptions(max_length=512, top_k=20, dtype="float32", device="cpu", max_num_seqs=16)
    found = {
        api: [shard.row(i) for _, shard in cache.scan(cache.shards()) for i in range(len(shard))]
        for api in ("completions", "chat")
        for cache in [TeacherCache.open(tmp_path / api)]
    }
    requests = [(api, row) for api, ours in found.items() for row in ours]
    assert any(row.finish_reason == "stop" for _, row in requests), "no response ends: the EOS is not tested"
    with open_engine("vllm", teacher, options) as engine:
        scored = engine.score(
            ScoreRequest(index, row.prompt_ids.tolist(), row.response_ids.tolist())
            for index, (_, row) in enumerate(requests)
        )
        for result in results_only(scored):
            api, row = requests[result.index]
            np.testing.assert_allclose(row.response_logprobs, result.logprobs_T, atol=1e-4)
            ours, theirs = row.distributions, result.distributions
            assert ours is not None
            assert theirs is not None
            ends, other_ends = np.cumsum([0, *ours.counts_T]), np.cumsum([0, *theirs.counts_T])
            for position, count in enumerate(ours.counts_T):
                assert count in ((19, 20) if api == "chat" else (20,))
                mine = slice(ends[position], ends[position] + count)
                other = slice(other_ends[position], other_ends[position] + count)
                np.testing.assert_array_equal(ours.ids_E[mine], theirs.ids_E[other])
                np.testing.assert_allclose(ours.logprobs_E[mine], theirs.logprobs_E[other], atol=MAX_ERROR_NATS + 1e-4)
                if count == 20:
                    assert ours.log_tail_T[position] == pytest.approx(theirs.log_tail_T[position], abs=1e-3)
