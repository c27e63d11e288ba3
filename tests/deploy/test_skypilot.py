"""deploy/skypilot/node.yaml: SkyPilot's own parser accepts it for several clouds, and its `run` section trains for real."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import tomlkit
import yaml

from elastic_pt.chaos.small_run import small_run
from elastic_pt.errors import CheckpointError, ConfigError, NodeFailure, RunFailed
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import COMPLETED
from elastic_pt.store.open import open_store
from tests.deploy.real_runs import elastic_pt, prepare

ROOT: Final = Path(__file__).parents[2]
TASK: Final = ROOT / "deploy" / "skypilot" / "node.yaml"
PAGE: Final = ROOT / "docs" / "deployment" / "skypilot.md"
WAIT_S: Final = 120.0
PARSE: Final = """
import json, sys
import sky
from sky.client.cli import command

def told_of(task):
    return {
        "nodes": task.num_nodes, "workdir": task.workdir, "run": task.run, "envs": task.envs,
        "resources": [
            {
                "cloud": str(each.cloud).lower(), "region": each.region, "zone": each.zone, "spot": each.use_spot,
                "ports": each.ports, "recovery": each.job_recovery,
            }
            for each in task.resources
        ],
    }

file, *configs = sys.argv[1:]
tasks = [sky.Task.from_yaml(file), *map(sky.Task.from_yaml_config, map(json.loads, configs))]
options = [option for each in command.jobs_launch.params for option in each.opts]
print("told:" + json.dumps({"options": options, "tasks": list(map(told_of, tasks))}))
"""


def task() -> dict[str, Any]:
    """The file, as YAML."""
    found: dict[str, Any] = yaml.safe_load(TASK.read_text())
    return found


def parsed(python: str, home: Path, *configs: Mapping[str, Any]) -> dict[str, Any]:
    """What SkyPilot reads in the file, and in changed ones."""
    variables = {"HOME": str(home), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [python, "-c", PARSE, str(TASK), *map(json.dumps, configs)],
        cwd=ROOT,
        env=variables | {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.partition("told:")[2])
    return found


def places_of_page() -> list[list[dict[str, str]]]:
    """The lists of places that the page shows, in the form of `any_of`."""
    found = re.findall(r"`any_of: (\[.*?\])`", PAGE.read_text())
    return [yaml.safe_load(each) for each in found]


def test_skypilot_reads_one_spot_machine_for_each_cloud(clouds_python: str, tmp_path: Path) -> None:
    """A job is one node on a spot machine, also with the page's other places. Catalogs need the internet: not compared."""
    places = [*places_of_page(), [{"infra": "azure/eastus"}], [{"infra": "kubernetes"}]]
    configs = [task() | {"resources": task()["resources"] | {"any_of": each}} for each in places]
    found = parsed(clouds_python, tmp_path, *configs)
    codes = [NodeFailure.exit_code, 128 + signal.SIGALRM, 128 + signal.SIGTERM]
    for read, infras in zip(found["tasks"], [task()["resources"]["any_of"], *places], strict=True):
        assert (read["nodes"], read["workdir"], read["run"]) == (1, ".", task()["run"])
        read_places = {
            "/".join(part for part in (each["cloud"], each["region"], each["zone"]) if part)
            for each in read["resources"]
        }
        assert read_places == {each["infra"] for each in infras}
        for each in read["resources"]:
            assert each["spot"] is True
            # They would give each job a security group of its own.
            assert each["ports"] is None
            assert each["recovery"]["recover_on_exit_codes"] == codes
            assert each["recovery"]["max_restarts_on_errors"] == 0
    assert {each["cloud"] for read in found["tasks"] for each in read["resources"]} >= {
        "aws",
        "gcp",
    }
    launched = re.findall(r"^.*\bsky jobs launch (.*)$", PAGE.read_text() + TASK.read_text(), re.M)
    used = {word for each in launched for word in re.findall(r"(?<=\s)--?[a-z-]+", f" {each}")}
    assert {"-n", "--env", "--infra", "--gpus"} <= used <= set(found["options"])


