"""Names that people give to the parts of a data set: train, Test, validation, seg_train, val2017 ..."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

TRAIN = ("train", "training", "trn")
# The part to hold out is the first of these that there is: test images are best kept for the very end.
HELD_OUT = (
    *("val", "valid", "validation", "dev", "development", "eval", "evaluation"),
    *("test", "testing", "tst", "holdout", "heldout"),
)
# Folders beside a `train` that nobody means as classes.
BESIDES = ("unlabeled", "unlabelled", "unsup", "unsupervised", "extra", "pred", "predict", "prediction")

_WORDS = "|".join(sorted((*TRAIN, *HELD_OUT), key=len, reverse=True))
_NEUTRAL = r"(?:images?|imgs?|sets?|data|dataset|split|part|\d+)"
_NAME = re.compile(
    rf"(?P<before>(?:.*[_\W])?{_NEUTRAL}*[_\W]*)(?P<word>{_WORDS})(?P<after>[_\W]*{_NEUTRAL}*(?:[_\W].*)?|[ab])",
    re.IGNORECASE,
)


def split_word(name: str) -> tuple[str, str] | None:
    """The word for a part in a name, and the rest of the name; None if there is no such word.

    `Train`, `train_images` and `val2017` give an empty rest; `seg_train` and `seg_test` have the same rest, `seg`.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    rest = f"{match['before']} {match['after']}".replace("_", " ")
    rest = re.sub(rf"\b{_NEUTRAL}\b|[_\W\d]+", " ", rest, flags=re.IGNORECASE)
    return match["word"].lower(), " ".join(rest.split())


def find_split(names: Iterable[str]) -> tuple[str, str | None, list[str]] | None:
    """The name of the part to train on, the name of the held-out part if there is one, and all other names.

    Args:
        names: names of folders, files or arrays that lie beside each other.

    Returns:
        None if the names do not name parts.
    """
    names = list(names)
    words = {name: (found[0], found[1].lower()) for name in names if (found := split_word(name)) is not None}
    rests = {rest for word, rest in words.values() if word in TRAIN}
    for rest in {""} if "" in rests else rests if len(rests) == 1 else ():  # several rests are classes: cats_train ...
        train = [name for name, (word, other) in words.items() if word in TRAIN and other == rest]
        held_out = _in_order({name: word for name, (word, other) in words.items() if other in (rest, "")})
        if len(train) == 1 and held_out:
            others = [name for name in names if name not in (train[0], held_out[0])]
            return train[0], held_out[0], others
    trains = [name for name, (word, rest) in words.items() if word in TRAIN and rest == ""]
    others = [name for name in names if name not in trains]
    if len(trains) == 1 and all(name.lower() in BESIDES for name in others):
        return trains[0], None, others
    return None


def find_pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The word for the part and the class in each of names such as trainA, trainB, testA and testB.

    Empty if one of the names has no such word, or if a class has no training or no held-out part.
    """
    words = {name: found for name in names if (found := split_word(name)) is not None and found[1]}
    classes = [{rest for word, rest in words.values() if word == one} for one in {word for word, _ in words.values()}]
    paired = len(classes) == 2 and classes[0] == classes[1] and len(classes[0]) > 1
    one_train = sum(word in TRAIN for word in {word for word, _ in words.values()}) == 1
    return words if paired and one_train and len(words) == len(set(names)) else {}


def _in_order(words: Mapping[str, str]) -> list[str]:
    """The names whose word is one for held-out images, the best first."""
    return sorted((name for name in words if words[name] in HELD_OUT), key=lambda name: HELD_OUT.index(words[name]))
