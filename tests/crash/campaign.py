"""Crashes by seed: which cases there are, and how each is run."""

import random
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from elastic_pt.failpoints import Failpoint
from tests.crash import bucket
from tests.crash.bucket import Shape
from tests.crash.processes import Child, Ended

NEVER: Final = "log.appending@999999999:kill"
"""Counts hits and never acts."""
OF_MEMORY: Final = tuple(
    each for each in Failpoint if each.label.split(".")[0] in ("buffer", "snapshot", "mirror")
)
OF_PARTS: Final = (Failpoint.OBJECT_PART, Failpoint.OBJECT_PARTS, Failpoint.SWEEP_ABANDONED)
OF_FILES: Final = (Failpoint.OBJECT_PREPARED, Failpoint.OBJECT_PUBLISHED)
OF_STEPS: Final = tuple(
    each for each in Failpoint if each.label.split(".")[0] in ("imports", "world", "step", "pass")
)
"""No fleet of a campaign starts workers or computes steps."""


def points_of(store: str) -> list[Failpoint]:
    """The points that a fleet with this store reaches: `local` or `s3`."""
    other = OF_FILES if store == "s3" else OF_PARTS
    return [each for each in Failpoint if each not in (*OF_MEMORY, *OF_STEPS, *other)]


class BucketCrashes:
    """The crashes of fleets with one seed and one store."""

    def __init__(self, seed: int, folder: Path, url: str) -> None:
        """Runs are below `url`; `folder` is for local files."""
        self._seed = seed
        self._folder = folder / f"seed-{seed}"
        self._folder.mkdir()
        self._url = url
        self._known: dict[Shape, tuple[Counter[str], float]] = {}
        self._count = 0

    def kill_at(self, point: Failpoint) -> str:
        """Kill a fleet at a random one of its hits of a point, and let another one follow. Returns the rule."""
        shape = Shape.of(self._seed)
        if point is Failpoint.QUARANTINE_APPENDED:
            shape = replace(shape, damaged=True)
        if point is Failpoint.STOP_APPENDED:
            shape = replace(shape, completes=True)
        if point in OF_PARTS:
            shape = replace(shape, small_parts=True)
        hits, _ = self._probed(shape)
        assert hits[point.label], f"seed {self._seed} never reaches {point.label}"
        draw = random.Random(f"{self._seed} {point.label}")
        rule = f"{point.label}@{draw.randint(1, hits[point.label])}:kill"
        ended = self._crash(shape, rule, None)
        assert ended.killed, f"seed {self._seed} did not reach {rule}"
        return rule

    def kill_at_random(self, number: int) -> float:
        """Kill a fleet after a random time. Returns the seconds."""
        shape = Shape.of(self._seed)
        _, seconds = self._probed(shape)
        after_s = random.Random(f"{self._seed} random {number}").uniform(0.0, seconds)
        self._crash(shape, "", after_s)
        return after_s

    def _crash(self, shape: Shape, rule: str, kill_after_s: float | None) -> Ended:
        template = self._template(shape)
        name = f"run-{self._seed}-{self._count}"
        self._count += 1
        url = f"{self._url}/{name}"
        if url.startswith("file://"):
            shutil.copytree(template, url.removeprefix("file://"))
        scratch = self._folder / f"scratch-{name}"
        scratch.mkdir()
        run = partial(bucket.attempt, template, url, shape, scratch, rule)
        ended = Child(run).wait(kill_after_s)
        if rule == NEVER:
            return ended
        promised = [int(line.split()[1]) for line in ended.lines if line.startswith("committed")]
        if url.startswith("file://"):
            bucket.age_unfinished(Path(url.removeprefix("file://")))
        again = self._folder / f"again-{name}"
        again.mkdir()
        Child(lambda _: bucket.recover(url, shape, again, max(promised, default=0))).wait()
        shutil.rmtree(scratch)
        shutil.rmtree(again)
        if url.startswith("file://"):
            shutil.rmtree(url.removeprefix("file://"))
        return ended

    def _probed(self, shape: Shape) -> tuple[Counter[str], float]:
        """How often an undisturbed attempt reaches each point, and its seconds."""
        if shape not in self._known:
            ended = self._crash(shape, NEVER, None)
            words = [line.split() for line in ended.lines if line.startswith("reached")]
            hits = Counter({label: int(count) for _, label, count in words})
            self._known[shape] = hits, ended.seconds
        return self._known[shape]

    def _template(self, shape: Shape) -> Path:
        name = f"before-{shape.damaged:d}"
        root = self._folder / name
        if not root.exists():
            scratch = self._folder / f"{name}-scratch"
            scratch.mkdir()
            Child(lambda _: bucket.prepare(root, shape, scratch)).wait()
            shutil.rmtree(scratch)
        return root
