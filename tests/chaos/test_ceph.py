"""A Ceph for whole runs: a bucket and a user for each run."""

import os
import subprocess
import sys
import uuid

import pytest

from elastic_pt.chaos.ceph import Ceph

pytestmark = pytest.mark.ceph

USE = """
import sys
from elastic_pt.errors import AccessDenied
from elastic_pt.store.open import open_store
for url in sys.argv[1:]:
    try:
        open_store(url + "/run", timeout_s=10.0).write("x", b"1")
        print("written")
    except AccessDenied:
        print("denied")
"""


def test_credentials_of_a_run_open_its_bucket_only(ceph: Ceph) -> None:
    """An agent gets the variables of one bucket, none of the user's own, and is refused by the others."""
    mine, theirs = (ceph.create_bucket(f"run-{uuid.uuid4().hex[:8]}") for _ in range(2))
    own = {**os.environ, "AWS_PROFILE": "mine", "AWS_SESSION_TOKEN": "old"}
    environment = mine.environment(own)
    assert not {"AWS_PROFILE", "AWS_SESSION_TOKEN"} & environment.keys()
    command = [sys.executable, "-c", USE, mine.url, theirs.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["written", "denied"]
    through = mine.environment(own, endpoint="http://10.77.0.254:1")
    assert through["AWS_ENDPOINT_URL"] == "http://10.77.0.254:1"
