"""Tokens as an endpoint writes them, as texts or bytes, and the ids that a tokenizer has for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpkd.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: what a decoder puts in place of bytes that are no UTF-8: nobody knows which bytes those were
REPLACEMENT = "�"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: how OpenAI writes a token of completions that is a part of a character
_ESCAPED = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
_ID = re.compile(r"token_id:(\d+)")


class TokenTable:
    """The bytes of every token of a tokenizer, and the way back where it is unique.

    A byte-level vocabulary (GPT-2's, Llama 3's, Qwen's) and one with byte fallback (Llama 2's, Gemma's) can be read.
    Raises `UserError` for a tokenizer whose tokens have no bytes of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        to_bytes = _reader(tokenizer)
        #: whether a token's text says which token it is. Byte fallback hides the space at the beginning of a text
        self.is_exact = isinstance(to_bytes, _ByteLevel)
        added = {int(token): str(value.content) for token, value in tokenizer.added_tokens_decoder.items()}
        special = {token for token, value in tokenizer.added_tokens_decoder.items() if value.special}
        self._bytes = {int(token): to_bytes(text) for text, token in tokenizer.get_vocab().items()}
        self._bytes |= {token: text.encode() for token, text in added.items()}
        self._special = {int(token) for token in special}
        self._ids: dict[bytes, list[int]] = {}
        for token in sorted(self._bytes):
            self._ids.setdefault(self._bytes[token], []).append(token)

    def find(self, token: str, data: Sequence[int] | None = None) -> int | None:
        """The id of a token given as text, or as its bytes; None if no token or several are written so.

        `token_id:N`, which vLLM sends when asked, is the id itself.
        """
        if match := _ID.fullmatch(token):
            token_id = int(match[1])
            return token_id if token_id in self._bytes else None
        if data is not None:
            try:
                raw = bytes(data)
            except (TypeError, ValueError):  # what the endpoint sent is no bytes
                return None
        elif match := _ESCAPED.fullmatch(token):
            raw = bytes.fromhex(match[1].replace("\\x", ""))
        else:
            raw = token.encode("utf-8", "surrogatepass")
        if REPLACEMENT.encode() in raw:
            return None
        ids = self._ids.get(raw, [])
        return ids[0] if len(ids) == 1 else None

    def text(self, ids: Sequence[int], *, with_special: bool = False) -> str:
        """The text of `ids`, special tokens left out; characters that are cut off become replacement characters."""
        shown = ids if with_special else [token for token in ids if token not in self._special]
        return b"".join(self._bytes[token] for token in shown).decode("utf-8", "replace")


def _reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    if tokenizer.is_fast:
        decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}, ensure_ascii=False)
        if '"ByteLevel"' in decoder:
            return _ByteLevel()
        if '"ByteFallback"' in decoder or "▁" in decoder:
            return _ByteFallback()
    raise UserError(
        "the tokenizer's tokens have no bytes of their own, so an endpoint's tokens cannot be identified",
        found=type(tokenizer).__name__,
        expected="a fast tokenizer with byte-level or byte-fallback tokens",
        where=tokenizer.name_or_path,
        advice="Give --top-k 0 to cache texts alone",
    )


class _ByteLevel:
    """Each character of a token stands for a byte."""

    def __init__(self) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def __call__(self, token: str) -> bytes:
        if all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        return token.encode()


class _ByteFallback:
    """`▁` is a space and `<0xNN>` a byte."""

    def __call__(self, token: str) -> bytes:
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()
