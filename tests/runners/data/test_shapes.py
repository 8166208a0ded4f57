from __future__ import annotations

import numpy as np
import pytest

from runners.data.sources.questions import KINDS
from runners.data.sources.shapes import COLOURS, GROUND, SHAPES, Shapes, mask
from runners.data.stats import answers_by_kind, majority_accuracy
from runners.data.types import alone, questions_and_answers
from runners.shell.errors import UserError

NAMES = list(COLOURS)[:6]


def foreground(image: np.ndarray) -> np.ndarray:
    """Which pixels are not the ground (whose grey the four edges' median gives)."""
    ground = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
    return np.abs(image.astype(int) - ground).max(axis=-1) > 60


def nearest_colour(pixels: np.ndarray) -> str:
    middle = np.median(pixels, axis=0)
    return min(NAMES, key=lambda name: np.abs(np.array(COLOURS[name]) - middle).sum())


def test_items_are_pure_functions_of_seed_split_and_index():
    one, other = Shapes(seed=3), Shapes(seed=3)
    [other[i] for i in (9, 2, 5)]
    assert one[5].turns == other[5].turns
    assert np.array_equal(one[5].images[0], other[5].images[0])
    assert one.turns(5) == one[5].turns
    for stranger in (Shapes(seed=4), Shapes(seed=3, split="val")):
        assert not np.array_equal(one[5].images[0], stranger[5].images[0])


def test_streams_of_the_splits_share_no_picture():
    seen = [
        {Shapes(split=split, size=32)[i].images[0].tobytes() for i in range(300)}
        for split in ("train", "val", "unseen")
    ]
    assert [len(pictures) for pictures in seen] == [300] * 3
    assert not (seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2])


@pytest.mark.parametrize("size", [32, 64])
def test_answers_about_one_object_are_what_the_pixels_say(size: int):
    source = Shapes(max_objects=1, size=size, kinds=("colour", "where", "count"), questions=9)
    for i in range(60):
        item = source[i]
        (image,) = item.images
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        inside = foreground(image)
        y, x = np.argwhere(inside).mean(axis=0)
        place = f"{'top' if y < size / 2 else 'bottom'} {'left' if x < size / 2 else 'right'}"
        colour = nearest_colour(image[inside])
        for question, answer in questions_and_answers(item.turns):
            if answer.kind == "where":
                assert answer.text == place
            elif answer.kind == "colour":
                assert answer.text == colour
            else:
                here = "objects" in question.text and (
                    colour in question.text or "many objects" in question.text
                )
                assert answer.text == ("1" if here else "0")


def test_counts_and_sides_are_what_the_pixels_say():
    source = Shapes(kinds=("count", "left_right"), questions=40)
    sides = 0
    for i in range(240):
        item = source[i]
        (image,) = item.images
        quadrants = {}
        for cell in range(4):
            part = image[cell // 2 * 32 :, cell % 2 * 32 :][:32, :32]
            inside = np.abs(part.astype(int) - GROUND).max(axis=-1) > 60
            if inside.any():
                quadrants[cell] = nearest_colour(part[inside])
        colours = list(quadrants.values())
        column = {colour: cell % 2 for cell, colour in quadrants.items()}
        for question, answer in questions_and_answers(item.turns):
            words = question.text.rstrip("?").split()
            if answer.kind == "count":
                expected = len(colours) if words[2] == "objects" else colours.count(words[2])
                assert answer.text == str(expected)
                continue
            first, second = (word for word in words if word in COLOURS)
            if colours.count(first) == colours.count(second) == 1:
                sides += 1
                assert answer.text == ("left" if column[first] < column[second] else "right")
    assert sides > 50


def test_never_seen_pairs_are_kept_for_their_split():
    def pairs(split: str, i: int) -> list[tuple[str, str]]:
        scene = Shapes(split=split)._imagine(i)[0]
        return [(thing.colour, thing.shape) for thing in scene.things]

    unseen = Shapes().unseen
    assert unseen == {
        ("red", "circle"),
        ("green", "square"),
        ("blue", "triangle"),
        ("yellow", "cross"),
    }
    for split in ("train", "val"):
        assert not {pair for i in range(500) for pair in pairs(split, i)} & unseen
    for i in range(200):
        assert set(pairs("unseen", i)) & unseen
        for question, answer in questions_and_answers(Shapes(split="unseen").turns(i)):
            words = {*question.text.rstrip("?").split(), answer.text}
            if answer.kind in ("colour", "shape", "where", "left_right"):
                assert any({colour, shape} <= words for colour, shape in unseen), question


def test_shapes_have_their_areas():
    areas = {
        "circle": np.pi / 4,
        "square": 0.88**2,
        "triangle": 0.5,
        "cross": 2 * 0.33 - 0.33**2,
        "diamond": 0.5,
        "ring": np.pi / 4 * (1 - 0.55**2),
    }
    assert set(areas) == set(SHAPES)
    for shape, area in areas.items():
        assert mask(shape, 40).mean() == pytest.approx(area, abs=0.02)


def test_questions_are_distinct_and_of_the_kinds_asked_for():
    for kind in KINDS:
        source = Shapes(kinds=(kind,), questions=3)
        for i in range(50):
            pairs = list(questions_and_answers(source.turns(i)))
            assert 1 <= len(pairs) <= 3
            assert len({question.text for question, _ in pairs}) == len(pairs)
            assert {answer.kind for _, answer in pairs} == {kind}


def test_alone_gives_each_question_its_picture():
    item = Shapes()[0]
    parts = alone(item)
    assert len(parts) == 4
    assert [part.turns[1] for part in parts] == list(item.turns[1::2])
    for part in parts:
        assert part.turns[0].text.startswith("<image>")
        assert part.images[0] is item.images[0]


def test_majority_answers_are_far_from_right():
    counts = answers_by_kind(Shapes(kinds=("colour", "shape", "where", "left_right")), 1000)
    assert counts["left_right"].keys() == {"left", "right"}
    assert len(counts["where"]) == 4
    assert majority_accuracy({"where": counts["where"]}) < 0.3
    best = sum(max(c.values()) for c in counts.values())
    assert majority_accuracy(counts) == best / sum(sum(c.values()) for c in counts.values())
    assert majority_accuracy({}) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split of shapes has test; choose from train, val, unseen"),
        ({"kinds": ("color",)}, "kinds of shapes has color; choose from colour"),
        ({"kinds": ()}, "kinds of shapes has nothing"),
        ({"shapes": ("blob",)}, "shapes of shapes has blob"),
        ({"max_objects": 5}, "a cell of its own"),
        ({"max_objects": 1, "kinds": ("left_right",)}, "two objects"),
        ({"size": 8}, "16 pixels a side"),
        ({"length": 0}, "length=0"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        Shapes(**arguments)
    with pytest.raises(IndexError):
        Shapes(length=3)[3]
