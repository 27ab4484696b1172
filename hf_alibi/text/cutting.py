r"""Where a text can be cut so that its parts have the tokens of the whole.

A tokenizer of the package `tokenizers` normalises a text, splits it into words (its pre-tokenizer), and turns each
word into tokens. Words do not affect each other. So a cut is harmless if the words of both parts are the words of the
whole. Two kinds of places are used:

- **before a space that follows a character which is no whitespace** (`one| two`),
- **after a single newline, before a letter** (`one.\n|two`), except for `Metaspace`.

Why the words stay the same, for each pre-tokenizer that `Cutter` accepts:

- **Regular expressions** (GPT-2, Llama 3, Qwen, …). Words are the matches from left to right. A match depends only on
  the text from its start on, because patterns with look-behind, anchors or word boundaries are not accepted. So what
  comes before a boundary between words does not matter for what comes after it. What comes after could matter in two
  ways: a match could extend over the boundary, or look ahead of it. The patterns were tried at both kinds of places,
  with characters of every kind around them, and have a boundary there. The only accepted look-ahead is `\s+(?!\S)`,
  which is evaluated after whitespace. The first kind of place has none before it. At the second kind, `\s+(?!\S)` and
  `\s+` both match the newline alone.
- **`Metaspace`** (SentencePiece) starts a word at each space. If it is set to split nothing, a cut is harmless where
  no token of the vocabulary has a space after another character: no merge and no Unigram token spans the cut.
- **`BertPreTokenizer`, `Whitespace`, `WhitespaceSplit`** end words at whitespace.

Normalisers that only look at neighbouring characters and leave whitespace alone (`NFC`, `Lowercase`, …) do not see a
cut. Any other tokenizer (`add_prefix_space`, `Strip`, BPE dropout, unknown components, …) is not cut.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

# Python takes a few control characters for whitespace that tokenizers may not, and U+180E was whitespace once.
NO_SPACE = r"[^\s\u180e]"
BEFORE_SPACE = rf"(?<={NO_SPACE})(?= )"
AFTER_NEWLINE = rf"(?<={NO_SPACE}\n)(?=[^\W\d_])"

# The pattern of `ByteLevel(use_regex=True)`, from tokenizers' `pre_tokenizers/byte_level.rs`.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Texts of about this many characters are split into words at once if they are ASCII.
LINE_SIZE = 200

# Each looks at a character and its neighbours at most, and never over a space. Those that can remove the character
# before a cut join the spaces around it, which only matters if spaces become tokens.
UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
KEEPING_NORMALIZERS = UNICODE_FORMS | {"Lowercase"}
REMOVING_NORMALIZERS = {"StripAccents", "BertNormalizer"}
SPACE_SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}

CLASS = re.compile(r"\[(?:\\.|[^\[\]\\])*\]")
PROPERTY = re.compile(r"\\p\{(\w+)\}")
# No others, which may be anchors, boundaries, or references to groups.
ALLOWED_ESCAPES = set("prnstvfdwSDW") | set(r"\/[]{}()?*+.|^$-'")

# What a Unicode property means in ASCII text.
ASCII_PROPERTIES = {
    "L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": "", "Mn": "", "N": "0-9", "Nd": "0-9",
    "P": r"!-#%-*,-/:;?@\[-\]_{}", "S": r"$+<=>^`|~",
}  # fmt: skip

# Characters of every kind that the patterns distinguish: letters of each case and without case, marks, digits,
# punctuation, symbols, control characters.
SAMPLES = [
    *"aZéЖß中あعǅʰªक9٣½",
    "e\u0301",
    *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    *"。，—“…€👩",
    "\u200d",
    "\x00",
    "\x7f",
]
BEFORE_SAMPLES = ["", "a", "Ab", " a", "1", ".", "'s", "\n", "\n  ", "中"]
AFTER_SAMPLES = ["a", "Zb", "é", "中", "'s", "9", ".", "/", " ", "  a", "\n", "\n\na", "\t", "\u3000a", "👩"]


class Cutter:
    """Cuts texts at the places that the module describes.

    Attributes:
        place: Matches the empty text at each place where a text can be cut. None if this tokenizer needs a document as
            a whole.
        words: Matches the words of an ASCII text between two places. None if only the tokenizer can find them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        description = json.loads(tokenizer.to_str())
        self.place: re.Pattern[str] | None = None
        self.words: re.Pattern[str] | None = None
        normalizers = {kind["type"] for kind in _members(description["normalizer"], "normalizers")}
        added = [token for token in description["added_tokens"] if not token["special"]]
        if (
            description["model"].get("dropout")
            or not normalizers <= KEEPING_NORMALIZERS | REMOVING_NORMALIZERS
            # Added tokens are found before words are. One of these could extend over a cut.
            or any(token["rstrip"] or re.search(r"\S\s", token["content"]) for token in added)
        ):
            return
        members = _members(description["pre_tokenizer"], "pretokenizers")
        if len(members) == 1 and members[0]["type"] in SPACE_SPLITTERS:
            self.place = re.compile(f"{BEFORE_SPACE}|{AFTER_NEWLINE}")
        elif normalizers & REMOVING_NORMALIZERS:
            return
        elif len(members) == 1 and members[0]["type"] == "Metaspace":
            space, known = members[0]["replacement"], tokenizer.get_vocab()
            if members[0]["split"] or (space in known and not any(re.search(f"[^{space}]{space}", t) for t in known)):
                self.place = re.compile(BEFORE_SPACE)
        elif patterns := _patterns(members):
            places = _places(tokenizer) if all(map(is_local, patterns)) else []
            if BEFORE_SPACE in places:
                self.place = re.compile("|".join(places))
                if len(patterns) == 1 and not added and normalizers <= UNICODE_FORMS:
                    self.words = ascii_pattern(patterns[0])

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """Yields parts of `text`, each as short as the places allow but at least `size` characters."""
        start = 0
        while self.place is not None and (cut := self.place.search(text, start + size)) is not None:
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    def units(self, text: str) -> list[str]:
        """Returns the smallest parts into which `text`, which begins at a place, can be cut."""
        if self.place is None:
            return [text]
        if self.words is None:
            return self.place.split(text)
        units: list[str] = []
        for line in self.pieces(text, LINE_SIZE):
            for part in [line] if line.isascii() else self.place.split(line):
                if part.isascii():
                    units += self.words.findall(part)
                else:
                    units.append(part)
        # A pattern that does not match everything leaves gaps, which are words too.
        return units if sum(map(len, units)) == len(text) else self.place.split(text)


