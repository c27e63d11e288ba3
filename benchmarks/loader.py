"""How fast tokens are read: by this project, torch's DataLoader, Grain and Mosaic's streaming, all in one run.

    python benchmarks/loader.py --json loader.json
    python benchmarks/loader.py --quick               a small corpus, one round

Each reader is a process of its own and delivers int64 batches of the same shape, [128, sequence_length + 1], of rows of the same corpus in a
random order. The rounds alternate, and values are medians. The page cache is warm. 128 rows are 16 of 64 slots: one node of 4.

    local     files of this machine. The reader of ours has verified them before; `tokens_per_s_first_use` is the first time
    s3_0ms    a real S3 server, through a proxy that counts bytes. The cache is empty; a node reads its share of an epoch
    s3_30ms   the same. The proxy delays each request by 30 ms, and does not limit the rate
    tb_30ms   10^12 bytes that a server makes up, with the same delay: one node of 32 reads three times its share of the window

`first_batch_s` begins before the store is opened. `seek_ms` is the time to the first batch of any step with an empty cache. Beside it are
`fetch_ms`, plain reads of the blocks of the same batch by the same client, hashed, and `fetch_block_ms`, that of one of them.
`plain_range_reads` are range reads of as many bytes, with the best of a few sizes and numbers of requests.

`read_amplification` is what the proxy counted, divided by the bytes of the rows that were read. That by node count is for a whole epoch, in
the worst of some nodes. The peak of the cache is sampled from outside (allocated bytes). `rss_bytes` is the peak of the process and its
children.

The peers' values are null where they do not read from S3 themselves. Mosaic reads a data set as large as a node's share from S3. The peers are
installed into `services/loader-venv` (not with `--quick`); one that does not work has an `error`.
"""

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

# If this file is run as a script, Python searches modules in its folder. The imports start at the root of the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.loader_bench import (
    NODES,
    PEERS,
    ROWS,
    TB_NODES,
    WINDOW_TOKENS,
    Bench,
    install_peers,
    peak_bytes,
    start_mosaic,
    start_servers,
    tell,
    write_corpus,
)
from benchmarks.s3_server import default_server
from benchmarks.summary import exit_on_sigterm, machine, print_targets, write_json
from elastic_pt.chaos.ceph import missing_for_ceph

CASES: Final = ("local", "s3_0ms", "s3_30ms", "tb_30ms")
REMOTE: Final = CASES[1:]
VALUES: Final = (
    *("tokens_per_s", "first_batch_s", "seek_ms"),
    *("read_amplification", "cache_bytes_peak", "rss_bytes"),
)
NODE_COUNTS: Final = (1, 4, 16)
FOREVER: Final = 2**40
"""More steps than a round has time for."""
MEMORY_BYTES: Final = 512 * 2**20
"""What a process may take above its start: 256 MiB of requests in flight, and the batches that are read ahead."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus-gb", type=float, default=1.0)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server", choices=("moto", "ceph"))
    parser.add_argument("--quick", action="store_true", help="0.02 GB, some steps, one round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.corpus_gb, options.rounds = 0.02, 1
    if options.server is None:
        options.server = "moto" if options.quick or missing_for_ceph() else "ceph"
    if options.server == "moto" and default_server() != "moto":
        parser.error("there is no S3 server; expected `make services` before")
    return options


def open_readers(bench: Bench) -> None:
    """Start the process of each reader in each case, and choose the settings of the peers."""
    seconds = 0.2 if bench.quick else 0.6
    bench.open("ours", "local", "ours")
    bench.open("ours_order_1", "local", "ours", order=1)
    for case in REMOTE:
        bench.open("ours", case, "ours")
        bench.open("plain", case, "plain")
    for peer in ("torch", "grain"):
        bench.open(peer, "local", peer, str(bench.raw))
    start_mosaic(bench)
    for (name, case), reading in bench.readings.items():
        if name in ("plain", *PEERS):
            # Mosaic from S3 without workers: with them it fails now and then.
            known = {"num_workers": 0} if name == "mosaic" and case != "local" else None
            reading.chosen = reading.ask("prepare", seconds=seconds, settings=known)
            tell(f"{name}, {case}: {reading.chosen.get('settings')}")


def read(bench: Bench, name: str, case: str, cache: Path, **command: Any) -> dict[str, Any]:
    """Let a reader read, with its fetched bytes and the peak of its cache."""
    reading, server = bench.readings[name, case], bench.servers[case]
    before = server.count
    with peak_bytes(cache) as peak:
        answer = reading.ask("read", cache=str(cache), **command)
    if answer and name not in ("torch", "grain"):
        answer["cache_bytes_peak"] = peak[0]
        if case != "local":
            answer["read_amplification"] = (server.count - before) / (2 * answer["tokens"])
    return answer


def read_once(bench: Bench, name: str, case: str, number: int, local: Path) -> dict[str, Any]:
    """A reader's part of a round. `local`: the cache that stays, of verified local files."""
    batch, steps = bench.batch(case), bench.steps(case)
    nodes = batch // ROWS
    seconds = 0.3 if bench.quick else 1.2
    if name == "plain":
        count = 2 * steps * ROWS * bench.sequence_length
        settings = bench.readings[name, case].chosen["settings"]
        return bench.readings[name, case].ask("read", count=count, **settings)
    if case == "local" and name not in PEERS:
        where = {"node": number % NODES, "nodes": NODES, "steps": [number, FOREVER]}
        return read(bench, name, case, local / name, seconds=seconds, **where)
    with bench.cache() as cache:
        if name in PEERS:
            limit = seconds if case == "local" or bench.quick else None
            return read(bench, name, case, cache, seconds=limit)
        # Somewhere else in each round, as the page cache of the server is warm for what was read before.
        first = number * steps * 100 if case.startswith("tb") and not bench.quick else 0
        where = {"node": number % nodes, "nodes": nodes, "steps": [first, first + steps]}
        return read(bench, name, case, cache, **where)


