"""From text to token ids, so that text never becomes a control token.

Stages pass on *marked text*: in it the control tokens of the template have private names, and what is spelled out is
text. An ordinary row is encoded exactly as the tokenizer encodes its whole plain text. A row that spells a control
token is encoded by a copy of the tokenizer that knows control tokens by their private names only.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

_OPEN, _CLOSE = "\uf8f0", "\uf8f1"  # of the private use area, around names


class TemplateMismatchError(ValueError):
    """This example has no form in the chosen template; the text says why."""


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and those added tokens that its chat template puts around
    turns. Other added tokens, such as `<think>` in most tokenizers, stay tokens wherever they are spelled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        around_turns = _written_around_turns(tokenizer)
        self._ids = {
            str(token.content): int(token_id)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            # a tokenizer that splits its special tokens never gives one
            if (not tokenizer.split_special_tokens if token.special else token.content in around_turns)
        }
        mark = secrets.token_hex(8)  # unknown to whoever wrote the data; it changes no id
        self._names = {text: f"{_OPEN}{mark}-{token_id}{_CLOSE}" for text, token_id in self._ids.items()}
        self._texts = {name: text for text, name in self._names.items()}
        self._stand_ins = {text: f"zq{mark}n{token_id}zq" for text, token_id in self._ids.items()}
        self._spelled = _any_of(self._names)
        self._named = re.compile(f"({_OPEN}{mark}-[0-9]+{_CLOSE})")
        # models give the unknown token for characters that they do not know; where it is EOS, they never do
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
        self._counted = frozenset(self._ids.values()) - unknown
        #: how marked text writes the EOS of a template
        self.eos = self._names.get(str(tokenizer.eos_token), str(tokenizer.eos_token))

    def spelled_in(self, value: Any) -> str | None:
        """The first control token that a string in `value` (text, list or dict) spells; None if none does."""
        if isinstance(value, str):
            found = self._spelled.search(value)
            return found and found[0]
        if isinstance(value, dict):
            value = [*value, *value.values()]
        items = map(self.spelled_in, value) if isinstance(value, list | tuple) else ()
        return next((found for found in items if found), None)

    def plain(self, marked: str) -> str:
        """Marked text as the words that a person reads."""
        return self._named.sub(lambda name: self._texts[name[0]], marked) if _OPEN in marked else marked

    def rendered(self, write: Callable[[Any], str], data: Any) -> str:
        """`write(data)` as marked text, where `write` renders a template and `data` is all that it gets of a row.

        Raises `TemplateMismatchError` if the data spells a control token in a text that the template changes.
        """
        text, spelled = write(data), self.spelled_in(data)
        if spelled is None:
            return self._marked(text)
        restore = {stand_in: text for text, stand_in in self._stand_ins.items()}

        def restored(written: str) -> str:
            return _any_of(restore).sub(lambda found: restore[found[0]], written)

        defused = write(_with_strings(data, lambda of: self._spelled.sub(lambda found: self._stand_ins[found[0]], of)))
        if restored(defused) != text:
            raise TemplateMismatchError(f"the row spells {spelled}, and the chat template changes the text around it")
        return restored(self._marked(defused))

    def encode(self, marked: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of marked texts, in one batch. With `add_special_tokens` the tokenizer adds its own (a BOS), but no EOS.

        Raises `UserError` if the tokenizer gives a control token for text even so.
        """
        if not marked:
            return []
        texts = [self.plain(text) for text in marked]
        if not self._tokenizer.is_fast:
            return [self._encode_slowly(*pair, add_special_tokens) for pair in zip(marked, texts, strict=True)]
        # without `verbose`, no warning about texts longer than the model's positions: the caller checks lengths
        batch = self._tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )
        found = []
        for text, encoding in zip(marked, batch.encodings or (), strict=True):
            # a normaliser may make a control token of other characters: then there is one too many
            if self._spelled.search(text) or self._num_given(encoding) != self._num_named(text):
                encoding = self._private.encode(text, add_special_tokens=add_special_tokens)
                if self._num_given(encoding) != self._num_named(text):
                    raise self._unencodable(text)
            found.append(self._without_closing(encoding))
        return found

    def _marked(self, text: str) -> str:
        return self._spelled.sub(lambda found: self._names[found[0]], text)

    def _num_named(self, marked: str) -> int:
        if _OPEN not in marked:
            return 0
        return sum(self._ids[self._texts[name]] in self._counted for name in self._named.findall(marked))

    def _num_given(self, encoding: Encoding) -> int:
        """Control tokens among the ids, without those that the tokenizer adds to every text."""
        ids = encoding.ids
        if self._counted.isdisjoint(ids):
            return 0
        return sum(
            token_id in self._counted and encoding.token_to_chars(index) is not None
            for index, token_id in enumerate(ids)
        )

    def _without_closing(self, encoding: Encoding) -> list[int]:
        """The ids without an EOS that the tokenizer closes every text with."""
        ids: list[int] = encoding.ids
        while ids and ids[-1] == self._tokenizer.eos_token_id and encoding.token_to_chars(len(ids) - 1) is None:
            ids.pop()
        return ids

    @cached_property
    def _private(self) -> Tokenizer:
        """The tokenizer with private names, and the same ids, for control tokens."""
        from tokenizers import Tokenizer

        names = self._names
        content: dict[str, Any] = json.loads(self._tokenizer.backend_tokenizer.to_str())
        content["truncation"] = content["padding"] = None
        for token in content["added_tokens"]:
            if token["content"] in names:
                token["content"], token["normalized"] = names[token["content"]], False
        model = content["model"]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        # a model may know control tokens as words of its own
        if isinstance(vocab := model["vocab"], dict):
            model["vocab"] = {names.get(token, token): token_id for token, token_id in vocab.items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
        copy = Tokenizer.from_str(json.dumps(content))
        if any(copy.token_to_id(names[text]) != token_id for text, token_id in self._ids.items()):
            raise self._unencodable("")
        return copy

    def _encode_slowly(self, marked: str, text: str, add_special_tokens: bool) -> list[int]:
        """For a tokenizer without a fast form; a text that spells a control token is encoded part by part."""
        eos = self._tokenizer.eos_token_id
        if not self._spelled.search(marked):
            ids = list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
            while ids and ids[-1] == eos and not text.endswith(str(self._tokenizer.eos_token)):
                ids.pop()
            return ids
        ids = []
        if add_special_tokens and self._tokenizer.encode("")[:1] == [self._tokenizer.bos_token_id] != [eos]:
            ids.append(self._tokenizer.bos_token_id)
        for part in self._named.split(marked):
            if part in self._texts:
                ids.append(self._ids[self._texts[part]])
                continue
            of_part = self._tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
            if not self._counted.isdisjoint(of_part):
                raise self._unencodable(marked)
            ids += of_part
        return ids

    def _unencodable(self, marked: str) -> UserError:
        return UserError(
            "a row spells a control token, and this tokenizer cannot encode one as text",
            found=repr(self.spelled_in(marked) or self.plain(marked)[:60]),
            where=self._tokenizer.name_or_path,
            advice="Remove such rows from the data",
        )


def _any_of(texts: Sequence[str] | dict[str, str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _with_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_with_strings(key, change): _with_strings(item, change) for key, item in value.items()}
    return [_with_strings(item, change) for item in value] if isinstance(value, list | tuple) else value


def _written_around_turns(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes around turns: not the start of an answer, where text follows in its own way."""
    found = []
    for roles in (("system", "user"), ("user", "assistant", "user"), ("user",)) if tokenizer.chat_template else ():
        turns = [{"role": role, "content": "x"} for role in roles]
        with contextlib.suppress(Exception):  # a template that takes no such turns; its rows say why
            found.append(str(tokenizer.apply_chat_template(turns, tokenize=False)))
    return "".join(found)
