"""A scenario: a small run, the faults that strike it, and what must come of it. Written in TOML; no process here.

    hypothesis = "A run whose leader is killed goes on with two nodes and loses two steps at most."
    rows = ["F6"]
    nodes = 3

    [[faults]]
    kind = "kill_node"
    node = "leader"
    at = { step = 20 }

    [expect]
    lost_steps = 2

docs/chaos.md has each field. `read_scenario` refuses a file with one line that names the field.
"""

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import tomlkit
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from elastic_pt.chaos.kinds import KINDS, RANGES, Kind
from elastic_pt.chaos.rules import broken_rules
from elastic_pt.chaos.small_run import small_run
from elastic_pt.config import Config
from elastic_pt.config.mistakes import mistakes_in, near_or_all
from elastic_pt.errors import ConfigError
from elastic_pt.failpoints import Failpoint

NODES_MAX: Final = 16
_NODE: Final = re.compile(r"node-(0|[1-9]\d?)|leader|last|mirror-of-leader|follower|any|all")
_JOIN_WINDOW_S: Final = 3.0
"""For runs whose nodes come later: the first ones must not wait for them for long."""

Seconds = Annotated[float, Field(gt=0.0, le=86400.0)]


def _nodes(value: object) -> object:
    """One node or several, each by its name or its role."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    wrong = [x for x in listed if not isinstance(x, str) or not _NODE.fullmatch(x)]
    if wrong or not listed:
        raise ValueError(
            "expected one or a list of node-0, node-1 and so on, leader, last, follower, mirror-of-leader, any, all"
        )
    return tuple(listed) if isinstance(value, list) else value


Nodes = Annotated[str | tuple[str, ...], BeforeValidator(_nodes)]


class Phase(StrEnum):
    """What a run does over and over, as far as a fault can strike exactly there."""

    IMPORT = "import"
    RENDEZVOUS = "rendezvous"
    RESTORE = "restore"
    FORWARD = "forward"
    REDUCE = "reduce"
    OPTIMIZER = "optimizer"
    SNAPSHOT = "snapshot"
    MIRROR = "mirror"
    UPLOAD = "upload"
    COMMIT = "commit"
    RETENTION = "retention"
    RESIZE = "resize"

    @property
    def point(self) -> Failpoint:
        """The point of the code at which a process is in this phase."""
        return _POINTS[self]


_POINTS: Final = {
    Phase.IMPORT: Failpoint.IMPORTS_BEGUN,
    Phase.RENDEZVOUS: Failpoint.WORLD_JOINING,
    Phase.RESTORE: Failpoint.RESTORE_INDEXED,
    Phase.FORWARD: Failpoint.STEP_FORWARD,
    Phase.REDUCE: Failpoint.STEP_REDUCE,
    Phase.OPTIMIZER: Failpoint.STEP_OPTIMIZER,
    Phase.SNAPSHOT: Failpoint.BUFFER_COPIED,
    Phase.MIRROR: Failpoint.MIRROR_COPIED,
    Phase.UPLOAD: Failpoint.UPLOAD_BEGUN,
    Phase.COMMIT: Failpoint.HISTORY_WRITTEN,
    Phase.RETENTION: Failpoint.REMOVAL_LISTED,
    Phase.RESIZE: Failpoint.GENERATION_CHOSEN,
}


class Part(BaseModel):
    """A table of a scenario: immutable, and without keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Moment(Part):
    """When a fault strikes: at a step, in a phase, or after a time."""

    step: Annotated[int, Field(ge=0)] | None = None
    """A worker of the fault's node is about to compute this step; with `phase`: not before it."""
    phase: Phase | None = None
    """A process of the fault's node comes to this phase."""
    seconds: Annotated[float, Field(ge=0.0, le=86400.0)] | None = None
    """So many seconds after the first step of the run, or after the strike of the fault `after`. Not beside `step` or `phase`."""
    after: Annotated[int, Field(ge=1)] | None = None
    """Number of a fault that the file has further up, from 1: not before that one has struck."""
    generation: Annotated[int, Field(ge=1)] | None = None
    """Not before this generation."""

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if self.seconds is not None and (self.step is not None or self.phase is not None):
            raise ValueError(f"seconds = {self.seconds:g}: expected none beside a step or a phase")
        if self.seconds is None and self.step is None and self.phase is None:
            raise ValueError("step: missing; expected a step, a phase or seconds")
        return self

    @property
    def point(self) -> Failpoint | None:
        """The point at which it is known; None if a time tells it."""
        if self.seconds is not None:
            return None
        return Phase.FORWARD.point if self.phase is None else self.phase.point

    def __str__(self) -> str:
        told = [] if self.phase is None else [f"in {self.phase}"]
        told += [] if self.step is None else [f"at step {self.step}"]
        told += [] if self.seconds is None else [f"after {self.seconds:g} s"]
        told += [] if self.after is None else [f"after fault {self.after}"]
        told += [] if self.generation is None else [f"from generation {self.generation} on"]
        return " ".join(told)


