"""Tokens that are left out: never read, and no other token moves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_data import Prepared, cache_at, copy_of, in_memory, shards_of, stream_of

from elastic_pt.data.blocks import DamagedBlock
from elastic_pt.data.ignored import IgnoredTokens, inputs_and_targets
from elastic_pt.data.shards import TokenReader
from elastic_pt.store.port import Store
from tests.membership.bucket import WatchedStore


class RecordingStore(WatchedStore):
    """A store that records what is read of each file."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.ranges: list[tuple[str, int, int | None]] = []

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """See `Store`."""
        self.ranges.append((key, start, end))
        return super().read(key, start, end)


SPANS = [(0, range(1448, 1512)), (0, range(1512, 1576)), (1, range(64, 128)), (0, range(64))]


def test_parts_around_the_spans_are_read() -> None:
    """Spans may touch or overlap, and begin or end outside of the range."""
    ignored = IgnoredTokens([*SPANS, (0, range(1500, 1530))])
    assert list(ignored.intact(0, range(1400, 1600))) == [range(1400, 1448), range(1576, 1600)]
    assert list(ignored.intact(0, range(1450, 1570))) == []
    assert list(ignored.intact(0, range(10, 80))) == [range(64, 80)]
    assert list(ignored.intact(1, range(65))) == [range(64)]
    assert list(ignored.intact(2, range(5, 9))) == [range(5, 9)]
    touched = [ignored.touch(0, range(start, start + 8)) for start in (56, 64, 1440, 1441, 1576)]
    assert touched == [True, False, False, True, False]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("sequence_length", [7, 100, 999])
def test_windows_are_those_of_whole_data_but_for_the_spans(
    prepared: Prepared, tmp_path: Path, remote: bool, sequence_length: int
) -> None:
    """A row that touches a damaged block has its other tokens, and a damaged block that is left out is not read."""
    copied = copy_of(prepared, tmp_path / "data")
    for source, span in SPANS:
        shards = shards_of(copied, source, "train")
        number, place = divmod(span.start, 1000)
        path = copied.root / shards[number].key
        data = bytearray(path.read_bytes())
        data[2 * place] ^= 1
        path.write_bytes(data)
    store = RecordingStore(in_memory(copied, "ignored")) if remote else copied.store
    cache = cache_at(tmp_path / "cache")
    reader = TokenReader(copied.manifest, store, cache=cache, ignored=SPANS)
    for source in (0, 1):
        expected = stream_of(prepared, source).astype(np.int64)
        for of, span in SPANS:
            if of == source:
                expected[span.start : span.stop] = ~copied.manifest.end_token_id
        rows = [(source, row) for row in range((len(expected) - 1) // sequence_length)]
        reader.expect(rows, sequence_length)
        for (_, row), window in zip(rows, reader.windows(rows, sequence_length), strict=True):
            start = row * sequence_length
            np.testing.assert_array_equal(window, expected[start : start + sequence_length + 1])
    if isinstance(store, RecordingStore):
        for source, span in SPANS:
            number, place = divmod(span.start, 1000)
            key = shards_of(copied, source, "train")[number].key
            ranges = [(start, end) for of, start, end in store.ranges if of == key]
            assert ranges
            for start, end in ranges:
                assert end is not None
                assert end <= 2 * place or start >= 2 * (place + len(span))
    with pytest.raises(DamagedBlock, match="rows second:"):
        TokenReader(copied.manifest, store, cache=cache, ignored=SPANS[:2]).windows([(1, 0)], 100)
    reader.close()


def test_left_out_token_is_an_end_token_without_a_target() -> None:
    """The input is the end of a document; the target does not count. Other tokens keep their bits."""
    tokens = torch.tensor([[5, ~3, ~3, 0, 7]])
    inputs, targets = inputs_and_targets(tokens, ignored=-100)
    assert inputs.tolist() == [[5, 3, 3, 0]]
    assert targets.tolist() == [[-100, -100, 0, 7]]
    assert targets.is_contiguous()
