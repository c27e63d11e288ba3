"""The error tree of elastic_pt, and the exit code each error ends a process with.

    ElasticPtError                 8   base of every error that this project raises on purpose
    ├── ConfigError                2   the user can fix it: names the field, the value, what is expected
    │   ├── DataError              2   the corpus or the prepared data cannot be used as it is
    │   └── NoRun                  2   no run is at that URL, or not yet
    ├── StoreError                 3   a request to the bucket failed, at once or until its deadline
    │   ├── NotFound               3   no object under that key
    │   ├── AlreadyExists          3   a lost create-once: the key holds another writer's object
    │   ├── AccessDenied           3   credentials are missing, expired or not allowed
    │   └── LogDamaged             4   a record of the run's log is missing, altered or misplaced
    ├── CheckpointError            4   a checkpoint is torn, corrupt or foreign, or none is usable
    ├── FencedError                5   a newer generation owns the run; this writer may append nothing
    ├── NodeFailure                6   this node's workers keep failing without progress; the node leaves
    ├── RunFailed                  7   the run has ended without completing; a restart does not help
    ├── NotDone                    9   a request is in the run's log, but was not done in time
    └── UnexpectedError            8   a bug, or an unexpected error of a library: restart, and report it

An error's message is one line for a person. The command line prints it without a traceback and exits with
`exit_code`. Anything that is not an `ElasticPtError` becomes an event with its traceback, and `UnexpectedError`.
"""


def one_line(text: str) -> str:
    """`text` without line ends, and without characters that steer a terminal or that no file can hold.

    For whatever others have written and a person reads: each such character becomes a space.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


class ElasticPtError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 8

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(ElasticPtError):
    """A user's mistake: the message names the field or file, the value, and what is expected."""

    exit_code = 2


class DataError(ConfigError):
    """The corpus or the prepared data cannot be used as it is."""


class NoRun(ConfigError):
    """No run is at that URL, or not yet."""


class StoreError(ElasticPtError):
    """A request to the store failed, at once or until its deadline."""

    exit_code = 3


class NotFound(StoreError):
    """No object under that key."""


class AlreadyExists(StoreError):
    """A lost create-once: the key holds an object of another writer."""


class AccessDenied(StoreError):
    """Credentials are missing, expired or not allowed to do this."""


class LogDamaged(StoreError):
    """A record of the run's log is missing, altered or misplaced; no record may follow it."""

    exit_code = 4


class CheckpointError(ElasticPtError):
    """A checkpoint is torn, corrupt or foreign, or no checkpoint is usable."""

    exit_code = 4


class FencedError(ElasticPtError):
    """A newer generation owns the run; this writer may append nothing."""

    exit_code = 5


class NodeFailure(ElasticPtError):
    """This node's workers keep failing without progress; the node leaves, the run goes on without it."""

    exit_code = 6


class RunFailed(ElasticPtError):
    """The run has ended without completing; a restart does not help."""

    exit_code = 7


class NotDone(ElasticPtError):
    """A request is in the run's log, but was not done within `--timeout`. It stays in force."""

    exit_code = 9


class UnexpectedError(ElasticPtError):
    """A bug, or an unexpected error of a library. Its traceback is in the events. Restart."""

    exit_code = 8