class FaultSpec(BaseModel):
    """One fault: what, to whom, when, for how long. Further keys are the parameters of its kind."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    kind: str
    """What happens: one of the kinds of faults."""
    node: Nodes = "any"
    """Whom it strikes, or a list of them: `node-0` and so on; `leader` has rank 0, `last` the highest rank, `follower` is any but
    the leader, `mirror-of-leader` keeps a copy of the leader's state, `all` is every node that runs, `any` is chosen by the
    seed, or, at a step or in a phase, the first node that comes there."""
    at: Moment
    """When it strikes: a table."""
    for_s: Seconds | None = None
    """How many seconds it lasts. Required for kinds that last, and only for them."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        kind = KINDS.get(self.kind)
        if kind is None:
            near = get_close_matches(self.kind, KINDS)
            which = " or ".join(near) or "a kind of faults"
            raise ValueError(f"kind = {self.kind!r}: expected {which} (docs/chaos.md has all)")
        if self.for_s is None and kind.lasts:
            raise ValueError(f"for_s: missing; expected how many seconds {self.kind} lasts")
        if self.for_s is not None and not kind.lasts:
            raise ValueError(f"for_s = {self.for_s:g}: expected none, as {self.kind} does not last")
        for key, value in (self.model_extra or {}).items():
            if key not in kind.parameters:
                known = near_or_all(key, [*type(self).model_fields, *kind.parameters])
                raise ValueError(f"{key} = {value!r}: unknown key; expected {known}")
            if value not in RANGES[key]:
                raise ValueError(f"{key} = {value!r}: expected a {RANGES[key]}")
        if kind.deed and self.at.point is None:
            raise ValueError(
                f"at: {self.at}, expected a step or a phase, as {self.kind} is done there"
            )
        return self

    @property
    def of(self) -> Kind:
        """Its kind."""
        return KINDS[self.kind]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Whom it strikes, as written."""
        return (self.node,) if isinstance(self.node, str) else self.node

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters of its kind: those that are written, else the defaults."""
        return {**self.of.parameters, **(self.model_extra or {})}

    @property
    def starts(self) -> int:
        """How many nodes it starts."""
        return int(self.parameters["count"]) if self.of.starts_nodes else 0

    def __str__(self) -> str:
        lasts = "" if self.for_s is None else f" for {self.for_s:g} s"
        written = "".join(f" {key}={value:g}" for key, value in (self.model_extra or {}).items())
        return f"{self.kind}{written} {'+'.join(self.nodes)} {self.at}{lasts}"


class Expectation(Part):
    """What must come of the run."""

    outcome: Literal["completes", "stops", "pauses"] = "completes"
    """`stops`: a STOP by failure; `pauses`: it does not go on by itself, as status says."""
    reason: str = ""
    """What the STOP or the pause says, a part of it."""
    recovers_within_s: Seconds = 15.0
    """Seconds at most from the strike of each fault that ends a generation to the next step that is done; if nodes join, from
    the last step without them. Seconds in which processes of the machine wait for a processor do not count."""
    lost_steps: Annotated[int, Field(ge=0)] = 2
    """Steps that were reported as done and done again, at most, for each change of the members."""
    generations: Annotated[int, Field(ge=1)] | None = None
    """Exactly so many."""


