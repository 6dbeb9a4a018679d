"""The items of the probes, the same on every machine: what YAML files name as `!function probes.NAME`.

lm-eval loads this file by its path, also where Braid is not installed, so it imports nothing of Braid. Each function
returns `{"test": items}` for `custom_dataset` and ignores the metadata that lm-eval passes along.
"""

import json
import random
from pathlib import Path
from typing import Any

CHOICES = 4
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _dataset(items: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(items)}


def _word(source: random.Random) -> str:
    """Two or three syllables that spell nothing."""
    return "".join(source.choice(CONSONANTS) + source.choice(VOWELS) for _ in range(source.choice((2, 3))))


def _words(source: random.Random, count: int) -> list[str]:
    """Different words."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[_word(source)] = None
    return list(words)


def _choice_item(source: random.Random, text: str, right: str, wrong: list[str]) -> dict[str, Any]:
    """The choices in random order. label: place of the right one."""
    choices = [right, *wrong]
    assert len(set(choices)) == CHOICES
    source.shuffle(choices)
    return {"text": text, "choices": choices, "label": choices.index(right)}


def copy(distance: int, items: int = 100, **metadata: Any) -> dict[str, Any]:
    """Induction: words follow each other, `distance` words later the first of them come again; which word is next?

    The wrong choices are other words of the text, so having seen a word tells nothing.
    """
    source = random.Random(f"copy {distance}")
    return _dataset([_copy_item(source, distance) for _ in range(items)])


def _copy_item(source: random.Random, distance: int) -> dict[str, Any]:
    words = _words(source, 8 + distance)
    span, filler = words[:8], words[8:]
    known = source.randint(3, 6)
    others = [word for word in words if word not in span[: known + 1]]
    wrong = source.sample(others, CHOICES - 1)
    return _choice_item(source, " ".join([*span, *filler, *span[:known]]), span[known], wrong)


def recall(pairs: int, queries: int = 4, items: int = 100, **metadata: Any) -> dict[str, Any]:
    """Associative recall: names get numbers, some are asked for and answered, then another one is asked for.

    The wrong choices are numbers of other names.
    """
    source = random.Random(f"recall {pairs}")
    return _dataset([_recall_item(source, pairs, queries) for _ in range(items)])


def _recall_item(source: random.Random, pairs: int, queries: int) -> dict[str, Any]:
    names = _words(source, pairs)
    values = [str(number) for number in source.sample(range(100, 1000), pairs)]
    table = dict(zip(names, values, strict=True))
    asked = source.sample(names, min(queries, pairs))
    lines = [f"{name} = {value}" for name, value in table.items()]
    lines += [f"print({name})  # {table[name]}" for name in asked[:-1]]
    right = table[asked[-1]]
    wrong = source.sample([value for value in values if value != right], CHOICES - 1)
    return _choice_item(source, "\n".join([*lines, f"print({asked[-1]})  #"]), right, wrong)


def brackets(items: int = 150, **metadata: Any) -> dict[str, Any]:
    """Brackets of four kinds are opened and some closed; which brackets close the rest?

    The wrong choices have as many closing brackets: two of them swapped, one of another kind, or in the order of
    opening.
    """
    source = random.Random("brackets")
    return _dataset([_brackets_item(source) for _ in range(items)])


def _brackets_item(source: random.Random) -> dict[str, Any]:
    while True:
        text, stack = _opened(source)
        right = [BRACKETS[opening] for opening in reversed(stack)]
        wrong = {" ".join(change(source, right)) for change in (_swapped, _replaced, _reversed)}
        if len({" ".join(right), *wrong}) == CHOICES:
            return _choice_item(source, text, " ".join(right), sorted(wrong))


def _opened(source: random.Random) -> tuple[str, list[str]]:
    """A text of brackets, and those that it leaves open."""
    text: list[str] = []
    stack: list[str] = []
    depth = source.randint(3, 6)
    while len(stack) < depth:
        if stack and source.random() < 0.3:
            text.append(BRACKETS[stack.pop()])
        else:
            stack.append(source.choice(list(BRACKETS)))
            text.append(stack[-1])
    return " ".join(text), stack


def _swapped(source: random.Random, right: list[str]) -> list[str]:
    one, other = source.sample(range(len(right)), 2)
    changed = list(right)
    changed[one], changed[other] = right[other], right[one]
    return changed


def _replaced(source: random.Random, right: list[str]) -> list[str]:
    changed = list(right)
    place = source.randrange(len(right))
    changed[place] = source.choice([closing for closing in BRACKETS.values() if closing != right[place]])
    return changed


def _reversed(source: random.Random, right: list[str]) -> list[str]:
    return right[::-1]


def repeat(items: int = 100, **metadata: Any) -> dict[str, Any]:
    """Lines are said twice, each; a new line is said once, and is to be written again."""
    source = random.Random("repeat")
    return _dataset([_repeat_item(source) for _ in range(items)])


def _repeat_item(source: random.Random) -> dict[str, Any]:
    shown = [" ".join(_words(source, 3)) for _ in range(4)]
    text = "".join(f"{line}\n{line}\n\n" for line in shown[:-1]) + shown[-1] + "\n"
    return {"text": text, "target": shown[-1]}


def passages(**metadata: Any) -> dict[str, Any]:
    """Short passages of English prose and of Python, written for this task."""
    lines = Path(__file__).with_name("passages.jsonl").read_text(encoding="utf-8").splitlines()
    return _dataset([json.loads(line) for line in lines])
