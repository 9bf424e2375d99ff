import random
import string
from typing import Any

import yaml

from autotune.deploy.yaml_document import document, noted, plain


def _text(random_: random.Random) -> str:
    letters = string.ascii_letters + string.digits + " :#'\"{}[]%&*!|>-?,@`\\$"
    special = ["", "yes", "null", "1e3", "0x10", "1:30", "a\nb", "a\n\n  b\n", " a\nb", "é", "- a"]
    special += ["a\x1fb", "a\x85b", "\u2028", "a\nb\n\n", "\ta\nb", "a\r\nb", "a\n\x85", "\ufeffa"]
    special += ["a \n b", "\n", "a\n", "#\nb", "\U0001f600\nb", "=", "~", "<<"]
    if random_.random() < 0.3:
        return random_.choice(special)
    return "".join(random_.choice(letters) for _ in range(random_.randint(1, 30)))


def _content(random_: random.Random, depth: int) -> Any:
    kind = random_.randint(0, 6 if depth else 4)
    value: Any = [None, True, random_.randint(-9, 9), random_.random(), _text(random_)][
        min(kind, 4)
    ]
    if kind == 5:
        value = [_content(random_, depth - 1) for _ in range(random_.randint(0, 3))]
    if kind == 6:
        value = {_text(random_): _content(random_, depth - 1) for _ in range(random_.randint(0, 3))}
    return noted(value, _text(random_), "why\nthis") if random_.random() < 0.3 else value


def test_reading_back_gives_the_content_whatever_it_holds() -> None:
    random_ = random.Random()
    for _ in range(150):
        content = {f"key{n}": _content(random_, 4) for n in range(4)}
        text = document(content, head=[_text(random_), "", "top"])
        assert yaml.safe_load(text) == plain(content), text


def test_comments_stand_above_their_value() -> None:
    text = document(
        {"a": {"b": noted(1, "why"), "c": [noted("x", "first"), {"k": noted(2, "in")}]}}
    )
    assert text.splitlines() == [
        "a:",
        "  # why",
        "  b: 1",
        "  c:",
        "    # first",
        "    - x",
        "    # in",
        "    - k: 2",
    ]