@dataclass
class Machine:
    """What SkyPilot gives a job: a home with the result of `setup`, the work directory, and its variables."""

    home: Path
    workdir: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    program: str = ""
    """The text of another `elastic-pt`; empty: this one."""

    def __post_init__(self) -> None:
        programs = self.home / "elastic-pt" / "bin"
        programs.mkdir(parents=True)
        ours = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m elastic_pt "$@"\n'
        for name, text in {
            "elastic-pt": self.program or ours,
            # Pauses take no time here, and are told.
            "sleep": '#!/bin/sh\necho "pause $1" >&2\n',
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)

    def start(self) -> subprocess.Popen[str]:
        """Run the `run` section, as SkyPilot does: a script of an interactive bash, in a session of its own."""
        script = self.home / "run.sh"
        given = {name: str(value) for name, value in task()["envs"].items()}
        script.write_text("#!/bin/bash\n" + task()["run"])
        return subprocess.Popen(
            ["/bin/bash", "--norc", "-i", str(script)],
            cwd=self.workdir,
            env={**os.environ, **given, "HOME": str(self.home), **self.variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.mark.parametrize(
    ("codes", "state", "ends", "pauses"),
    [
        ([0], "completed", 0, []),
        ([0], "running", 143, []),
        ([ConfigError.exit_code], "", 2, []),
        ([CheckpointError.exit_code], "", 4, []),
        ([RunFailed.exit_code], "", 7, []),
        ([NodeFailure.exit_code], "", 6, []),
        ([130], "", 143, []),
        ([143], "", 143, []),
        ([142], "", 142, []),
        ([3, 5, 8, 137, 1, 3, 3, 3, 0], "completed", 0, [5, 10, 20, 40, 80, 160, 300, 300]),
    ],
)
def test_exit_codes_become_those_that_skypilot_recovers_from(
    tmp_path: Path, codes: list[int], state: str, ends: int, pauses: list[int]
) -> None:
    """A node that had to leave goes on elsewhere, what a restart may help is restarted here, and a mistake ends the job."""
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    program = f"""#!/bin/sh
case $1 in
run) code=$(head -n 1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes; exit "$code" ;;
config) echo '{{"run": {{"url": "s3://bucket/run"}}}}' ;;
status) [ "$2" = s3://bucket/run ] && echo ' "state": "{state}",' ;;
esac
"""
    job = Machine(tmp_path / "home", tmp_path, program=program).start()
    told = job.communicate(timeout=WAIT_S)[0]
    assert job.returncode == ends, told
    assert [int(each) for each in re.findall(r"pause (\d+)", told)] == pauses
    assert (tmp_path / "codes").read_text() == ""


def test_jobs_train_lose_a_machine_and_leave(tmp_path: Path) -> None:
    """Two jobs train one run. One machine is lost, one node is told to leave: SkyPilot runs both again, and the run completes."""
    prepare(tmp_path / "texts", f"file://{tmp_path}/data")
    # With one node the run waits for the other, so it is not over before SkyPilot has brought it back.
    for name, nodes in (("run", 2), ("quiet", 1)):
        more = {"elastic": {"nodes_min": nodes, "nodes_max": nodes}}
        tree = small_run(f"file://{tmp_path}/{name}", f"file://{tmp_path}/data", more)
        (tmp_path / f"{name}.toml").write_text(tomlkit.dumps(tree))
    run_log = RunLog(open_store(f"file://{tmp_path}/run"), writer="test")
    where = json.dumps({"cloud": "AWS", "region": "us-east-1", "zone": "us-east-1a"})
    machines = [
        Machine(tmp_path / "one", tmp_path, {"NODE": "first-0", "SKYPILOT_CLUSTER_INFO": where}),
        Machine(tmp_path / "two", tmp_path, {"SKYPILOT_TASK_ID": "sky-managed-1-0"}),
    ]
    with ExitStack() as stack:

        def start(machine: Machine) -> subprocess.Popen[str]:
            job = machine.start()
            stack.callback(lose, job)
            return job

        def generation() -> int:
            return run_log.refresh().generation_number

        first, second = map(start, machines)
        wait_for(lambda: run_log.refresh().committed_step >= 6)
        lose(second)
        before = generation()
        second = start(machines[1])
        wait_for(lambda: generation() > before)
        newest = run_log.view.generation
        assert newest is not None
        nodes = {each.node: each for each in newest.members}
        assert nodes.keys() == {"first-0", "sky-managed-1-0"}
        assert nodes["first-0"].zone == "us-east-1a"
        os.kill(nodes["first-0"].pid, signal.SIGTERM)
        told = first.communicate(timeout=WAIT_S)[0]
        assert first.returncode == 128 + signal.SIGTERM, told
        first = start(machines[0])
        for job in (first, second):
            told = job.communicate(timeout=WAIT_S)[0]
            assert job.returncode == 0, told
    stop = run_log.refresh().stop
    assert stop is not None
    assert stop.reason == COMPLETED
    elastic_pt("local", tmp_path / "quiet.toml", "--nodes", 1)
    digests = [elastic_pt("digest", tmp_path / name, "--json") for name in ("run", "quiet")]
    assert digests[0] == digests[1]


def lose(job: subprocess.Popen[str]) -> None:
    """The job's machine is gone: SIGKILL to all processes of its session."""
    for each in Path("/proc").glob("[0-9]*"):
        try:
            session = int((each / "stat").read_text().rpartition(")")[2].split()[3])
        except (OSError, ValueError):
            continue
        if session == job.pid:
            os.kill(int(each.name), signal.SIGKILL)
    job.wait()
    if job.stdout is not None:
        job.stdout.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; fail after `WAIT_S`."""
    give_up_at_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_at_s
        time.sleep(0.05)
