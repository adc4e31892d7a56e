"""What a judge is asked and how its replies are read: prompts from files, fenced texts, the form of the last line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dpkd.core.errors import UserError
from dpkd.core.identity import fingerprint

Form = Literal["score", "scores", "verdict"]

_FOLDER = Path(__file__).with_name("prompts")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_LABELS = {"instruction": "task", "answer": "answer", "answer_a": "answer A", "answer_b": "answer B"}
_OPTIONAL = ("instruction", "reference", "mark")

#: words with which chat templates mark turns; some servers also act on them inside a message
_CONTROL = re.compile(r"<[|\uff5c]|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")


class _Shape(NamedTuple):
    file: str
    needed: tuple[str, ...]
    word: str
    line: re.Pattern[str]
    text: str


_GRADE, _SIDE = r"(10|[1-9])(?: ?/ ?10)?", r"(A|B|tie)"


def _line(word: str, *values: str) -> re.Pattern[str]:
    """The last line: `word` and `values`, which may be bold or in italics and end with a full stop."""
    bold = r"[*_]*"
    parts = r",?\s+".join(f"{bold}{value}{bold}" for value in values)
    return re.compile(rf"\s*{bold}{word}:{bold}\s*{parts}\.?{bold}\s*")


_SHAPES: dict[Form, _Shape] = {
    "score": _Shape("pointwise.txt", ("answer",), "Score:", _line("Score", _GRADE), "Score: N"),
    "scores": _Shape(
        "with-reference.txt",
        ("answer_a", "answer_b"),
        "Scores:",
        _line("Scores", _GRADE, _GRADE),
        "Scores: N M",
    ),
    "verdict": _Shape(
        "pairwise.txt",
        ("answer_a", "answer_b"),
        "Verdict:",
        _line("Verdict", _SIDE),
        "Verdict: A\nVerdict: B\nVerdict: tie",
    ),
}


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt with placeholders, and the form of reply that it asks for."""

    form: Form
    name: str
    text: str

    @property
    def sha256(self) -> str:
        """The hash of the prompt's text, as hexadecimal text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def reask(self) -> str:
        """What to send a judge whose reply cannot be read."""
        return _read(_FOLDER / "reask.txt").replace("{form}", _SHAPES[self.form].text).strip()

    def render(self, parts: Mapping[str, str], references: Sequence[str]) -> str:
        """The question: each of `parts` (`instruction` and answers, by placeholder) and each reference in a fence.

        A fence has a mark that occurs in none of the texts, so no text can close it.
        """
        mark = _mark([*parts.values(), *references])
        blocks = {name: _fence(_LABELS[name], text, mark) for name, text in parts.items()}
        blocks["reference"] = "\n\n".join(_fence("reference", text, mark) for text in references)
        blocks["mark"] = mark
        # one pass, so that braces within a text are not placeholders
        return _PLACEHOLDER.sub(lambda match: blocks[match[1]], self.text)


def read_prompt(path: Path | None, form: Form) -> JudgePrompt:
    """The prompt in the file `path`, or the shipped one of `form`.

    Raises `UserError` for a file that is missing, lacks a placeholder, has an unknown one, or does not ask for the
    expected last line.
    """
    shape = _SHAPES[form]
    if path is None:
        return JudgePrompt(form, shape.file, _read(_FOLDER / shape.file))
    text = _read(path)
    known = (*shape.needed, *_OPTIONAL)
    found = _PLACEHOLDER.findall(text)
    if unknown := [name for name in found if name not in known]:
        raise UserError(
            "the prompt has an unknown placeholder",
            found=f"{{{unknown[0]}}}",
            expected=", ".join(f"{{{name}}}" for name in known),
            where=path,
            advice="Every word of lower-case letters in braces is a placeholder",
        )
    if missing := [name for name in shape.needed if name not in found]:
        raise UserError(
            "the prompt lacks a placeholder",
            found=", ".join(f"{{{name}}}" for name in dict.fromkeys(found)) or "none",
            expected=f"{{{missing[0]}}}",
            where=path,
            advice="Put it where the text belongs",
        )
    if shape.word not in text:
        raise UserError(
            "the prompt does not ask for the last line that dpkd reads",
            expected=repr(shape.text),
            where=path,
            advice=f"Ask for a last line of exactly that form, with the word {shape.word!r}",
        )
    return JudgePrompt(form, path.name, text)


def parse_reply(form: Form, reply: str) -> tuple[str, ...] | None:
    """The last line of a reply: a grade, two grades, or a verdict; None for any other form.

    White space, bold and italics, a full stop at the end and `/10` after a grade are ignored. Nothing else is corrected
    or searched for.
    """
    last = reply.rstrip().rpartition("\n")[2]
    match = _SHAPES[form].line.fullmatch(last)
    return None if match is None else match.groups()


def question_key(form: Form, text: str) -> str:
    """The hash of a question: equal questions are asked once, whichever models they are about."""
    return fingerprint({"form": form, "text": text})


def defuse(text: str) -> str:
    """`text` with a space in each word that a chat template could read as the end of a turn."""
    return _CONTROL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def _fence(label: str, text: str, mark: str) -> str:
    return f"[{label} {mark}]\n{defuse(text)}\n[end of {label} {mark}]"


def _mark(texts: Sequence[str]) -> str:
    """Twelve hexadecimal digits that occur in none of `texts`; derived from them, so that a question keeps its key."""
    digest = fingerprint(list(texts))
    while any(digest[:12] in text for text in texts):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    return digest[:12]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("the prompt is missing", where=path, advice="Give a text file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompt cannot be read: {error}", where=path) from None