def run_rounds(bench: Bench, rounds: int, local: Path) -> None:
    """All readers of a case after each other, each round in the other direction."""
    for number in range(rounds):
        order = list(bench.readings)
        for name, case in order if number % 2 else order[::-1]:
            reading = bench.readings[name, case]
            if answer := read_once(bench, name, case, number, local):
                reading.answers.append(answer)
                tell(f"{number + 1}: {name}, {case}: {answer['tokens_per_s'] / 1e6:.0f} Mtok/s")


def verify_local(bench: Bench, local: Path) -> dict[str, float]:
    """Read all local rows once, so that the rounds find them verified. Tokens per second of ours by name."""
    found = {}
    for name in ("ours", "ours_order_1"):
        (local / name).mkdir(mode=0o700)
        answers = [
            read(
                bench,
                name,
                "local",
                local / name,
                node=node,
                nodes=NODES,
                steps=[0, bench.steps("local")],
            )
            for node in range(NODES)
        ]
        found[name] = statistics.median(each.get("tokens_per_s", 0.0) for each in answers)
    return found


def run_seeks(bench: Bench) -> dict[tuple[str, str], dict[str, Any]]:
    """Each reader's seeks, by name and case."""
    found = {}
    for (name, case), reading in bench.readings.items():
        if name != "plain":
            threads = bench.readings["plain", case].chosen if case in REMOTE else {}
            count = 1 if bench.quick else 3 if name == "mosaic" else 7
            command = {"threads": threads.get("settings", {}).get("threads", 2)}
            with bench.cache() as cache:
                found[name, case] = reading.ask(
                    "seek", count=count, seed=1, cache=str(cache), **command
                )
    return found


