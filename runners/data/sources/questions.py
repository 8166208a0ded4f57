"""What can be asked about a scene of coloured shapes: pairs of question and answer by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

PLACES = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: (
        *("top left", "top", "top right"),
        *("left", "centre", "right"),
        *("bottom left", "bottom", "bottom right"),
    ),
}


class Thing(NamedTuple):
    """One coloured shape. x, y: its top left corner in pixels; cell: row-major in the grid."""

    colour: str
    shape: str
    cell: int
    x: int
    y: int
    diameter: int

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


class QA(NamedTuple):
    """A question, its answer, and the things that asking and answering it give away."""

    question: str
    answer: str
    tells: tuple[Thing, ...] = ()


class Scene(NamedTuple):
    things: tuple[Thing, ...]
    grid: int  # cells a side
    colours: tuple[str, ...]  # all there could be
    about: tuple[Thing, ...]  # the things that questions single out


def _colour(scene: Scene) -> list[QA]:
    shapes = Counter(thing.shape for thing in scene.things)
    return [
        QA(f"What colour is the {thing.shape}?", thing.colour, (thing,))
        for thing in scene.about
        if shapes[thing.shape] == 1
    ]


def _shape(scene: Scene) -> list[QA]:
    colours = Counter(thing.colour for thing in scene.things)
    return [
        QA(f"Which shape is {thing.colour}?", thing.shape, (thing,))
        for thing in scene.about
        if colours[thing.colour] == 1
    ]


def _count(scene: Scene) -> list[QA]:
    colours = Counter(thing.colour for thing in scene.things)
    # One absent colour, so that the answer can be 0; which one, the scene decides.
    absent = [colour for colour in scene.colours if colour not in colours]
    asked = list(colours)
    if absent:
        asked.append(absent[sum(thing.x + thing.y for thing in scene.things) % len(absent)])
    return [QA("How many objects are there?", str(len(scene.things)))] + [
        QA(f"How many {colour} objects are there?", str(colours[colour])) for colour in asked
    ]


def _where(scene: Scene) -> list[QA]:
    places = PLACES[scene.grid]
    return [QA(f"Where is the {thing}?", places[thing.cell], (thing,)) for thing in scene.about]


def _left_right(scene: Scene) -> list[QA]:
    found = []
    for one in scene.things:
        for other in scene.things:
            here, there = one.cell % scene.grid, other.cell % scene.grid
            # Things of one column are too close to call.
            if here != there and (one in scene.about or other in scene.about):
                question = f"Is the {one} left or right of the {other}?"
                found.append(QA(question, "left" if here < there else "right", (one, other)))
    return found


def _caption(scene: Scene) -> list[QA]:
    things = sorted(scene.things, key=lambda thing: thing.cell)
    caption = ", ".join(f"{'an' if str(thing)[0] in 'aeiou' else 'a'} {thing}" for thing in things)
    return [QA("Describe the picture.", caption, scene.things)]


KINDS: dict[str, Callable[[Scene], Sequence[QA]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "where": _where,
    "left_right": _left_right,
    "caption": _caption,
}
