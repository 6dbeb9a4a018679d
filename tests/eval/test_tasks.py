"""The shipped tasks: no network, the same items everywhere, right answers right, wrong ones wrong."""

import hashlib
import json
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from eval.benchmarks import find_tasks, run_tasks
from eval.harness import Alone
from eval.tasks import probes

CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
ITEMS_SHA256 = "9fe8bee1aaafee877d3ac5eff0012bd02f324141dba2db88317e4ab348787f56"
"""Of all items. Other items are another task: change `version` in the YAML files along with this."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return find_tasks(["braid_probes"])


def refuse(*arguments: Any) -> None:
    raise OSError("no network here")


def items_of(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {name: list(task.eval_docs) for name, task in found["tasks"].items()}


def next_word(text: str) -> str:
    """The word that followed where the last word stood before."""
    words = text.split(" ")
    return words[words.index(words[-1]) + 1]


def number_of_name(text: str) -> str:
    *lines, query = text.split("\n")
    name = query.removeprefix("print(").removesuffix(")  #")
    return dict(line.split(" = ") for line in lines if " = " in line)[name]


def closing_brackets(text: str) -> str:
    stack: list[str] = []
    for bracket in text.split(" "):
        if bracket in CLOSING:
            stack.append(CLOSING[bracket])
        else:
            assert stack.pop() == bracket
    return " ".join(reversed(stack))


SOLVERS: dict[str, Callable[[str], str]] = {
    "braid_copy": next_word,
    "braid_recall": number_of_name,
    "braid_brackets": closing_brackets,
}


def solve(text: str) -> str:
    if "print(" in text:
        return number_of_name(text)
    return closing_brackets(text) if text[0] in CLOSING else next_word(text)


def test_the_probes_load_without_a_network(found: dict[str, Any]) -> None:
    sizes = {name: len(items) for name, items in items_of(found).items()}
    assert sizes == {
        **{f"braid_copy_{distance}": 100 for distance in (8, 32, 128)},
        **{f"braid_recall_{pairs}": 100 for pairs in (4, 16, 64)},
        "braid_brackets": 150,
        "braid_repeat": 100,
        "braid_passages": 16,
    }
    kinds = {task.OUTPUT_TYPE for task in found["tasks"].values()}
    assert kinds == {"multiple_choice", "generate_until", "loglikelihood_rolling"}


def test_the_items_are_the_same_everywhere(found: dict[str, Any]) -> None:
    """Breaks when scores of two machines, or of two versions of Braid, would not compare."""
    text = json.dumps(items_of(found), sort_keys=True, ensure_ascii=True)
    assert hashlib.sha256(text.encode()).hexdigest() == ITEMS_SHA256


@pytest.mark.parametrize("family", SOLVERS)
def test_one_choice_is_right(found: dict[str, Any], family: str) -> None:
    for name, items in items_of(found).items():
        if not name.startswith(family):
            continue
        for item in items:
            assert item["choices"][item["label"]] == SOLVERS[family](item["text"])
            assert len(set(item["choices"])) == len(item["choices"]) == 4
        places = [sum(item["label"] == place for item in items) / len(items) for place in range(4)]
        assert min(places) > 0.1, "the right answer's place must tell nothing"


def test_wrong_choices_look_like_right_ones(found: dict[str, Any]) -> None:
    """Breaks when having seen a word, or the number of brackets, already gives the answer."""
    for name, items in items_of(found).items():
        for item in items:
            if name.startswith(("braid_copy", "braid_recall")):
                assert all(choice in item["text"].replace("\n", " ").split(" ") for choice in item["choices"])
            if name == "braid_brackets":
                assert len({len(choice) for choice in item["choices"]}) == 1


def test_the_line_to_repeat_is_the_last_one(found: dict[str, Any]) -> None:
    for item in items_of(found)["braid_repeat"]:
        *shown, last, end = item["text"].split("\n")
        assert (last, end) == (item["target"], "")
        assert last not in shown


def test_the_distance_is_what_the_name_says() -> None:
    for item in probes.copy(32, items=5)["test"]:
        words = item["text"].split(" ")
        assert words.index(words[-1]) + 8 + 32 == len(words) - 1
        assert len(set(words[:40])) == 40


class Scripted(LM):
    """Answers by rule; every choice is as likely as `score` says."""

    ranks = Alone()

    def __init__(self, score: Callable[[str, str], float], repeat: Callable[[str], str]) -> None:
        super().__init__()
        self.score, self.repeat = score, repeat

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(self.score(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [-len(request.args[0].encode()) * 0.6931471805599453 for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self.repeat(request.args[0]) for request in requests]


def test_who_solves_the_probes_gets_all_points(found: dict[str, Any]) -> None:
    """Breaks when a YAML file and its items disagree, or texts and choices are joined wrongly."""
    perfect = Scripted(lambda text, choice: float(choice == f" {solve(text)}"), lambda text: text.split("\n")[-2])
    scores = run_tasks(perfect, found)
    assert list(scores.tasks)[:3] == ["braid_copy", "braid_copy_8", "braid_copy_32"]
    points = {task: metrics.get("acc", metrics.get("exact_match")) for task, metrics in scores.tasks.items()}
    del points["braid_passages"]
    assert set(points.values()) == {1.0}
    assert scores.tasks["braid_passages"]["bits_per_byte"] == pytest.approx(1.0)
    assert scores.info["braid_copy"]["items"] == 300


def test_guessing_gives_the_chance_that_is_stated(found: dict[str, Any]) -> None:
    dice = random.Random(0)
    scores = run_tasks(Scripted(lambda text, choice: dice.random(), lambda text: "braid"), found)
    for task in ("braid_copy", "braid_recall", "braid_brackets"):
        chance = scores.info[task]["chance"]
        error = scores.tasks[task]["acc_stderr"]
        assert error is not None
        assert abs(scores.tasks[task]["acc"] - chance) < 4 * error  # type: ignore[operator]
    assert scores.tasks["braid_repeat"]["exact_match"] == 0.0 == scores.info["braid_repeat"]["chance"]


def test_a_limit_scores_fewer_items(found: dict[str, Any]) -> None:
    scores = run_tasks(Scripted(lambda text, choice: 0.0, lambda text: ""), found, limit=3)
    assert {scores.info[task]["items"] for task in found["tasks"]} == {3}
    assert len(scores.samples["braid_repeat"]) == 3
