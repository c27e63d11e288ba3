"""Tables that claim to be huge: reading them ends, and holds little in memory. Compressed lines: `test_documents`."""

import threading
from pathlib import Path
from typing import Final

import pyarrow
import pyarrow.parquet
import pytest

from elastic_pt.data.documents import read_documents
from elastic_pt.data.sources import SourceSpec, list_files
from elastic_pt.errors import DataError

MEMORY_BYTES_MAX: Final = 192 << 20


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Watch:
    """The most memory that the process has had since."""

    def __init__(self) -> None:
        self._began = self._peak = resident_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self._peak = max(self._peak, resident_bytes())

    def end(self) -> int:
        """How much more it was than at the start."""
        self._ended.set()
        self._thread.join()
        return self._peak - self._began


@pytest.mark.parametrize("cut", [4, 100, 1000])
def test_damaged_tables_end_with_one_line(cut: int, tmp_path: Path) -> None:
    """A Parquet file with other numbers in its footer is refused, whatever sizes it claims."""
    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text"] * 1000}), path)
    whole = path.read_bytes()
    watch = Watch()
    for number in range(20):
        data = bytearray(whole)
        at = len(data) - cut - number
        data[at : at + 4] = b"\xff\xff\xff\x7f"
        path.write_bytes(data)
        try:
            found = sum(1 for _ in read_documents(list_files(SourceSpec("x", (str(path),)))))
        except DataError as error:
            assert str(error).isprintable()  # noqa: PT017
        else:
            assert found <= 1_000_000
    assert watch.end() < MEMORY_BYTES_MAX
