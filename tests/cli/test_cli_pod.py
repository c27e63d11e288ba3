"""What the chart's pods run, as real agents on this machine: the same arguments, with a pod's variables filled in."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from command_line import CONFIG, STEPS, Trained, elastic_pt

from elastic_pt.chaos.servers import free_port
from tests.deploy.rendered import agent_of, chart, config_of, job_of, options_of

WAIT_S = 120.0


def test_a_pod_that_was_told_to_leave_is_not_done(
    prepared: Trained, trained: Trained, tmp_path: Path
) -> None:
    """After SIGTERM the Job has to start the index again; its next pod is the same node, completes the run, and is done."""
    url = tmp_path / "run"
    found = chart({"configToml": CONFIG.format(run=url, data=prepared.data)}, platform="gke")
    agent = agent_of(found)
    mounts = {each["name"]: each["mountPath"] for each in agent["volumeMounts"]}
    (tmp_path / "config.toml").write_text(config_of(found))
    variables = {"JOB_NAME": job_of(found)["metadata"]["name"], "INDEX": "3", "POD_IP": "127.0.0.1"}
    assert variables.keys() == {each["name"] for each in agent["env"]}
    arguments = [
        re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], each)
        .replace(mounts["config"], str(tmp_path))
        .replace("metrics_port=9400", f"metrics_port={free_port()}")
        for each in agent["args"]
    ]
    assert options_of(agent, "--set")

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "elastic_pt", *arguments],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    pods = [start()]
    try:
        deadline_s = time.monotonic() + WAIT_S
        while not list(url.glob("ckpt/*/manifest.json")):
            assert time.monotonic() < deadline_s, (tmp_path / "log").read_text()
            time.sleep(0.02)
        pods[0].send_signal(signal.SIGTERM)
        assert pods[0].wait(WAIT_S) == 143, (tmp_path / "log").read_text()
        assert elastic_pt("status", url, "--json").json["state"] == "down"
        pods.append(start())
        assert pods[1].wait(WAIT_S) == 0, (tmp_path / "log").read_text()
    finally:
        for pod in pods:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
                pod.wait()
    status = elastic_pt("status", url, "--json").json
    assert (status["state"], status["step"]) == ("completed", STEPS)
    assert "elastic-pt-3" in elastic_pt("log", url).out
    assert elastic_pt("digest", url).out == elastic_pt("digest", trained.root / "run").out
