"""A run directory with any log, history and accounts, for tests that read a run. Time passes as the steps say."""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_pt.report.status import Run
from elastic_pt.runlog.log import RunLog, record_key
from elastic_pt.runlog.records import (
    ORIGIN,
    Body,
    Cause,
    Checkpoint,
    Commit,
    Generation,
    Kind,
    Member,
    Record,
    Recovery,
)
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.account import Account
from elastic_pt.telemetry.goodput import Bucket

EPOCH_S = 1_760_000_000.0


class PlantedRun:
    """Builds a run directory record by record."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.time_s = 0.0
        self.step = 0
        self.number = 0
        self._previous, self._index = ORIGIN, 0
        self._latest: dict[Kind, int] = {}
        self._kept: tuple[Checkpoint, ...] = ()
        for name in ("log", "history"):
            (directory / name).mkdir(parents=True)

    def append(self, body: Body) -> None:
        """Write the next record at the present time."""
        moment = datetime.datetime.fromtimestamp(EPOCH_S + self.time_s, datetime.UTC)
        time = moment.isoformat(timespec="milliseconds")
        record = Record(
            self._index, self.number, "n", f"{self._index}", time, self._previous, {}, body
        )
        self._latest[record.kind] = self._index
        record.latest.update(self._latest)
        data = record.to_bytes()
        (self.directory / record_key(self._index)).write_bytes(data)
        self._previous, self._index = Record.from_bytes(data, key="x").sha256, self._index + 1

    def generation(
        self,
        nodes: Iterable[str],
        *causes: Cause,
        frontier: int = 0,
        workers: int = 1,
        life: str = "",
    ) -> None:
        """A GENERATION and its RECOVERY."""
        self.number += 1
        members = tuple(
            Member(each, re.sub(r"[^\w.-]", "-", f"{each}{life}"), "10.0.0.1", 1, 1, workers)
            for each in nodes
        )
        resume = self._kept[0] if self._kept else None
        reason = "; ".join(map(str, causes)) or "the start"
        slots = tuple(4 for _ in members)
        self.append(
            Generation(
                self.number,
                members,
                slots,
                "10.0.0.1",
                1,
                resume,
                reason,
                causes,
                frontier,
                agree_s=0.5,
            )
        )
        self.append(Recovery(self.number, 1.0, 0.5, 2.0, 1.0, 4.5))

    def commit(
        self, lines: Sequence[Mapping[str, Any]], permanent: bool = False, every_s: float = 2.0
    ) -> Checkpoint:
        """Steps after the newest one, with these fields, and the COMMIT of the last one."""
        key = f"history/{self._index}.jsonl"
        with (self.directory / key).open("w") as file:
            for line in lines:
                self.step += 1
                self.time_s += every_s
                usual = {"kind": "step", "step": self.step, "world_size": 1, "loss": 3.0}
                timed = {"tokens": 1000, "seconds": every_s, "data_wait_s": 0.1, "skipped": ""}
                file.write(json.dumps(usual | timed | dict(line)) + "\n")
        loss = lines[-1].get("loss", 3.0)
        new = Checkpoint(self.step, self.number, f"ckpt/{self.step}", 1, "0" * 64, loss, permanent)
        self._kept = (new, *self._kept)[:3]
        self.append(Commit(self._kept, key))
        return new

    def account(
        self, node: str, price_per_hour: float = 0.0, *, incarnation: str = "", **seconds: float
    ) -> None:
        """The account of an agent that began with the log and has ended: its seconds by bucket."""
        total_s = sum(seconds.values())
        path = self.directory / "events" / f"n{abs(hash(node))}-1" / "account.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(
            Account(
                node,
                started_at=EPOCH_S,
                price_per_hour=price_per_hour,
                incarnation=incarnation or f"{node}-other",
                written_at=EPOCH_S + total_s,
                ended=True,
                seconds={Bucket(name): value for name, value in seconds.items()},
            ).to_bytes()
        )

    def open(self) -> Run:
        """The run, open for reading. It has no configuration."""
        store = open_store(f"file://{self.directory}")
        log = RunLog(store, writer="test")
        log.refresh()
        return Run(store, log, None)
