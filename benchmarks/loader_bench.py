"""What `benchmarks/loader.py` starts before it measures: the corpus, the servers, and the processes of the readers.

The peers run in `services/loader-venv`, which sees the packages of this environment behind its own.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.loader_process import MICRO_BATCH, Case
from benchmarks.loader_servers import COUNTER_BYTES, MADE_UP_URL, manifest_of
from benchmarks.s3_server import bucket
from elastic_pt.chaos.servers import free_port, listens, start, stop, wait_until
from elastic_pt.data.shard_writer import ShardWriter
from elastic_pt.store.open import open_store

PEERS: Final = ("torch", "grain", "mosaic")
ROOT: Final = Path(__file__).resolve().parent.parent
ROWS: Final = 16 * MICRO_BATCH
"""Of each batch: 16 slots."""
NODES: Final = 4
TB_NODES: Final = 32
"""Nodes of a step, of which a process is one: of the corpus, and of 10^12 bytes."""
WINDOW_TOKENS: Final = 2**30
TB_BYTES: Final = 10**12
TB_CACHE_BYTES: Final = 256 * 2**20
_PEER_PACKAGES: Final = (
    ("grain==0.2.18",),
    # Without its own requirements: it wants older packages than this environment has, and the clients of six clouds.
    ("--no-deps", "mosaicml-streaming==0.13.0"),
    ("Brotli", "python-snappy", "zstd", "tqdm", "xxhash", "catalogue", "boto3"),
)
_VENV: Final = ROOT / "services" / "loader-venv"
_ANSWER_S: Final = 300.0
_SAMPLE_S: Final = 0.25
"""Sampling takes processor time from the reader."""
_START_S: Final = 60.0
_STARTED_S: Final = time.monotonic()


class Reading:
    """A process that reads one case, and answers commands."""

    def __init__(self, case: Case, endpoint: str, log: Path) -> None:
        self.case = case
        self.error = ""
        self.chosen: dict[str, Any] = {}
        """What `prepare` found."""
        self.answers: list[dict[str, Any]] = []
        """Of the rounds."""
        python = str(_VENV / "bin" / "python") if case.reader in PEERS else sys.executable
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        # Mosaic leaves files in the directory for temporary files.
        environment |= {"TMPDIR": str(log.parent)}
        if endpoint:
            environment |= {"AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint}
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [python, "-m", "benchmarks.loader_process", json.dumps(asdict(case))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    env=environment,
                    cwd=ROOT,
                )
        except FileNotFoundError:
            self.error = "services/loader-venv is missing; expected a run without --quick before"

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Do something and wait for the answer. Empty after an error."""
        if self._process is None or self.error:
            return {}
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        line = b""
        with suppress(OSError):
            requests.write(json.dumps({"do": do, **command}).encode() + b"\n")
            requests.flush()
            if select.select([replies], [], [], _ANSWER_S)[0]:
                line = replies.readline()
        answer: dict[str, Any] = json.loads(line or '{"error": "no answer"}')
        if "error" in answer:
            self.error = answer["error"]
            tell(f"{self.case.reader}, {do}: {self.error}")
            return {}
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Server:
    """Where the data of a case is, and how many bytes were fetched."""

    url: str
    endpoint: str = ""
    counter: Path | None = None

    @property
    def count(self) -> int:
        """Bytes of all answers until now."""
        return int.from_bytes(self.counter.read_bytes(), sys.byteorder) if self.counter else 0


