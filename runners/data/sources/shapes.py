"""Scenes of coloured shapes, drawn on the fly: data that needs no download and never runs out.

A scene has 1 to 4 shapes of several sizes, each at a random place in a grid cell of its own, so
that nothing overlaps and "where" has one answer. Item i is a pure function of (seed, split, i).
Of every shape one colour is never shown in training ("red circle" with the default lists): those
pairs have a split of their own, `unseen`, whose questions are about them.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from runners.data.sources.questions import KINDS, PLACES, QA, Scene, Thing
from runners.data.types import IMAGE, Conversation, Turn
from runners.shell.errors import UserError

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (140, 50, 170),
    "orange": (240, 130, 30),
    "cyan": (40, 190, 200),
    "pink": (240, 130, 190),
    "brown": (120, 75, 40),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
SPLITS = {"train": 1 << 20, "val": 512, "unseen": 512}  # and their default lengths
VERSION = 1  # of the scenes: raised where the same seed and settings give others
DIAMETERS = (0.7, 0.8, 0.9)  # of a cell's side
GROUND = 150  # grey level: near the middle, so that an empty picture is near zero to a model


class Shapes:
    """Conversations of `questions` distinct questions each about one drawn scene.

    Args:
        seed: scenes differ between seeds; splits of one seed are disjoint streams.
        split: "train", "val" (new scenes) or "unseen" (pairs that training never shows).
        size: pixels a side; pictures are uint8 [size, size, 3].
        kinds: what is asked: any of `questions.KINDS`.
        grid: 2 (quadrants) or 3 cells a side; at most one shape a cell.
        jitter: how far colours stray, in grey levels.
        diameters: of the shapes, as shares of a cell's side.
        ramp: training begins with one object a scene, and the most there can be rises to
            max_objects over the first `ramp` items.
    Raises UserError for settings that leave nothing to draw or to ask.
    """

    def __init__(
        self,
        seed: int = 0,
        split: str = "train",
        *,
        size: int = 64,
        kinds: Sequence[str] = ("colour", "shape", "count", "where", "left_right", "caption"),
        max_objects: int = 4,
        grid: int = 2,
        colours: Sequence[str] = tuple(COLOURS)[:6],
        shapes: Sequence[str] = SHAPES[:4],
        questions: int = 4,
        jitter: int = 12,
        diameters: Sequence[float] = DIAMETERS,
        ramp: int = 0,
        length: int | None = None,
    ) -> None:
        for flag, given, known in (
            ("split", [split], SPLITS),
            ("kinds", kinds, KINDS),
            ("colours", colours, COLOURS),
            ("shapes", shapes, SHAPES),
        ):
            if not given or (unknown := [name for name in given if name not in known]):
                what = ", ".join(unknown) if given else "nothing"
                raise UserError(f"{flag} of shapes has {what}; choose from {', '.join(known)}.")
        if grid not in PLACES or not 1 <= max_objects <= grid * grid:
            raise UserError(
                f"max_objects={max_objects} on a grid of {grid} cannot be drawn: "
                "grid is 2 or 3, and every object needs a cell of its own."
            )
        if max_objects == 1 and tuple(kinds) == ("left_right",):
            raise UserError("kinds=left_right needs two objects: set max_objects to 2 or more.")
        if len(colours) < 2 or size < 8 * grid or questions < 1 or not 0 <= jitter <= 25:
            raise UserError(
                f"shapes needs 2 colours, {8 * grid} pixels a side, 1 question a picture and a "
                f"jitter of 0 to 25, not {len(colours)}, {size}, {questions} and {jitter}."
            )
        if not diameters or not all(0.2 <= d <= 1 for d in diameters) or ramp < 0:
            raise UserError(
                "shapes needs diameters between 0.2 and 1 of a cell and a ramp of 0 items or more, "
                f"not {tuple(diameters)} and {ramp}."
            )
        self.seed, self.split, self.size, self.grid = seed, split, size, grid
        self.diameters, self.ramp = tuple(diameters), ramp if split == "train" else 0
        self.kinds, self.max_objects = tuple(kinds), max_objects
        self.questions, self.jitter = questions, jitter
        self.colours = tuple(colours)
        pairs = list(itertools.product(colours, shapes))
        self.unseen = {(colours[i % len(colours)], shape) for i, shape in enumerate(shapes)}
        self.pairs = pairs if split == "unseen" else [p for p in pairs if p not in self.unseen]
        self.length = SPLITS[split] if length is None else length
        if self.length < 1:
            raise UserError(f"length={length} of shapes leaves no scene: set it to 1 or more.")

    def __len__(self) -> int:
        return self.length

    def turns(self, index: int) -> tuple[Turn, ...]:
        return self._imagine(index)[1]

    def __getitem__(self, index: int) -> Conversation:
        scene, turns, rng = self._imagine(index)
        return Conversation(f"{self.split}-{index}", turns, (self._draw(scene, rng),))

    def _imagine(self, index: int) -> tuple[Scene, tuple[Turn, ...], random.Random]:
        """The scene, its questions, and the generator that draws it."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        for attempt in itertools.count():  # a scene without questions is drawn again
            key = f"{self.seed}/{self.split}/{index}/{attempt}".encode()
            rng = random.Random(hashlib.blake2b(key, digest_size=8).digest())
            scene = self._place(rng, self._most(index))
            if turns := self._ask(scene, rng):
                return scene, turns, rng
        raise AssertionError("unreachable")

    def _most(self, index: int) -> int:
        """The maximal number of objects of item `index`."""
        if index >= self.ramp:
            return self.max_objects
        return 1 + index * self.max_objects // self.ramp

    def _place(self, rng: random.Random, most: int) -> Scene:
        cells = rng.sample(range(self.grid**2), rng.randint(1, most))
        used: list[tuple[str, str]] = []
        for _ in cells:
            used.append(self._pair(rng, used))
        side = self.size // self.grid
        things = []
        for (colour, shape), cell in zip(used, cells, strict=True):
            diameter = int(side * rng.choice(self.diameters))
            y = cell // self.grid * side + rng.randint(0, side - diameter)
            x = cell % self.grid * side + rng.randint(0, side - diameter)
            things.append(Thing(colour, shape, cell, x, y, diameter))
        about = things
        if self.split == "unseen":
            about = [thing for thing in things if (thing.colour, thing.shape) in self.unseen]
        return Scene(tuple(things), self.grid, self.colours, tuple(about))

    def _pair(self, rng: random.Random, used: list[tuple[str, str]]) -> tuple[str, str]:
        """A pair not yet in the scene; `unseen` scenes begin with a never-seen one."""
        if self.split == "unseen" and not used:
            return rng.choice(sorted(self.unseen))
        pairs = self.pairs
        if used and rng.random() < 0.4:  # colours recur, or every count would be 1
            pairs = [pair for pair in pairs if pair[0] == used[-1][0]]
        free = [pair for pair in pairs if pair not in used]
        return rng.choice(free or [pair for pair in self.pairs if pair not in used] or self.pairs)

    def _ask(self, scene: Scene, rng: random.Random) -> tuple[Turn, ...]:
        """Questions whose answers do not follow from earlier turns: each thing is singled out once.

        Else "Where is the red circle?" gives away "Which shape is red?", and a model learns to read
        the conversation instead of the picture. The caption, which tells everything, comes last.
        """
        asked = self.questions
        if "caption" in self.kinds:
            asked = 0 if rng.random() < 0.25 else asked - 1
        left = {kind: list(KINDS[kind](scene)) for kind in self.kinds if kind != "caption"}
        told: set[Thing] = set()
        chosen: list[tuple[str, QA]] = []
        while len(chosen) < asked:
            left = {
                kind: fresh
                for kind, found in left.items()
                if (fresh := [qa for qa in found if not told.intersection(qa.tells)])
            }
            if not left:
                break
            kind = rng.choice(list(left))
            qa = left[kind].pop(rng.randrange(len(left[kind])))
            told.update(qa.tells)
            chosen.append((kind, qa))
        if "caption" in self.kinds:
            chosen += [("caption", qa) for qa in KINDS["caption"](scene)]
        turns: list[Turn] = []
        for kind, qa in chosen:
            mark = "" if turns else IMAGE
            turns += [Turn("user", mark + qa.question), Turn("assistant", qa.answer, kind)]
        return tuple(turns)

    def _draw(self, scene: Scene, rng: random.Random) -> np.ndarray:
        ground = GROUND + rng.randint(-self.jitter, self.jitter)
        canvas = np.full((self.size, self.size, 3), ground, np.uint8)
        for thing in scene.things:
            colour = [c + rng.randint(-self.jitter, self.jitter) for c in COLOURS[thing.colour]]
            difference = np.array(colour, np.float32).clip(0, 255) - ground
            d = thing.diameter
            # No overlap, so what lies under the shape is plain ground.
            canvas[thing.y : thing.y + d, thing.x : thing.x + d] = (
                mask(thing.shape, d) * difference + ground
            )
        return canvas


@lru_cache(maxsize=256)
def mask(shape: str, diameter: int, oversample: int = 4) -> np.ndarray:
    """Coverage of each pixel by a shape, float32 [diameter, diameter, 1] in 0 to 1."""
    fine = (np.arange(diameter * oversample) + 0.5) / (diameter * oversample) * 2 - 1
    v, u = np.meshgrid(fine, fine, indexing="ij")  # v goes down
    radius = np.hypot(u, v)
    inside = {
        "circle": radius <= 1,
        "square": np.maximum(abs(u), abs(v)) <= 0.88,
        "triangle": abs(u) <= (v + 1) / 2,
        "cross": np.minimum(abs(u), abs(v)) <= 0.33,
        "diamond": abs(u) + abs(v) <= 1,
        "ring": (radius <= 1) & (radius >= 0.55),
    }[shape]
    blocks = inside.reshape(diameter, oversample, diameter, oversample)
    return blocks.mean(axis=(1, 3), dtype=np.float32)[..., None]