class Scenario(Part):
    """A scenario, as its file says."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    """Small letters, digits and hyphens. The file's name without `.toml` counts if there is none."""
    hypothesis: Annotated[str, Field(min_length=1)]
    """A sentence: what you believe will happen."""
    rows: tuple[Annotated[str, Field(pattern=r"^[FI]\d{1,2}$")], ...] = ()
    """Rows of docs/faults.md that it checks, such as `F6`."""
    quick: bool = False
    """Whether it is one of the set that CI runs."""
    nodes: Annotated[int, Field(ge=1, le=NODES_MAX)] = 3
    """Nodes that start: `node-0` and so on. Training begins when all are there."""
    workers_per_node: Annotated[int, Field(ge=1, le=8)] = 1
    """Workers of each node. All nodes that may run, those that join included, may have as many as a step has slots: 8, unless
    `config` sets `train.global_batch` or `train.micro_batch`."""
    steps: Annotated[int, Field(ge=1, le=10**6)] = 48
    """Steps of the run. A checkpoint is committed every 6 steps, unless `config` says otherwise."""
    step_s: Annotated[float, Field(ge=0.0, le=60.0)] = 0.1
    """Each step takes so many seconds at least: its workers wait before they begin it. Not so in the undisturbed run."""
    store: Literal["bucket", "directory"] = "bucket"
    """Where the run is: in a bucket on a real S3 server, or in a directory."""
    replace_after_s: Seconds | None = None
    """A pool of machines: each node that has ended while the run goes on is started anew after so many seconds."""
    longest_s: Seconds = 120.0
    """The run has failed if it takes more seconds from the start of its nodes, which alone takes 10 to 40 seconds."""
    config: Mapping[str, Mapping[str, Any]] = {}
    """Keys of the run's configuration, by section, as in `config.elastic = { nodes_min = 2 }`."""
    faults: tuple[FaultSpec, ...] = ()
    """The faults, each a table `[[faults]]`. They are counted from 1."""
    expect: Expectation = Expectation()
    """What must come of the run."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if broken := list(broken_rules(self)):
            raise ValueError("; ".join(broken))
        try:
            config = self.run_config("file:///run", "file:///data")
        except ValidationError as error:
            raise ValueError(mistakes_in(error, Config, "config.")) from error
        # Nodes above `nodes_max` are spares, which a scenario may want.
        nodes = min(self.nodes + self.joining, config.elastic.nodes_max)
        slots = config.train.slots
        if nodes * self.workers_per_node > slots:
            raise ValueError(
                f"workers_per_node = {self.workers_per_node}: {nodes} nodes have {nodes * self.workers_per_node} "
                f"workers, expected at most {slots} (train.global_batch / train.micro_batch)"
            )
        return self

    @property
    def newcomers(self) -> int:
        """How many nodes its faults start."""
        return sum(each.starts for each in self.faults)

    @property
    def joining(self) -> int:
        """How many of them may take part."""
        return sum(each.starts for each in self.faults if not each.of.ends_node)

    def with_seed(self, seed: int) -> str:
        """Its name and a seed, for people. The name of a scenario that a campaign has drawn is its seed."""
        return self.name if self.name == f"seed-{seed}" else f"{self.name}, seed {seed}"

    def run_config(self, run_url: str, data_url: str) -> Config:
        """The configuration of its run, which starts once all its nodes are there."""
        own: dict[str, dict[str, Any]] = {
            "train": {"steps": self.steps},
            "elastic": {
                "nodes_max": self.nodes + self.joining,
                "workers_per_node": self.workers_per_node,
                **({"join_window_s": _JOIN_WINDOW_S} if self.joining else {}),
            },
            # Steps are so short here that the adaptive cadence would lose more of them than with a real model.
            "checkpoint": {"snapshot_every_steps": 1},
            "telemetry": {"log_format": "json"},
        }
        return Config.model_validate(small_run(run_url, data_url, own, self.config))


def read_scenario(text: str, source: str, name: str) -> Scenario:
    """The scenario in a TOML text. `name` counts if the text has none. Raises `ConfigError` in one line."""
    try:
        content = tomllib.loads(text)
        return Scenario.model_validate({"name": name, **content})
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}; expected a scenario") from error
    except ValidationError as error:
        raise ConfigError(f"{source}: {mistakes_in(error, Scenario)}") from error


def as_toml(scenario: Scenario) -> str:
    """The text from which `read_scenario` makes the same scenario."""
    content = scenario.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    return tomlkit.dumps(content)


def load(name_or_file: str) -> Scenario:
    """A scenario of the package by its name, or one in a file. Raises `ConfigError`."""
    path = Path(name_or_file)
    if path.suffix == ".toml":
        try:
            # Some editors on Windows write a byte order mark first.
            return read_scenario(path.read_text(encoding="utf-8-sig"), str(path), path.stem)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}, expected a scenario") from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: byte {error.start} is not UTF-8, expected a scenario"
            ) from error
    found = {each.name: each for each in shipped()}
    if name_or_file not in found:
        near = get_close_matches(name_or_file, found)
        raise ConfigError(
            f"scenario {name_or_file!r}: expected a file that ends in .toml, or a name that "
            f"`elastic-pt chaos list` shows{', such as ' + ', '.join(near) if near else ''}"
        )
    return found[name_or_file]


def shipped() -> Sequence[Scenario]:
    """The scenarios of the package, by name."""
    folder = files("elastic_pt.chaos") / "scenarios"
    texts = sorted((each.name, each.read_text()) for each in folder.iterdir())
    return [
        read_scenario(text, name, name.removesuffix(".toml"))
        for name, text in texts
        if name.endswith(".toml")
    ]


@dataclass(frozen=True)
class Draw:
    """The choices that a seed makes for a scenario. The same seed and scenario give the same choices."""

    seed: int

    def for_fault(self, number: int) -> random.Random:
        """The source of all choices about one fault."""
        return random.Random(f"{self.seed}/{number}")
