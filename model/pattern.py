"""The pattern language: a whole stack of layers as one line.

A pattern is a row of letters, each naming a layer of the recipe, with groups and repeats: `"(M-W-)x12"`. Letters in
brackets are the parallel branches of one block, which read the same normalised input and are added to the residual
together: `"([M*]-)x44"`. Spaces are ignored. `"ratio(56, M, *=0.07, -=0.5)"` generates a pattern instead: 56 layers of
which 7% are `*` and 50% are `-`, placed as in the empirical study of Mamba-based language models (arXiv 2406.07887) and
its public code.
"""

import re
from collections.abc import Collection, Iterable

MAX_LAYERS = 10_000
_RESERVED = "()[]{}=, "


class PatternError(ValueError):
    """A pattern that cannot be read; the message marks the character."""

    def __init__(self, pattern: str, at: int, message: str) -> None:
        marked = f"{pattern[:at]}>>{pattern[at : at + 1]}<<{pattern[at + 1 :]}"
        super().__init__(f"pattern {marked!r}: {message} (character {at + 1})")
        self.at = at


def expand(pattern: str, letters: Collection[str], alone: Collection[str] = ()) -> tuple[str, ...]:
    """The stack as one string a block, e.g. `expand("(M-)x2[M*]", "M-*") == ("M", "-", "M", "-", "M*")`.

    letters: the letters that the recipe names. alone: those of them that cannot be branches, because they bring their
    own residual. Raises PatternError at the first character that does not fit.
    """
    if pattern.lstrip().startswith("ratio("):
        return tuple(_expand_ratio(pattern, letters))
    stack: list[tuple[list[str], int]] = []
    layers: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "(":
            stack.append((layers, at))
            layers = []
        elif char == ")":
            if not stack:
                raise PatternError(pattern, at, "closes a group that was never opened")
            if not layers:
                raise PatternError(pattern, at, "the group is empty")
            outer, _ = stack.pop()
            count, at = _repeat(pattern, at)
            if count * len(layers) > MAX_LAYERS:
                raise PatternError(pattern, at, f"more than {MAX_LAYERS} layers")
            layers = outer + layers * count
        elif char == "[":
            branches, at = _branches(pattern, at, letters, alone)
            count, at = _repeat(pattern, at)
            if count > MAX_LAYERS:
                raise PatternError(pattern, at, f"more than {MAX_LAYERS} layers")
            layers += [branches] * count
        elif char == "]":
            raise PatternError(pattern, at, "closes brackets that were never opened")
        elif char in letters:
            layers.append(char)
        elif not char.isspace():
            raise PatternError(pattern, at, f"unknown letter; the recipe names {_names(letters)}")
        at += 1
    if stack:
        raise PatternError(pattern, stack[-1][1], "this group is never closed")
    if not layers:
        raise PatternError(pattern, 0, "names no layer")
    return tuple(layers)


def show(blocks: Iterable[str]) -> str:
    """One line for a stack: the inverse of `expand`, without groups."""
    return "".join(letters if len(letters) == 1 else f"[{letters}]" for letters in blocks)


def _branches(pattern: str, start: int, letters: Collection[str], alone: Collection[str]) -> tuple[str, int]:
    """Reads the brackets that open at `start`; returns (the letters in them, index of the closing bracket)."""
    found = ""
    for at in range(start + 1, len(pattern)):
        char = pattern[at]
        if char == "]" and len(found) < 2:
            what = "one letter needs no brackets" if found else "the brackets are empty"
            raise PatternError(pattern, at, what)
        if char == "]":
            return found, at
        if char in "([)":
            raise PatternError(pattern, at, "brackets hold letters only, no groups and no brackets")
        if char in alone:
            raise PatternError(pattern, at, "this layer brings its own residual and cannot stand in brackets")
        if char in letters:
            found += char
        elif not char.isspace():
            raise PatternError(pattern, at, f"unknown letter; the recipe names {_names(letters)}")
    raise PatternError(pattern, start, "these brackets are never closed")


def _repeat(pattern: str, at: int) -> tuple[int, int]:
    """Reads the `xN` that may follow what is closed at `at`; returns (N, index of the last character read)."""
    match = re.compile(r"\s*x\s*(\d*)").match(pattern, at + 1)
    if match is None:
        return 1, at
    if not match[1]:
        raise PatternError(pattern, match.end() - 1, "a repeat wants a number, as in x12")
    if int(match[1]) == 0:
        raise PatternError(pattern, match.start(1), "a repeat wants a positive number")
    return int(match[1]), match.end() - 1


def _names(letters: Collection[str]) -> str:
    return ", ".join(repr(letter) for letter in letters) or "none"


def check_letter(letter: str) -> None:
    """Raises ValueError unless `letter` can stand in a pattern."""
    if len(letter) != 1 or letter in _RESERVED or letter.isspace() or letter.isdigit():
        raise ValueError(
            f"layer letter {letter!r}: wants one character that is no digit, space or any of '{_RESERVED}'"
        )


def _expand_ratio(pattern: str, letters: Collection[str]) -> str:
    match = re.fullmatch(r"\s*ratio\(\s*(\d+)\s*,\s*(\S)\s*((?:,\s*\S\s*=\s*[0-9.]+\s*)*)\)\s*", pattern)
    if match is None:
        raise PatternError(pattern, pattern.index("ratio("), "wants the form ratio(56, M, *=0.07, -=0.5)")
    used = [(match[2], match.start(2))]
    shares = []
    for part in re.finditer(r",\s*(\S)\s*=\s*([0-9.]+)", match[3]):
        used.append((part[1], match.start(3) + part.start(1)))
        try:
            shares.append((part[1], float(part[2])))
        except ValueError:
            raise PatternError(pattern, match.start(3) + part.start(2), "wants a number such as 0.07") from None
    for letter, at in used:
        if letter not in letters:
            raise PatternError(pattern, at, f"unknown letter; the recipe names {_names(letters)}")
    try:
        return from_ratios(int(match[1]), match[2], shares)
    except ValueError as error:
        raise PatternError(pattern, match.start(1), str(error)) from None


def from_ratios(n_layers: int, base: str, shares: list[tuple[str, float]]) -> str:
    """Spreads `round(n_layers * share)` layers of each further letter evenly over the slots still held by `base`.

    Each letter in turn divides the run of base layers into sections of nearly equal length. The first letter
    (attention) is kept off both ends: n of them make n + 1 sections. Every later letter (MLP) follows its section:
    n of them make n sections.
    """
    if not 0 < n_layers <= MAX_LAYERS:
        raise ValueError(f"got {n_layers} layers, wants 1 to {MAX_LAYERS}")
    layers = [base] * n_layers
    for order, (letter, share) in enumerate(shares):
        if not 0 <= share <= 1:
            raise ValueError(f"the share of {letter!r} is {share}, wants a number from 0 to 1")
        count = round(n_layers * share)
        free = layers.count(base) - count
        if free < 0:
            raise ValueError(f"the shares leave no room for {count} layers of {letter!r}")
        if count == 0:
            continue
        section = free / (count + 1 if order == 0 else count)
        left = section
        for slot, holder in enumerate(layers):
            if holder != base:
                continue
            if left < 0.5:
                layers[slot] = letter
                left += section
            else:
                left -= 1
    return "".join(layers)