def amplification(bench: Bench) -> dict[str, float | None]:
    """What a node fetches in an epoch, divided by what its slots use, by node count: the worst of up to four nodes."""
    found: dict[str, float | None] = {}
    for nodes in NODE_COUNTS:
        # The nodes of the rounds are known already.
        answers = list(bench.readings["ours", "s3_0ms"].answers) if nodes == NODES else []
        for node in [] if answers else range(0, nodes, max(1, nodes // 4)):
            where = {"node": node, "nodes": nodes, "steps": [0, bench.steps("s3_0ms")]}
            with bench.cache() as cache:
                answers.append(read(bench, "ours", "s3_0ms", cache, **where))
        values = [float(each.get("read_amplification", "inf")) for each in answers]
        found[str(nodes)] = None if max(values) == float("inf") else round(max(values), 3)
        tell(f"{nodes} nodes: read amplification {found[str(nodes)]}")
    return found


def values_of(bench: Bench, name: str, case: str, seeks: dict[str, Any]) -> dict[str, Any] | None:
    """The values of one reader in one case; None if it does not read there."""
    reading = bench.readings.get((name, case))
    if reading is None:
        return None
    if not reading.answers:
        return {"error": reading.error or "no answer"}
    answers: list[dict[str, Any]] = [
        {**each, "seek_ms": statistics.median(seeks["seek_ms"])} if seeks else each
        for each in reading.answers
    ]
    found: dict[str, Any] = dict.fromkeys(VALUES)
    for value in VALUES:
        if given := [each[value] for each in answers if each.get(value) is not None]:
            middle = max(given) if value.endswith("_bytes") or "peak" in value else None
            found[value] = _rounded(statistics.median(given) if middle is None else middle)
    found["first_batch_s_worst"] = _rounded(max(each["first_batch_s"] for each in answers))
    found["rss_start_bytes"] = answers[0]["rss_start_bytes"]
    for value in ("fetch_ms", "fetch_block_ms"):
        if value in seeks:
            found[value] = _rounded(statistics.median(seeks[value]))
    if "fetch_ms" in seeks:
        pairs = zip(seeks["seek_ms"], seeks["fetch_ms"], strict=True)
        found["seek_over_fetch_ms"] = _rounded(statistics.median(a - b for a, b in pairs))
        found["cache_bytes_max"] = reading.case.cache_bytes
    if reading.chosen:
        found["settings"] = reading.chosen["settings"]
    return found


def ratio(bench: Bench, case: str, other: str) -> float | None:
    """The median of the ratios of each round: ours to another reader."""
    ours, theirs = (bench.readings[name, case].answers for name in ("ours", other))
    ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours, theirs, strict=False)]
    return round(statistics.median(ratios), 3) if ratios else None


def judge(report: dict[str, Any]) -> dict[str, bool]:
    """Whether each target is met."""
    ours, ratios = report["ours"], report["ratios"]
    least = {"local_to_best_peer": 1.0} | {f"{case}_to_plain_range_reads": 0.8 for case in REMOTE}
    found = {f"{name} >= {limit}": (ratios[name] or 0) >= limit for name, limit in least.items()}
    for case in CASES:
        values = ours[case]
        if "error" in values:
            found[f"{case}: works"] = False
            continue
        found[f"{case}: first batch <= 1 s"] = values["first_batch_s"] <= 1
        found[f"{case}: seek <= 5 ms + one fetch"] = (
            values.get("seek_over_fetch_ms", float("inf")) <= 5
        )
        if case != "local":
            within = values["cache_bytes_peak"] <= values["cache_bytes_max"]
            found[f"{case}: cache within {values['cache_bytes_max'] / 1e6:.0f} MB"] = within
            grown = values["rss_bytes"] - values["rss_start_bytes"]
            found[f"{case}: memory within {MEMORY_BYTES >> 20} MiB"] = grown <= MEMORY_BYTES
    for nodes, value in report["read_amplification_by_nodes"].items():
        found[f"read amplification of {nodes} nodes <= 1.5"] = (value or 9e9) <= 1.5
    found["manifest of 1 TB <= 1 MB"] = report["tb_manifest_bytes"] <= 10**6
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as the report."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-")))
        tokens = round(options.corpus_gb * 5e8)
        bench = Bench(home, tokens, options.sequence_length, options.quick)
        write_corpus(bench)
        start_servers(bench, options.server, stack)
        stack.callback(bench.close)
        open_readers(bench)
        local = home / "verified"
        local.mkdir()
        first_use = verify_local(bench, local)
        run_rounds(bench, options.rounds, local)
        by_nodes = amplification(bench)
        seeks = run_seeks(bench)
        return report_of(bench, options, first_use, by_nodes, seeks)