@dataclass
class Bench:
    """What all measurements share."""

    home: Path
    tokens: int
    """Of the corpus."""
    sequence_length: int
    quick: bool
    servers: dict[str, Server] = field(default_factory=dict)
    """By case."""
    mosaic_url: str = ""
    readings: dict[tuple[str, str], Reading] = field(default_factory=dict)
    """By name and case."""
    _caches: int = 0

    @property
    def raw(self) -> Path:
        """One file with the ids of the corpus."""
        return self.home / "corpus.bin"

    @property
    def mosaic(self) -> Path:
        """The rows of the corpus in Mosaic's format."""
        return self.home / "mosaic"

    def batch(self, case: str) -> int:
        """Rows of a step."""
        return ROWS * (TB_NODES if case.startswith("tb") else NODES)

    def steps(self, case: str) -> int:
        """Steps of a round of ours: an epoch, or three times the window."""
        tokens = 3 * WINDOW_TOKENS if case.startswith("tb") else self.tokens - 1
        if self.quick:
            tokens = min(tokens, 4 * self.batch(case) * self.sequence_length)
        return tokens // self.sequence_length // self.batch(case)

    def open(self, name: str, case: str, reader: str, url: str = "", *, order: int = 2) -> Reading:
        """Start the process of a reader."""
        server = self.servers[case]
        settings = Case(
            reader,
            url or server.url,
            self.sequence_length,
            ROWS,
            order=order,
            global_batch=self.batch(case),
            window_tokens=WINDOW_TOKENS,
            cache_bytes=TB_CACHE_BYTES if case.startswith("tb") else 3 * self.tokens,
        )
        reading = Reading(settings, server.endpoint, self.home / "readers.log")
        self.readings[name, case] = reading
        return reading

    def close(self) -> None:
        """End the processes."""
        for each in self.readings.values():
            each.close()

    @contextmanager
    def cache(self) -> Iterator[Path]:
        """An empty directory."""
        self._caches += 1
        path = self.home / f"cache-{self._caches}"
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def peak_bytes(directory: Path) -> Iterator[list[int]]:
    """Sample the allocated bytes of a directory. At the end, the list has the largest sum."""
    ended, found = threading.Event(), [0]

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            found[0] = max(found[0], allocated_bytes(directory))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def allocated_bytes(directory: Path) -> int:
    """What the files of a directory take on the disk, while they come and go."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in (".", *names):
            with suppress(OSError):
                total += 512 * os.lstat(os.path.join(parent, name)).st_blocks
    return total


def install_peers() -> None:
    """Create the peers' environment if there is none. What cannot be installed has an error later."""
    if _VENV.exists():
        return
    tell("installing the peers into services/loader-venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(_VENV)], check=True)
    python = str(_VENV / "bin" / "python")
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(purelib) / "venv.pth").write_text(line, encoding="utf-8")
    for packages in _PEER_PACKAGES:
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*install, *constraints, *packages], check=False)


def write_corpus(bench: Bench) -> None:
    """Random ids, as prepared data of this machine and as one file."""
    generator = np.random.default_rng(0)
    local = bench.home / "local"
    store = open_store(f"file://{local}")
    writer = ShardWriter(store, "text", "train", "uint16")
    with bench.raw.open("wb") as raw:
        for start in range(0, bench.tokens, 2**25):
            count = min(2**25, bench.tokens - start)
            ids = generator.integers(2**16, size=count, dtype=np.uint16)
            raw.write(ids.tobytes())
            writer.add(ids)
    store.write("manifest.json", manifest_of(writer.close()).to_json())
    bench.servers["local"] = Server(f"file://{local}")


def start_servers(bench: Bench, server: str, stack: ExitStack) -> None:
    """The bucket with the corpus, the made-up data, and a proxy for each case."""
    url = stack.enter_context(bucket(server))
    bench.mosaic_url = f"{url}/mosaic"
    store = open_store(f"{url}/data")
    for path in (bench.home / "local").rglob("*"):
        if path.is_file():
            store.write(str(path.relative_to(bench.home / "local")), path)
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    tokens = 2**26 if bench.quick else TB_BYTES // 2
    made_up = _start(bench, stack, "made-up", str(tokens))
    for case, upstream, delay_ms, data in (
        ("s3_0ms", port, 0, f"{url}/data"),
        ("s3_30ms", port, 30, f"{url}/data"),
        ("tb_30ms", made_up, 30, MADE_UP_URL),
    ):
        counter = bench.home / f"{case}.count"
        counter.write_bytes(bytes(COUNTER_BYTES))
        proxy = _start(bench, stack, "proxy", str(upstream), str(delay_ms), str(counter))
        bench.servers[case] = Server(data, f"http://127.0.0.1:{proxy}", counter)


def _start(bench: Bench, stack: ExitStack, what: str, *arguments: str) -> int:
    """Start a server. Its port."""
    port, log = free_port(), bench.home / f"{what}.log"
    command = [sys.executable, "-m", "benchmarks.loader_servers", what, str(port), *arguments]
    process = start(command, log, {**os.environ, "PYTHONPATH": str(ROOT)})
    stack.callback(stop, process, 5.0)
    wait_until(what, lambda: listens(port), _START_S, log)
    return port


def start_mosaic(bench: Bench) -> None:
    """Write the corpus as Mosaic wants it, and a part of it, as large as a node's share, into the bucket."""
    local = bench.open("mosaic", "local", "mosaic", str(bench.mosaic))
    local.ask("write", raw=str(bench.raw), parts=NODES)
    store = open_store(bench.mosaic_url)
    for path in (bench.mosaic / "0").glob("*"):
        store.write(f"0/{path.name}", path)
    for case in ("s3_0ms", "s3_30ms"):
        reading = bench.open("mosaic", case, "mosaic", bench.mosaic_url)
        reading.error = local.error


def tell(line: str) -> None:
    """Print the progress."""
    print(f"{time.monotonic() - _STARTED_S:5.0f} s  {line}", file=sys.stderr, flush=True)
