"""Named points around every durable step, at which tests and chaos campaigns kill, fail or delay a process.

    code       failpoint(Failpoint.COMMIT_APPENDED)
    operator   ELASTIC_PT_FAILPOINTS='commit.appended@2:kill,shard.written@1+:delay=0.5'  ─► arm ─► failpoint acts

A rule is `POINT[@HIT[+]]:ACTION`. It acts when the process reaches the point for the HIT-th time (default 1); with `+` also
each time after that. Hits are counted in each process; a forked process continues the counts of its parent. Actions:

    kill              SIGKILL to this process: nothing is cleaned up
    store_error       raise a `StoreError`
    os_error=ENOSPC   raise an `OSError` with this code
    delay=SECONDS     block the thread

A process without rules pays one comparison per point.
"""

import errno
import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Final

import structlog

from elastic_pt.errors import ConfigError, StoreError

VARIABLE: Final = "ELASTIC_PT_FAILPOINTS"
DELAY_MAX_S: Final = 3600.0

log = structlog.get_logger("elastic_pt.failpoints")


class Failpoint(Enum):
    """Every point, with the moment that it names. Labels do not change when code moves."""

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
    """What a rule does at its point."""

    KILL = "kill"
    STORE_ERROR = "store_error"
    OS_ERROR = "os_error"
    DELAY = "delay"


@dataclass(frozen=True)
class Rule:
    """At which hits of a point a process is disturbed, and how."""

    point: Failpoint
    action: Action
    hit: int = 1
    onwards: bool = False
    """Whether it also acts at each later hit."""
    delay_s: float = 0.0
    error_code: int = 0
    """The `errno` of an `OSError`."""

    def acts_at(self, hit: int) -> bool:
        """Whether the rule acts when its point is reached for the `hit`-th time."""
        return hit == self.hit or (self.onwards and hit > self.hit)


class _Armed:
    """The rules of this process, and how often each point was reached."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._rules = rules
        self._hits: Counter[Failpoint] = Counter()
        self._lock = threading.Lock()

    def reach(self, point: Failpoint) -> None:
        with self._lock:
            self._hits[point] += 1
            hit = self._hits[point]
        for rule in self._rules:
            if rule.point is point and rule.acts_at(hit):
                log.warning("failpoint", point=point.label, hit=hit, action=rule.action.value)
                _act(rule)


_armed: _Armed | None = None


def failpoint(point: Failpoint) -> None:
    """Act on the rules for this point. Any thread of any process; without rules it does nothing."""
    if _armed is not None:
        _armed.reach(point)


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


_RULE: Final = re.compile(r"([a-z.]+)(?:@([1-9][0-9]{0,8})(\+?))?:([a-z_]+)(?:=([A-Z0-9.]+))?")


def _rule(text: str) -> Rule:
    found = _RULE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{VARIABLE}: {text!r}, expected POINT[@HIT[+]]:ACTION[=VALUE]")
    label, hit, onwards, verb, value = found.groups()
    points = {each.label: each for each in Failpoint}
    if label not in points:
        raise ConfigError(f"{VARIABLE}: point {label!r}, expected one of {', '.join(points)}")
    actions = {each.value: each for each in Action}
    if verb not in actions:
        raise ConfigError(f"{VARIABLE}: action {verb!r}, expected one of {', '.join(actions)}")
    rule = Rule(points[label], actions[verb], int(hit or 1), bool(onwards))
    match rule.action:
        case Action.DELAY:
            return Rule(rule.point, rule.action, rule.hit, rule.onwards, delay_s=_seconds(value))
        case Action.OS_ERROR:
            code = getattr(errno, value or "", None)
            if not isinstance(code, int):
                raise ConfigError(f"{VARIABLE}: os_error={value}, expected a code such as ENOSPC")
            return Rule(rule.point, rule.action, rule.hit, rule.onwards, error_code=code)
        case _:
            if value is not None:
                raise ConfigError(f"{VARIABLE}: {verb}={value}, expected {verb} alone")
            return rule


def _seconds(value: str | None) -> float:
    try:
        seconds = float(value or "")
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= DELAY_MAX_S:
        raise ConfigError(f"{VARIABLE}: delay={value}, expected seconds from 0 to {DELAY_MAX_S:g}")
    return seconds


def _act(rule: Rule) -> None:
    where = f"failpoint {rule.point.label}"
    match rule.action:
        case Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.STORE_ERROR:
            raise StoreError(where)
        case Action.OS_ERROR:
            raise OSError(rule.error_code, f"{os.strerror(rule.error_code)} ({where})")
        case Action.DELAY:
            time.sleep(rule.delay_s)
