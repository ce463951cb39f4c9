"""New texts of public ones: exchangeable words, closure, limits, and a grammar's held-out combinations."""

from __future__ import annotations

import itertools

from hf_dp_xattn.calibration.library.recombination import exchangeable, recombined

COLOURS, SHAPES, PLACES = ("red", "blue", "green"), ("circle", "square", "star"), ("left", "right", "top")
HELD_OUT = {("red", "star", "top"), ("blue", "circle", "left"), ("green", "square", "right")}


def phrase(colour: str, shape: str, place: str) -> str:
    return f"a {colour} {shape} at the {place}"


PUBLIC = [phrase(*t) for t in itertools.product(COLOURS, SHAPES, PLACES) if t not in HELD_OUT]


def test_words_of_one_kind_are_exchangeable_and_no_others() -> None:
    found = exchangeable([*PUBLIC, "two dogs", "a cat sleeps"])
    for kind in (COLOURS, SHAPES, PLACES):
        for word in kind:
            assert set(found[word]) == set(kind) - {word}
    assert not {"a", "at", "the", "two", "dogs", "cat"} & set(found)


def test_held_out_combinations_come_out_and_nothing_else() -> None:
    made = recombined(PUBLIC, 100)
    assert set(made) == {phrase(*t) for t in HELD_OUT}
    assert set(made.values()) <= set(PUBLIC)


def test_the_limit_holds_and_the_order_does_not_change() -> None:
    assert list(recombined(PUBLIC, 2)) == list(recombined(PUBLIC, 3))[:2]
    assert recombined(PUBLIC, 0) == {} and recombined(["one", "two"], 5) == {}


def test_words_that_share_one_frame_only_are_not_exchanged() -> None:
    assert exchangeable(["open the door", "close the door", "open a box"]) == {}
