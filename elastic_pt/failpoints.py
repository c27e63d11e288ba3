"""Named points around every durable step and phase, at which tests and chaos runs kill, fail or delay a process.

    code       failpoint(Failpoint.COMMIT_APPENDED)
    operator   ELASTIC_PT_FAILPOINTS='commit.appended@2:kill,shard.written@1+:delay=0.5'  ─► arm ─► failpoint acts

A rule is `POINT[@HIT[+]]:ACTION`. It acts when the process reaches the point for the HIT-th time (default 1); with `+` also
each time after that. Hits are counted in each process; a forked process continues the counts of its parent. Actions:

    kill              SIGKILL to this process: nothing is cleaned up
    store_error       raise a `StoreError`
    os_error=ENOSPC   raise an `OSError` with this code
    raise             raise a `RuntimeError`, as a bug in the program would
    exit=CODE         end this process at once with this exit code
    signal=SIGSEGV    end or stop this process by this signal
    delay=SECONDS     block the thread
    hold=SECONDS      block the whole process: the thread keeps the interpreter's lock
    ask=SOCKET        tell a chaos run at this Unix socket, stand still until it answers, and do what it answers

What a chaos run reads is one line of JSON (`Reached`); it answers with one line: `go`, or one of the other actions. So
a fault from outside (a node killed, a link cut) can strike while the process stands exactly at the point.

A process without rules pays one comparison per point.
"""

import ctypes
import errno
import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Final

import structlog

from elastic_pt.errors import ConfigError, StoreError

VARIABLE: Final = "ELASTIC_PT_FAILPOINTS"
DELAY_MAX_S: Final = 3600.0
GO: Final = "go"
"""The answer to a process that asks and shall go on."""

log = structlog.get_logger("elastic_pt.failpoints")


class Failpoint(Enum):
    """Every point, with the moment that it names. Labels do not change when code moves."""

    IMPORTS_BEGUN = "imports.begun", "an agent has started, and has not imported torch"
    WORLD_JOINING = "world.joining", "a worker is about to join the process group of its generation"
    STEP_FORWARD = "step.forward", "a worker has the rows of a step, and has computed nothing of it"
    STEP_REDUCE = "step.reduce", "a worker has its gradients of a step; the workers have not agreed"
    STEP_OPTIMIZER = "step.optimizer", "all workers agree on a step; this one has changed no weight"
    BUFFER_BEGUN = "buffer.begun", "a worker has marked its older buffer as invalid"
    BUFFER_COPIED = "buffer.copied", "all rows are in the buffer, which is still marked as invalid"
    BUFFER_DONE = "buffer.done", "the buffer is marked as whole; the agent does not know it"
    SNAPSHOT_DESCRIBED = (
        "snapshot.described",
        "an agent has hashed a buffer; no peer can ask for it",
    )
    MIRROR_BEGUN = "mirror.begun", "a mirror has marked its older buffer as invalid"
    MIRROR_COPIED = "mirror.copied", "a peer's rows are in the mirror's buffer, not yet verified"
    MIRROR_DONE = "mirror.done", "the mirror's buffer is marked as whole; its peer does not know it"
    MIRROR_ACKNOWLEDGED = "mirror.acknowledged", "the peer has noted that its mirror has the step"
    OBJECT_PREPARED = "object.prepared", "a local store has a whole file under a hidden name"
    OBJECT_PUBLISHED = "object.published", "the file has its name; the directory is not synced"
    OBJECT_PART = "object.part", "one part of a multipart upload is in the store"
    OBJECT_PARTS = "object.parts", "all parts are in the store; the upload is not completed"
    UPLOAD_BEGUN = "upload.begun", "an agent has hashed a worker's shard, and has sent none of it"
    SHARD_WRITTEN = "shard.written", "a worker's shard file is in the store"
    NODE_RECORDED = "node.recorded", "a node's record is in the store, its notice is not"
    NODE_NOTICED = "node.noticed", "a node's notice is in the store"
    COMMIT_COLLECTED = "commit.collected", "the committing node has the notices of all nodes"
    MANIFEST_CREATED = "manifest.created", "the manifest is in the store, not yet read back"
    HISTORY_PART = "history.part", "one part of the history is in the store"
    HISTORY_WRITTEN = "history.written", "the whole history is in the store, the COMMIT is not"
    LOG_APPENDING = "log.appending", "the next record of the log is made and not yet created"
    LOG_APPENDED = "log.appended", "the next record is in the log; its writer has not noted it"
    COMMIT_APPENDED = "commit.appended", "the COMMIT is in the log; nothing is released or removed"
    COMMIT_RELEASED = "commit.released", "the workers are released; nothing is removed"
    STOP_APPENDED = "stop.appended", "the STOP of a complete run is in the log"
    REMOVAL_LISTED = (
        "removal.listed",
        "the files of an expired checkpoint are known, none is removed",
    )
    REMOVAL_MANIFEST = "removal.manifest", "only the manifest of an expired checkpoint is removed"
    REMOVAL_FILE = "removal.file", "one more file of an expired checkpoint is removed"
    SWEEP_LISTED = "sweep.listed", "a sweep knows what it will remove"
    SWEEP_ABANDONED = "sweep.abandoned", "a sweep has ended an unfinished multipart upload"
    QUARANTINE_APPENDED = "quarantine.appended", "the QUARANTINE of a checkpoint is in the log"
    GENERATION_CHOSEN = "generation.chosen", "a proposer has chosen the state to resume from"
    GENERATION_APPENDED = "generation.appended", "the GENERATION is in the log; nobody acts on it"
    RESTORE_INDEXED = "restore.indexed", "a reader knows where its rows are, and has read none"
    RESTORE_ROWS = "restore.rows", "the rows of one request are verified and in place"
    RESTORE_LOADED = "restore.loaded", "all rows are in place; training has not begun"

    PASS_EVALUATED = (
        "pass.evaluated",
        "a worker has evaluated one batch of held-out rows; nobody has the loss",
    )

    def __init__(self, label: str, moment: str) -> None:
        self.label = label
        self.moment = moment


