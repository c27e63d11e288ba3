"""A run of Weights & Biases, with the run's id as its id.

Online the position is the step that the server names, so a second call adds what is missing there. Offline
(`WANDB_MODE=offline`) W&B knows no step: each call writes a new offline run, which holds all steps.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from elastic_pt.errors import ConfigError
from elastic_pt.report.history import Batch
from elastic_pt.report.sinks.exclusive import open_locked
from elastic_pt.report.sinks.feed import Position, scalars


class WeightsAndBiases:
    """The run of W&B."""

    def __init__(self, project: str, run_id: str) -> None:
        """Start or resume it. Raises `ConfigError` if the package or the login is missing."""
        self.name = f"wandb:{project}"
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"--to {self.name}: {error}; expected the extra that "
                "`pip install 'elastic-pt[wandb]'` installs"
            ) from error
        lock = Path(tempfile.gettempdir()) / f"elastic-pt-wandb-{run_id}.lock"
        self._lock = open_locked(lock, os.O_RDWR | os.O_CREAT, self.name)
        try:
            # Only what the steps say is of interest, not the machine on which `sync` runs.
            settings = wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            )
            self._run: Any = wandb.init(
                project=project, id=run_id, resume="allow", settings=settings
            )
        except wandb.Error as error:
            os.close(self._lock)
            raise ConfigError(
                f"--to {self.name}: {error}; expected a login (`wandb login`) and a project of it"
            ) from error
        # Not `step`: it is 0 until this process has logged one.
        self.position = Position(0, max(0, self._run.starting_step - 1))

    def write(self, batch: Batch) -> None:
        """Pass the steps to the process of W&B, which uploads them."""
        for line in batch.lines:
            self._run.log(dict(scalars(line)), step=line["step"], commit=True)
        self.position = Position(batch.record.index + 1, batch.lines[-1]["step"])

    def flush(self) -> None:
        """The process of W&B has its own copy, and `close` waits for it."""

    def close(self) -> None:
        """Wait for the upload."""
        self._run.finish()
        os.close(self._lock)