def report_of(
    bench: Bench,
    options: argparse.Namespace,
    first_use: dict[str, float],
    by_nodes: dict[str, float | None],
    seeks: dict[tuple[str, str], dict[str, Any]],
) -> dict[str, Any]:
    """The JSON."""
    report: dict[str, Any] = {
        "machine": machine() | {"model": _model(), "versions": _versions()},
        "server": options.server,
        "corpus_bytes": 2 * bench.tokens,
        "shape": [ROWS, bench.sequence_length + 1],
        "window_tokens": WINDOW_TOKENS,
        "nodes": {"corpus": NODES, "tb": TB_NODES},
        "rounds": options.rounds,
    }
    for name in ("ours", "ours_order_1", *PEERS):
        cases = {
            "ours": CASES,
            "ours_order_1": ("local",),
        }.get(name, CASES[:3])
        report[name] = {
            case: values_of(bench, name, case, seeks.get((name, case), {})) for case in cases
        }
        if name in first_use:
            report[name]["local"]["tokens_per_s_first_use"] = _rounded(first_use[name])
    for peer in PEERS:
        if error := (report[peer]["local"] or {}).get("error"):
            report[peer]["error"] = error
    report["plain_range_reads"] = {}
    for case in REMOTE:
        reading = bench.readings["plain", case]
        speeds = [each["tokens_per_s"] for each in reading.answers] or [0.0]
        speed = statistics.median(speeds)
        report["plain_range_reads"][case] = {
            "tokens_per_s": _rounded(speed),
            "bytes_per_s": _rounded(2 * speed),
            "settings": reading.chosen.get("settings"),
            "tried": reading.chosen.get("tried"),
        }
    peers = {peer: (report[peer]["local"] or {}).get("tokens_per_s", 0) for peer in PEERS}
    report["best_peer"] = max(peers, key=lambda peer: peers[peer])
    report["ratios"] = {
        "local_to_best_peer": ratio(bench, "local", report["best_peer"]),
        **{f"{case}_to_plain_range_reads": ratio(bench, case, "plain") for case in REMOTE},
    }
    report["read_amplification_by_nodes"] = by_nodes
    report["tb_manifest_bytes"] = bench.readings["plain", "tb_30ms"].chosen.get("manifest_bytes", 0)
    report["targets"] = judge(report)
    return report


def _rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}") if value < 1e4 else round(value)


def _model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "numpy", "s3fs")}


def print_table(report: dict[str, Any]) -> None:
    """The values of all readers, one line per reader and case."""
    print(
        f"{report['server']}, {report['corpus_bytes'] / 1e9:g} GB, batches {report['shape']}\n"
        f"{'':26}{'Mtok/s':>9}{'first s':>9}{'seek ms':>9}{'fetch ms':>9}{'read x':>8}{'cache MB':>10}{'RSS MB':>8}"
    )

    def cell(value: float | None, unit: float, digits: int, width: int) -> str:
        return f"{'-' if value is None else f'{value / unit:.{digits}f}':>{width}}"

    for name in ("ours", "ours_order_1", *PEERS):
        for case, values in report[name].items():
            if not isinstance(values, dict):
                continue
            line = f"{name + ', ' + case:26}"
            if "error" in values:
                print(f"{line}  {values['error'][:80]}")
                continue
            line += cell(values["tokens_per_s"], 1e6, 1, 9)
            line += cell(values["first_batch_s"], 1, 3, 9)
            line += cell(values["seek_ms"], 1, 1, 9)
            line += cell(values.get("fetch_ms"), 1, 1, 9)
            line += cell(values["read_amplification"], 1, 2, 8)
            line += cell(values["cache_bytes_peak"], 1e6, 1, 10)
            print(line + cell(values["rss_bytes"], 1e6, 0, 8))
    for case, values in report["plain_range_reads"].items():
        print(f"{'plain, ' + case:26}{values['tokens_per_s'] / 1e6:9.1f}  {values['settings']}")
    print(f"best peer: {report['best_peer']}; ratios: {report['ratios']}")
    print(f"read amplification by nodes: {report['read_amplification_by_nodes']}")


def main() -> None:
    """Measure, print and write."""
    exit_on_sigterm()
    options = parse_arguments()
    if not options.quick:
        install_peers()
    report = measure(options)
    print_table(report)
    print_targets(report["targets"])
    write_json(options.json, report)


if __name__ == "__main__":
    main()
