"""Porter's stemmer in the form that `rouge_score` uses: NLTK's, with its extensions, word for word.

NLTK's own takes half a second to import, in every process that scores, and four times as long for a word. Tests hold
the two equal. Rules: Porter (1980), "An algorithm for suffix stripping"; NLTK's additions are marked.
"""

from __future__ import annotations

#: NLTK: forms that the rules would get wrong
_IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed",
    "succeed": "succeed",
}  # fmt: skip
_Rules = dict[str, list[tuple[str, str]]]


def _by_ending(rules: str) -> _Rules:
    """Rules `suffix>replacement` by their last two letters, in order: all that a word can match stand together."""
    found: _Rules = {}
    for suffix, _, replacement in (rule.partition(">") for rule in rules.split()):
        found.setdefault(suffix[-2:], []).append((suffix, replacement))
    return found


_STEP_2 = _by_ending(
    "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e ousli>ous ization>ize "
    "ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous aliti>al iviti>ive biliti>ble fulli>ful "
    "logi>log"
)
_STEP_3 = _by_ending("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>")
_STEP_4 = _by_ending(
    "al> ance> ence> er> ic> able> ible> ant> ement> ment> ent> ion> ou> ism> ate> iti> ous> ive> ize>"
)
_KINDS = str.maketrans({letter: "v" if letter in "aeiou" else "c" for letter in "abcdefghijklmnopqrstuvwxz0123456789"})


def porter_stem(word: str) -> str:
    """The stem of a word of a-z and 0-9."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _step_1(word)
    word = _step_2(word)
    if (found := _match(word, _STEP_3)) is not None and _measure(found[0]) > 0:
        word = found[0] + found[1]
    if (found := _match(word, _STEP_4)) is not None and _measure(found[0]) > 1:
        stem = found[0]
        if not word.endswith("ion") or stem[-1] in "st":
            word = stem
    return _step_5(word)


def _kinds(stem: str) -> str:
    """`c` or `v` for each letter; a y is a vowel after a consonant, and a consonant elsewhere."""
    kinds = stem.translate(_KINDS)
    if "y" not in kinds:
        return kinds
    found = ""
    for kind in kinds:
        found += kind if kind != "y" else "v" if found[-1:] == "c" else "c"
    return found


def _measure(stem: str) -> int:
    """Porter's m: how often a consonant follows a vowel."""
    return _kinds(stem).count("vc")


def _is_short(stem: str) -> bool:
    """Porter's *o: it ends consonant, vowel, consonant other than w, x, y; NLTK: or is vowel, consonant."""
    kinds = _kinds(stem)
    return (kinds.endswith("cvc") and stem[-1] not in "wxy") or kinds == "vc"


def _match(word: str, rules: _Rules) -> tuple[str, str] | None:
    """What stands before the suffix of the first rule that matches, and that rule's replacement."""
    for suffix, replacement in rules.get(word[-2:], ()):
        if word.endswith(suffix):
            return word[: -len(suffix)], replacement
    return None


def _step_1(word: str) -> str:
    if word.endswith("ies"):
        word = word[:-1] if len(word) == 4 else word[:-2]  # NLTK: dies -> die
    elif word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if word.endswith("ied"):
        word = word[:-1] if len(word) == 4 else word[:-2]  # NLTK
    elif word.endswith("eed"):
        word = word[:-1] if _measure(word[:-3]) > 0 else word
    elif word.endswith("ed") and "v" in _kinds(word[:-2]):
        word = _mend(word[:-2])
    elif word.endswith("ing") and "v" in _kinds(word[:-3]):
        word = _mend(word[:-3])
    # NLTK: only a y after a consonant, and not in a word of two letters
    if word.endswith("y") and len(word) > 2 and _kinds(word[:-1])[-1] == "c":
        word = word[:-1] + "i"
    return word


def _mend(stem: str) -> str:
    """What is left when -ed or -ing is taken off, as a word again: hopp -> hop, fil -> file."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1:] == stem[-2:-1] and _kinds(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _is_short(stem) else stem


def _step_2(word: str) -> str:
    # NLTK: -alli goes first, and what it leaves goes through the step again
    while word.endswith("alli") and _measure(word[:-4]) > 0:
        word = word[:-2]
    if (found := _match(word, _STEP_2)) is None:
        return word
    stem, replacement = found
    # NLTK: the l of -logi counts to the stem, so that geo- and theo- have a measure
    return stem + replacement if _measure(word[:-3] if word.endswith("logi") else stem) > 0 else word


def _step_5(word: str) -> str:
    if word.endswith("e"):
        measure = _measure(word[:-1])
        if measure > 1 or (measure == 1 and not _is_short(word[:-1])):
            word = word[:-1]
    if word.endswith("ll") and _measure(word[:-1]) > 1:
        word = word[:-1]
    return word
