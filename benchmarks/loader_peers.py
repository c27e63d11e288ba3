"""The readers that `benchmarks/loader.py` compares with: torch's DataLoader, Grain, Mosaic's streaming.

Each delivers int64 tensors of the same shape, of the same rows, each in a random order of its own. Each runs with the best of a
few settings. They are imported by name, as they are in an environment of their own.
"""

import shutil
import sys
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.loader_process import Case, best_of, timed_batches

_WORKERS: Final = (0, 2)


class Rows:
    """Rows of a memory map, as a data set of torch and as a source of Grain."""

    def __init__(self, path: str, sequence_length: int, *, as_tensor: bool) -> None:
        self._path, self._length, self._as_tensor = path, sequence_length, as_tensor
        self._ids: Any = None

    def __len__(self) -> int:
        return (Path(self._path).stat().st_size // 2 - 1) // self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": None}

    def __getitem__(self, row: int) -> Any:
        if self._ids is None:
            # Without the class `memmap`, whose slices cost more.
            self._ids = np.asarray(np.memmap(self._path, dtype=np.uint16, mode="r"))
        ids = self._ids[row * self._length : (row + 1) * self._length + 1]
        return torch.from_numpy(ids.astype(np.int64)) if self._as_tensor else ids


class _Peer(ABC):
    """What the three share."""

    settings: tuple[dict[str, Any], ...]

    def __init__(self, case: Case) -> None:
        self._case = case
        self._chosen: dict[str, Any] = {}

    def prepare(self, seconds: float, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """Choose the best settings, unless there are some."""
        if settings is not None:
            self._chosen = settings
            return {"settings": settings}

        def speed(chosen: dict[str, Any]) -> float:
            self._chosen = chosen
            return float(self.read(seconds=seconds)["tokens_per_s"])

        self._chosen = best_of(list(self.settings), speed)
        return {"settings": self._chosen}

    def read(self, seconds: float | None = None, cache: str = "") -> dict[str, Any]:
        """Read in a random order."""
        return timed_batches(lambda: self.batches(cache, 0), seconds)

    def seek(self, count: int, seed: int, cache: str = "", **_: Any) -> dict[str, Any]:
        """The milliseconds to the first batch at other places."""
        found = []
        generator = np.random.default_rng(seed)
        for _number in range(count):
            batch = int(generator.integers(1, max(2, self.batch_count // 2)))
            started_s = time.perf_counter()
            next(self.batches(cache, batch))
            found.append(1e3 * (time.perf_counter() - started_s))
        return {"seek_ms": found}

    @property
    def batch_count(self) -> int:
        """Of one epoch."""
        rows = Rows(self._case.url, self._case.sequence_length, as_tensor=True)
        return len(rows) // self._case.rows

    @abstractmethod
    def batches(self, cache: str, first: int) -> Iterator[Any]:
        """The batches of an epoch from number `first` on."""


class Torch(_Peer):
    """`torch.utils.data.DataLoader` over a memory map."""

    settings = tuple({"num_workers": workers} for workers in _WORKERS)

    def batches(self, cache: str, first: int) -> Iterator[Any]:
        rows = Rows(self._case.url, self._case.sequence_length, as_tensor=True)
        order = np.random.default_rng(0).permutation(len(rows))[first * self._case.rows :]
        loader: Any = torch.utils.data.DataLoader(
            rows,  # type: ignore[arg-type]
            batch_size=self._case.rows,
            sampler=order.tolist(),
            drop_last=True,
            **self._chosen,
        )
        return iter(loader)


class Grain(_Peer):
    """Grain's `MapDataset` over the same memory map."""

    settings = (
        {"num_threads": 0},
        {"num_threads": 2, "prefetch_buffer_size": 8},
        {"num_threads": 16, "prefetch_buffer_size": 16},
        {"num_workers": 2},
    )

    def batches(self, cache: str, first: int) -> Iterator[Any]:
        grain: Any = import_module("grain")
        source = Rows(self._case.url, self._case.sequence_length, as_tensor=False)
        dataset = grain.MapDataset.source(source).shuffle(seed=0)
        dataset = dataset.batch(self._case.rows, drop_remainder=True, batch_fn=_stacked)
        workers = self._chosen.get("num_workers")
        options = {} if workers else self._chosen
        if options.get("num_threads") == 0:
            options = {"num_threads": 0, "prefetch_buffer_size": 0}
        data = dataset[first:].to_iter_dataset(grain.ReadOptions(**options))
        if workers:
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return (torch.from_numpy(batch) for batch in data)


def _stacked(rows: Any) -> Any:
    return np.stack(rows).astype(np.int64)


class Mosaic(_Peer):
    """`streaming.StreamingDataset` in torch's DataLoader. `url` has directories, each with a part of the rows."""

    settings = tuple({"num_workers": workers} for workers in _WORKERS)

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._streaming = _streaming()
        self._batch_count = 0

    def write(self, raw: str, parts: int) -> dict[str, Any]:
        """Write the rows of a file of ids, as directories of about the same size."""
        rows = Rows(raw, self._case.sequence_length, as_tensor=False)
        columns = {"tokens": f"ndarray:uint16:{self._case.sequence_length + 1}"}
        for part in range(parts):
            out = f"{self._case.url}/{part}"
            with self._streaming.MDSWriter(out=out, columns=columns) as writer:
                for row in range(part * len(rows) // parts, (part + 1) * len(rows) // parts):
                    writer.write({"tokens": rows[row]})
        return {}

    def batches(self, cache: str, first: int) -> Iterator[Any]:
        streaming, case = self._streaming, self._case
        streaming.base.util.clean_stale_shared_memory()
        remote = "://" in case.url
        if remote:
            # An epoch of one part, as large as what a node of ours reads.
            local = Path(cache) / str(time.monotonic_ns())
            where = [streaming.Stream(remote=f"{case.url}/0", local=str(local))]
        else:
            where = [streaming.Stream(local=str(each)) for each in Path(case.url).iterdir()]
        data = streaming.StreamingDataset(streams=where, batch_size=case.rows, shuffle=True)
        self._batch_count = len(data) // case.rows
        if first:
            data.load_state_dict(data.state_dict(first * case.rows, True))
        loader: Any = torch.utils.data.DataLoader(
            data, batch_size=case.rows, collate_fn=_tensor, drop_last=True, **self._chosen
        )
        return iter(loader)

    def seek(self, count: int, seed: int, cache: str = "", **_: Any) -> dict[str, Any]:
        """As the others; from a bucket each time with nothing on this machine."""
        found = super().seek(count, seed, cache)
        shutil.rmtree(cache, ignore_errors=True)
        return found

    @property
    def batch_count(self) -> int:
        return self._batch_count


def _tensor(samples: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([each["tokens"] for each in samples]).astype(np.int64))


def _streaming() -> Any:
    """The module. It needs torchvision for data sets of images only, and no wheel of it fits torch's CPU wheels."""
    import_module("transformers.feature_extraction_utils")
    import_module("transformers.tokenization_utils_base")
    try:
        import_module("torchvision")
    except ImportError:
        datasets, functional = "torchvision.datasets", "torchvision.transforms.functional"
        for name in ("torchvision", datasets, "torchvision.transforms", functional):
            sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[datasets])["VisionDataset"] = object
        vars(sys.modules[functional])["to_tensor"] = None
    return import_module("streaming")


PEERS: Final[dict[str, Callable[[Case], Any]]] = {"torch": Torch, "grain": Grain, "mosaic": Mosaic}
