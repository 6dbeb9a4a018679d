"""The pattern language: expansion, the published strings, errors that point at the character."""

import pytest

from model.pattern import PatternError, check_letter, expand, from_ratios, show

HYBRID_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
HYBRID_800M = "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"


def test_groups_and_repeats() -> None:
    assert expand("(M-W-)x3", "MW-") == tuple("M-W-M-W-M-W-")
    assert expand("M (M* (M-)x2 )x2 -", "M*-") == tuple("M" + "M*M-M-" * 2 + "-")
    assert expand("(M-)", "M-") == ("M", "-")


def test_brackets_are_one_block() -> None:
    """Falcon-H1's stack, and repeats of brackets themselves; what is shown can be read again."""
    stack = expand("([M*]-)x44", "M*-")
    assert stack == ("M*", "-") * 44
    assert expand("M [M *-]x2 -", "M*-") == ("M", "M*-", "M*-", "-")
    assert show(stack[:3]) == "[M*]-[M*]" and expand(show(stack), "M*-") == stack


@pytest.mark.parametrize(
    ("pattern", "published"),
    [("ratio(56, M, *=0.07, -=0.5)", HYBRID_8B), ("ratio(48, M, *=0.08, -=0.5)", HYBRID_800M)],
)
def test_the_generator_gives_the_published_strings(pattern: str, published: str) -> None:
    """arXiv 2406.07887 and its public code: the 8B and 800M hybrids."""
    assert show(expand(pattern, "M*-")) == published


def test_published_counts() -> None:
    assert [HYBRID_8B.count(c) for c in "M*-"] == [24, 4, 28]
    assert [i for i, c in enumerate(HYBRID_8B) if c == "*"] == [10, 22, 33, 45]
    assert [i for i, c in enumerate(HYBRID_800M) if c == "*"] == [9, 19, 28, 38]


def test_the_generator_places_exactly_what_was_asked() -> None:
    for layers in range(4, 80):
        for attention in (0.0, 0.05, 0.08, 0.2, 0.25):
            for mlp in (0.0, 0.1, 0.3, 0.5, 0.7):
                stack = from_ratios(layers, "M", [("*", attention), ("-", mlp)])
                assert (stack.count("*"), stack.count("-")) == (round(layers * attention), round(layers * mlp))


@pytest.mark.parametrize(
    ("pattern", "at"),
    [
        ("(M-Q-)x4", 3),
        ("(M", 0),
        ("M)", 1),
        ("()x3", 1),
        ("(M)x", 3),
        ("(M)x0", 4),
        ("M(M-)x20000", 10),
        ("", 0),
        ("Mx2", 1),
        ("ratio(4, M, Q=0.1)", 12),
        ("ratio(4, M, *=0.9, -=0.9)", 6),
        ("ratio(4)", 0),
        ("M[]", 2),
        ("[M]-", 2),
        ("[M[-*]]", 2),
        ("[M(-*)]", 2),
        ("[M-)x2", 3),
        ("([M-)x2]", 4),
        ("M[M-", 1),
        ("M]-", 1),
        ("[MQ]", 2),
        ("[M-]x20000", 9),
        ("-[MO]", 3),
    ],
)
def test_errors_point_at_the_character(pattern: str, at: int) -> None:
    with pytest.raises(PatternError) as error:
        expand(pattern, "M-*O", alone="O")
    assert error.value.at == at
    assert f"(character {at + 1})" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("letter", ["", "MM", "(", "3", " ", "="])
def test_reserved_letters_are_refused(letter: str) -> None:
    with pytest.raises(ValueError, match="layer letter"):
        check_letter(letter)