class Action(Enum):
    """What a process does at a point."""

    KILL = "kill"
    STORE_ERROR = "store_error"
    OS_ERROR = "os_error"
    RAISE = "raise"
    EXIT = "exit"
    SIGNAL = "signal"
    DELAY = "delay"
    HOLD = "hold"
    ASK = "ask"


@dataclass(frozen=True)
class Deed:
    """An action with its value."""

    action: Action
    number: float = 0
    """Seconds, the `errno` of an `OSError`, an exit code or the number of a signal; 0 for an action without one."""
    socket: str = ""
    """Whom to ask."""


@dataclass(frozen=True)
class Rule:
    """At which hits of a point a process is disturbed, and how."""

    point: Failpoint
    deed: Deed
    hit: int = 1
    onwards: bool = False
    """Whether it also acts at each later hit."""

    def acts_at(self, hit: int) -> bool:
        """Whether the rule acts when its point is reached for the `hit`-th time."""
        return hit == self.hit or (self.onwards and hit > self.hit)


@dataclass(frozen=True)
class Reached:
    """What a process that asks tells of itself."""

    point: str
    """The label of the point."""
    hit: int
    pid: int
    step: int | None
    """How many steps of the run are done, where the point knows it."""


class _Armed:
    """The rules of this process, and how often each point was reached."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._rules = rules
        self._hits: Counter[Failpoint] = Counter()
        self._lock = threading.Lock()

    def reach(self, point: Failpoint, step: int | None) -> None:
        with self._lock:
            self._hits[point] += 1
            hit = self._hits[point]
        for rule in self._rules:
            if rule.point is point and rule.acts_at(hit):
                deed: Deed | None = rule.deed
                if rule.deed.action is Action.ASK:
                    deed = _ask(rule.deed.socket, Reached(point.label, hit, os.getpid(), step))
                if deed is not None:
                    log.warning("failpoint", point=point.label, hit=hit, action=deed.action.value)
                    _do(deed, f"failpoint {point.label}")


_armed: _Armed | None = None


def failpoint(point: Failpoint, step: int | None = None) -> None:
    """Act on the rules for this point. Any thread of any process; without rules it does nothing.

    `step`: how many steps of the run are done, if the caller knows it.
    """
    if _armed is not None:
        _armed.reach(point, step)


def arm(text: str) -> None:
    """Replace the rules of this process by those of `text`, and count from zero. An empty text disarms it.

    Raises `ConfigError` for a text that is not a list of rules.
    """
    global _armed
    rules = parse(text)
    _armed = _Armed(rules) if rules else None
    if rules:
        log.warning("failpoints_armed", rules=text)


def parse(text: str) -> tuple[Rule, ...]:
    """The rules of a text, separated by commas. Raises `ConfigError`."""
    return tuple(_rule(each.strip()) for each in text.split(",")) if text.strip() else ()


_RULE: Final = re.compile(r"([a-z.]+)(?:@([1-9][0-9]{0,8})(\+?))?:([a-z_]+(?:=[^,\s]+)?)")


def _rule(text: str) -> Rule:
    found = _RULE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{VARIABLE}: {text!r}, expected POINT[@HIT[+]]:ACTION[=VALUE]")
    label, hit, onwards, deed = found.groups()
    points = {each.label: each for each in Failpoint}
    if label not in points:
        raise ConfigError(f"{VARIABLE}: point {label!r}, expected one of {', '.join(points)}")
    return Rule(points[label], parse_deed(deed), int(hit or 1), bool(onwards))


def parse_deed(text: str) -> Deed:
    """The deed that `ACTION[=VALUE]` names. Raises `ConfigError`."""
    verb, given, value = text.partition("=")
    actions = {each.value: each for each in Action}
    if verb not in actions:
        raise ConfigError(f"{VARIABLE}: action {verb!r}, expected one of {', '.join(actions)}")
    match action := actions[verb]:
        case Action.DELAY | Action.HOLD:
            return Deed(
                action, _number(text, value, f"seconds from 0 to {DELAY_MAX_S:g}", DELAY_MAX_S)
            )
        case Action.EXIT:
            return Deed(action, _number(text, value, "an exit code from 0 to 255", 255))
        case Action.OS_ERROR:
            code = getattr(errno, value, None)
            if not isinstance(code, int):
                raise ConfigError(f"{VARIABLE}: {text}, expected a code such as ENOSPC")
            return Deed(action, code)
        case Action.SIGNAL:
            if value not in signal.Signals.__members__:
                raise ConfigError(f"{VARIABLE}: {text}, expected a signal such as SIGSEGV")
            return Deed(action, signal.Signals[value])
        case Action.ASK:
            if not value:
                raise ConfigError(f"{VARIABLE}: {text}, expected the path of a Unix socket")
            return Deed(action, socket=value)
        case _:
            if given:
                raise ConfigError(f"{VARIABLE}: {text}, expected {verb} alone")
            return Deed(action)


def _number(text: str, value: str, expected: str, most: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= most:
        raise ConfigError(f"{VARIABLE}: {text}, expected {expected}")
    return number


def _ask(path: str, reached: Reached) -> Deed | None:
    """Tell who listens, and wait for the answer. None: go on, also if nobody listens any more."""
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(path)
            asking.sendall(json.dumps(asdict(reached)).encode() + b"\n")
            answer = asking.makefile().readline().strip()
        except OSError:
            return None
    return None if answer in ("", GO) else parse_deed(answer)


def _do(deed: Deed, where: str) -> None:
    match deed.action:
        case Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.SIGNAL:
            os.kill(os.getpid(), int(deed.number))
        case Action.EXIT:
            os._exit(int(deed.number))
        case Action.STORE_ERROR:
            raise StoreError(where)
        case Action.OS_ERROR:
            code = int(deed.number)
            raise OSError(code, f"{os.strerror(code)} ({where})")
        case Action.RAISE:
            raise RuntimeError(where)
        case Action.DELAY:
            time.sleep(deed.number)
        case Action.HOLD:
            # `PyDLL` keeps the interpreter's lock during the call.
            ctypes.PyDLL(None).usleep(int(deed.number * 1e6))
        case Action.ASK:
            raise ConfigError(f"{VARIABLE}: ask, expected another action as an answer")