def _members(component: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Returns the parts of a component of a tokenizer, which may be a sequence or missing."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for member in component[name] for part in _members(member, name)]


def _patterns(members: list[dict[str, Any]]) -> list[str] | None:
    """Returns the patterns of a byte-level pre-tokenizer that consists of regular expressions only, else None."""
    patterns = []
    for member in members:
        match member:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex} if member is members[-1]:
                patterns += [GPT2_PATTERN] if use_regex else []
            case {"type": "Digits"}:
                patterns.append(r"\p{N}")
            case _:
                return None
    return patterns or None


def is_local(pattern: str) -> bool:
    r"""Returns whether the matches of `pattern` depend only on the text that they cover, but for `\s+(?!\S)`."""
    pattern = pattern.replace(r"|\s+(?!\S)|\s+", "")
    outside = CLASS.sub("", re.sub(r"\\[pP]\{\^?\w+\}", r"\\p", pattern))
    escapes = set(re.findall(r"\\(.)", outside))
    rest = re.sub(r"\\.", "", outside)
    return (
        escapes <= ALLOWED_ESCAPES
        and not re.search(r"\(\?(?!i?:)", rest)
        # Wildcards, anchors, and nested classes.
        and not set(rest) & set(".^$[]&")
    )


def ascii_pattern(pattern: str) -> re.Pattern[str] | None:
    """Returns a pattern of Python with the matches that `pattern`, which is local, has in ASCII text.

    Returns None if it has properties that are not in `ASCII_PROPERTIES`.
    """
    try:
        # The properties in a class, then those that are classes by themselves.
        translated = CLASS.sub(lambda found: _class(PROPERTY.sub(_members_in_ascii, found[0])), pattern)
        translated = PROPERTY.sub(lambda found: _class(f"[{_members_in_ascii(found)}]"), translated)
        return re.compile(translated, re.ASCII)
    except (KeyError, re.error):
        return None


def _members_in_ascii(found: re.Match[str]) -> str:
    return ASCII_PROPERTIES[found[1]]


def _class(text: str) -> str:
    if text in ("[]", "[^]"):
        raise KeyError("no ASCII character is in this class")
    return text


def _places(tokenizer: Tokenizer) -> list[str]:
    """Returns the kinds of places that are boundaries between words, whatever characters are around them."""

    def words(text: str) -> list[str]:
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def is_boundary(space: str, before: str, after: str) -> bool:
        left, right = (before, space + after) if space == " " else (before + space, after)
        return words(left + right) == words(left) + words(right)

    befores = [before + sample for before in BEFORE_SAMPLES for sample in SAMPLES]
    letters = [after for after in AFTER_SAMPLES if after[:1].isalpha()]
    kinds = {BEFORE_SPACE: (" ", AFTER_SAMPLES), AFTER_NEWLINE: ("\n", letters)}
    return [
        place
        for place, (space, afters) in kinds.items()
        if all(is_boundary(space, before, after) for before in befores for after in afters)
    ]
