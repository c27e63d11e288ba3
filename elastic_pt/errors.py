"""The error tree of elastic_pt, and the exit code each error ends a process with.

    ElasticPtError                 8   something this project raises on purpose; always as one of these
    ├── ConfigError                2   the user can mend it: names the field, the value, what is expected
    │   └── DataError              2   the corpus or the prepared data cannot be used as it is
    ├── StoreError                 3   the bucket did not do what was asked before the deadline
    │   ├── NotFound               3   no object under that key
    │   ├── AlreadyExists          3   create-once lost: the key holds somebody else's object
    │   ├── AccessDenied           3   credentials are missing, expired or not allowed
    │   └── LogDamaged             4   a record of the run's log is missing, altered or not in its place
    ├── CheckpointError            4   a checkpoint is torn, corrupt or foreign, or none is usable
    ├── FencedError                5   a newer generation owns the run; this writer may append nothing
    ├── NodeFailure                6   this node's workers keep failing without progress; the node leaves
    ├── RunFailed                  7   the run has ended without completing; starting it again changes nothing
    ├── NotDone                    9   what was asked of the run is in its log, and was not done in time
    └── UnexpectedError            8   a bug, or a library's error that has no place here: start again, and report it

An error's message is one line for a person. The command line prints it without a traceback and exits with
`exit_code`. Anything that is not an `ElasticPtError` becomes an event with its traceback, and `UnexpectedError`.
"""


class ElasticPtError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 8


class ConfigError(ElasticPtError):
    """A user's mistake: the message names the field or file, the value, and what is expected."""

    exit_code = 2


class DataError(ConfigError):
    """The corpus or the prepared data cannot be used as it is."""


class StoreError(ElasticPtError):
    """The store did not do what was asked before the deadline."""

    exit_code = 3


class NotFound(StoreError):
    """No object under that key."""


class AlreadyExists(StoreError):
    """Create-once lost: the key holds an object that is not ours."""


class AccessDenied(StoreError):
    """Credentials are missing, expired or not allowed to do this."""


class LogDamaged(StoreError):
    """A record of the run's log is missing, altered or not in its place; nothing may build on it."""

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
    """The run has ended without completing; starting it again changes nothing."""

    exit_code = 7


class NotDone(ElasticPtError):
    """What was asked of the run is recorded in its log, but was not done in time; it still holds."""

    exit_code = 9


class UnexpectedError(ElasticPtError):
    """A bug, or a library's error that has no place here; its traceback is in the events. Start again."""

    exit_code = 8
