"""The cheap checks, which each agent makes at its start: one warning each for what is not well. Agent process.

They read limits of this machine, and send the one short request to the bucket that the lifecycle rule needs. Nothing
here stops a node: `requirements.py` does.
"""

from pathlib import Path
from typing import Final

import structlog

from elastic_pt.config import Config
from elastic_pt.doctor.bucket import rules_and_clock
from elastic_pt.doctor.machine import local_checks, needs_of
from elastic_pt.doctor.requirements import workers_of
from elastic_pt.store.open import open_store

RULES_TIMEOUT_S: Final = 2.0
"""Short, because some servers do not know lifecycle rules."""

log = structlog.get_logger("elastic_pt.doctor")


def warn_at_start(config: Config, vocabulary: int, nodes: int | None) -> None:
    """Warn of everything that `elastic-pt doctor` would find in milliseconds. `nodes` train now, as far as it is known."""
    needs = needs_of(config, vocabulary, nodes, workers_of(config))
    store = open_store(config.run.url, timeout_s=RULES_TIMEOUT_S)
    for check in (*local_checks(Path(config.checkpoint.staging), needs), *rules_and_clock(store)):
        if not check.ok:
            log.warning(
                "start_check_failed",
                check=check.name,
                found=check.found,
                expected=check.expected,
                remedy=check.remedy,
            )
