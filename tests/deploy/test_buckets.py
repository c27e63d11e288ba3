"""The files in deploy/buckets: the S3 ones give each role its rights, and no other, on a real Ceph RGW."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import botocore.session
import pytest
import tomlkit
import yaml
from botocore.config import Config as ClientConfig
from botocore.exceptions import ClientError

from elastic_pt.chaos.bucket import Bucket
from elastic_pt.chaos.ceph import Ceph
from elastic_pt.chaos.small_run import small_run
from elastic_pt.checkpoint.retention import listed_directories
from elastic_pt.config import parse_config
from elastic_pt.doctor.bucket import rights
from elastic_pt.errors import AccessDenied
from elastic_pt.fleet.local import Fleet
from elastic_pt.runlog.access import AUTHORITY_KEY, TOKEN_KEY
from elastic_pt.runlog.log import RunLog
from elastic_pt.store.check import is_fenced, scratch_folder
from elastic_pt.store.open import open_store
from elastic_pt.store.port import KeepsUnfinished
from tests.deploy.real_runs import elastic_pt, prepare
from tests.services.fixtures import left_out, point_aws_at

ROOT: Final = Path(__file__).parents[2]
FILES: Final = ROOT / "deploy" / "buckets"
PAGE: Final = ROOT / "docs" / "deployment" / "buckets.md"
PREFIX: Final = "runs/first"
ROLES: Final = ("trainer", "collector", "reader", "operator")
WAIT_S: Final = 120.0

on_ceph = pytest.mark.ceph


def function_of_page(name: str) -> str:
    """A shell function as the page defines it."""
    found = re.search(
        rf"^    ({name}\(\) {{\n.*?^    }})$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    return found[1]


def block_of_page(begin: str, end: str) -> str:
    """Lines of shell of the page, from one that starts with `begin` to the first after it that has `end`."""
    _, found, rest = PAGE.read_text().partition(f"\n    {begin}")
    assert found, begin
    lines = (begin + rest).splitlines()
    last = next(number for number, line in enumerate(lines) if end in line)
    return "\n".join(line.removeprefix("    ") for line in lines[: last + 1])


def shell(script: str, **variables: str) -> str:
    """What a script of the page prints, called from the repository's root."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Site:
    """A bucket of an owner, with the four roles as users of the gateway."""

    ceph: Ceph
    owner: Bucket
    keys: Mapping[str, str]
    """The access key of each role. Its secret is the same with `-secret`."""

    @property
    def variables(self) -> dict[str, str]:
        """The variables of the page."""
        name = self.owner.name
        return {"BUCKET": name, "PREFIX": PREFIX, "DATA": f"{name}/data"}

    def filled(self, file: str) -> str:
        """A file of deploy/buckets, filled in as the page says."""
        script = f"{function_of_page('fill')}\nfill deploy/buckets/{file}"
        return shell(script, **self.variables)

    def login(self, role: str) -> tuple[str, str]:
        """The access key and the secret of a role, or of the owner."""
        if role == "owner":
            return self.owner.access_key, self.owner.secret_key
        return self.keys[role], f"{self.keys[role]}-secret"

    def client(self, role: str, service: str = "s3") -> Any:
        """A client with the credentials of a role, or of the owner."""
        key, secret = self.login(role)
        return botocore.session.get_session().create_client(
            service,
            region_name="us-east-1",
            endpoint_url=self.ceph.endpoint,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=ClientConfig(retries={"total_max_attempts": 1}),
        )

    def act_as(self, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give this process, and those that it starts, the credentials of a role."""
        point_aws_at(self.ceph.endpoint, *self.login(role), monkeypatch)

    def grant_by_user(self) -> None:
        """Give each role its file with the IAM interface, and the bucket its policy."""
        administrator = self.client("administrator", "iam")
        for role in ROLES:
            administrator.put_user_policy(
                UserName=self.keys[role],
                PolicyName="elastic-pt",
                PolicyDocument=self.filled(f"aws/{role}.json"),
            )
        self.put_policy(self.filled("ceph/bucket-policy.json"))

    def grant_by_bucket(self) -> None:
        """Grant all in the bucket's policy, by the commands of the page."""
        if shutil.which("jq") is None:
            left_out("the test of one bucket policy for all roles, since jq is not installed")
        block = block_of_page("{ fill deploy/buckets/ceph", "> policy.json")
        for role in ROLES:
            assert f" {role}" in block
        # The users of this test have names of their own.
        script = "\n".join(
            [
                function_of_page("fill"),
                function_of_page("grant"),
                block.replace("user/$role", f"user/$role-{self.owner.name}").replace(
                    "> policy.json", ""
                ),
            ]
        )
        self.put_policy(shell(script, **self.variables))

    def keep_versions(self) -> None:
        """The owner switches versioning on."""
        enabled = {"Status": "Enabled"}
        self.client("owner").put_bucket_versioning(
            Bucket=self.owner.name, VersioningConfiguration=enabled
        )

    def put_policy(self, policy: str) -> None:
        """The owner sets the bucket's policy."""
        self.client("owner").put_bucket_policy(Bucket=self.owner.name, Policy=policy)


@pytest.fixture
def site(ceph: Ceph) -> Site:
    """An empty bucket, and users without any rights."""
    owner = ceph.create_bucket(f"roles-{uuid.uuid4().hex[:8]}")
    keys = {role: f"{role}-{owner.name}" for role in (*ROLES, "administrator")}
    for role, key in keys.items():
        caps = "user-policy=*" if role == "administrator" else ""
        ceph.create_user(key, key, f"{key}-secret", caps=caps)
    return Site(ceph, owner, keys)


SHARD = "ckpt/0000000010-g1-ab/shard-00000.safetensors"
MANIFEST = "ckpt/0000000010-g1-ab/manifest.json"
RUN = (
    "config.toml",
    "identity.json",
    TOKEN_KEY,
    AUTHORITY_KEY,
    "secret/wireguard/key@10.0.0.1:51820",
    "pulse.json",
    "log/00000000000000000000.json",
    SHARD,
    MANIFEST,
    "history/0000000010-g1-ab-2.jsonl",
    "events/a-ab/00000000.jsonl",
    "lobby/a!ab!10.0.0.1!1!2!1",
    "storage-check-ab/first",
)
DATA, OTHER = "data/manifest.json", "runs/second/ckpt/0000000010-g1-ab/manifest.json"
READ = ("config.toml", "identity.json", "log/", "ckpt/", "history/", "data/")

Rights = dict[str, tuple[str, ...]]
"""Starts of the keys, below the run directory, on which a role may do something. Data and another run count as keys too."""

MAY: Final[dict[str, Rights]] = {
    "trainer": {
        "get": (*RUN, DATA),
        "put": RUN,
        "multipart": RUN,
        "delete": ("lobby/", "storage-check-", "secret/wireguard/"),
        "abort": ("ckpt/", "storage-check-"),
        "list": ("",),
        "rules": ("",),
    },
    "collector": {
        "get": ("config.toml", "log/", MANIFEST),
        "delete": ("ckpt/",),
        "abort": ("ckpt/",),
        "list": ("",),
        "list_uploads": ("",),
    },
    "reader": {"get": READ, "list": ("",)},
    "operator": {
        "get": (*RUN, DATA),
        "put": ("log/",),
        "multipart": ("log/",),
        "list": ("",),
        "rules": ("",),
    },
}


@pytest.mark.parametrize("grant", [Site.grant_by_user, Site.grant_by_bucket])
@on_ceph
def test_each_role_may_do_what_it_needs_and_nothing_else(
    site: Site, grant: Callable[[Site], None]
) -> None:
    """Every verb of S3 that matters, tried for real with the credentials of each role, on every kind of key."""
    site.keep_versions()
    bucket, owner = site.owner.name, site.client("owner")
    names = {each: f"{PREFIX}/{each}" for each in RUN} | {DATA: DATA, OTHER: OTHER}
    versions: dict[str, str] = {}
    upload: dict[str, str] = {}

    def fill() -> None:
        for key in names.values():
            here = {"Bucket": bucket, "Key": key}
            versions[key] = owner.put_object(**here, Body=b"x")["VersionId"]
            owner.put_object(**here, Body=b"y")
            upload[key] = owner.create_multipart_upload(**here)["UploadId"]

    grant(site)

    def multipart(client: Any, key: str) -> None:
        here = {"Bucket": bucket, "Key": key}
        made = client.create_multipart_upload(**here)["UploadId"]
        client.upload_part(**here, UploadId=made, PartNumber=1, Body=b"x")

    verbs: dict[str, Callable[[Any, str], object]] = {
        "get": lambda client, key: client.get_object(Bucket=bucket, Key=key),
        "put": lambda client, key: client.put_object(Bucket=bucket, Key=key, Body=b"z"),
        "multipart": multipart,
        "abort": lambda client, key: client.abort_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload[key]
        ),
        "delete_version": lambda client, key: client.delete_object(
            Bucket=bucket, Key=key, VersionId=versions[key]
        ),
        "delete": lambda client, key: client.delete_object(Bucket=bucket, Key=key),
    }
    whole: dict[str, Callable[[Any], object]] = {
        "list": lambda client: client.list_objects_v2(Bucket=bucket, Prefix=f"{PREFIX}/log/"),
        "list_other": lambda client: client.list_objects_v2(Bucket=bucket, Prefix="runs/second/"),
        "list_uploads": lambda client: client.list_multipart_uploads(Bucket=bucket),
        "rules": lambda client: client.get_bucket_lifecycle_configuration(Bucket=bucket),
        "set_policy": lambda client: client.put_bucket_policy(Bucket=bucket, Policy="{}"),
        "set_rules": lambda client: client.put_bucket_lifecycle_configuration(
            Bucket=bucket, LifecycleConfiguration={"Rules": []}
        ),
        "set_versioning": lambda client: client.put_bucket_versioning(
            Bucket=bucket, VersioningConfiguration={"Status": "Suspended"}
        ),
        "delete_bucket": lambda client: client.delete_bucket(Bucket=bucket),
    }
    for role in ROLES:
        fill()
        client, may = site.client(role), MAY[role]
        for verb, ask in verbs.items():
            found = {name for name, key in names.items() if is_allowed(lambda: ask(client, key))}
            expected = {name for name in names if name.startswith(may.get(verb, ("nothing",)))}
            assert found == expected, f"{role}: {verb}"
        allowed = {verb for verb, ask in whole.items() if is_allowed(lambda: ask(client))}
        assert allowed == {verb for verb in whole if verb in may}, role
        missing = f"{PREFIX}/log/00000000000000000009.json"
        assert code_of(lambda: verbs["get"](client, missing)) == "NoSuchKey", role
    assert not is_allowed(lambda: verbs["delete_version"](owner, f"{PREFIX}/{SHARD}"))


def code_of(request: Callable[[], object]) -> str:
    """The code of the error that a request fails with; empty if it succeeds."""
    try:
        request()
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return ""


def is_allowed(request: Callable[[], object]) -> bool:
    """Whether the server did not refuse it. A request for something that is gone was allowed."""
    return code_of(request) not in ("AccessDenied", "Forbidden")


READ_POLICIES: Final = """
import json, re, sys
import celpy
from azure.mgmt.authorization.models import RoleDefinition
from azure.mgmt.storage.models import ManagementPolicySchema

given = json.load(sys.stdin)
cel = celpy.Environment()

def allows(expression, name):
    found = cel.program(cel.compile(expression))
    return bool(found.evaluate({"resource": celpy.json_to_cel({"name": name})}))

policy = ManagementPolicySchema(given["azure_lifecycle"])
roles = [RoleDefinition.from_dict({"properties": {"roleName": each["Name"], "permissions": [
    {key[0].lower() + key[1:]: each[key] for key in ("Actions", "NotActions", "DataActions", "NotDataActions")}
]}}) for each in given["azure_roles"]]
print(json.dumps({
    "google": [[name for name in given["names"] if allows(each, name)] for each in given["expressions"]],
    "azure_days": [policy.rules[0].definition.actions.version.delete.days_after_creation_greater_than,
                   policy.rules[1].definition.actions.base_blob.delete.days_after_modification_greater_than],
    "azure_actions": [each.permissions[0].data_actions for each in roles],
}))
"""
ACTION: Final = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs/"
AZURE: Final = {"get": "read", "put": "write", "create": "add/action", "delete": "delete"}


CHECK_AMAZON: Final = """
import json, sys
from parliament import analyze_policy_string
print(json.dumps([[each.issue for each in analyze_policy_string(text).findings] for text in json.load(sys.stdin)]))
"""


def test_files_for_amazon_are_valid_policies(clouds_python: str) -> None:
    """A checker of Amazon's policies knows every action, and that it fits its resources; it finds a wrong one."""
    variables = {"BUCKET": "b", "PREFIX": "runs/*", "DATA": "b/data"}
    files = [
        *(f"aws/{role}.json" for role in ROLES),
        "aws/bucket-policy.json",
        "ceph/bucket-policy.json",
    ]
    script = f"{function_of_page('fill')}\nfill deploy/buckets/"
    texts = [shell(f"{script}{file}", **variables) for file in files]
    assert not [text for text in texts if re.search("BUCKET|PREFIX|DATA", text)]
    wrong = texts[0].replace("GetObject", "GetObjects")
    done = subprocess.run(
        [clouds_python, "-W", "ignore", "-c", CHECK_AMAZON],
        input=json.dumps([*texts, wrong]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[] for _ in texts] + [["UNKNOWN_ACTION"]]
    policies = [json.loads(text) for text in texts[-2:]]
    policies[0]["Statement"] = [
        each for each in policies[0]["Statement"] if each["Sid"] != "CreateOnly"
    ]
    assert policies[0] == policies[1]


def in_a_run(key: str) -> str:
    """A key of the bucket, from one that is below the run directory or is data."""
    return key if key in (DATA, OTHER) else f"{PREFIX}/{key}"


def allowed_by_azure(condition: str, verb: str, key: str) -> bool:
    """What a condition says, read with the few forms of the language that our files use."""
    path = r"@Resource\[Microsoft\.Storage/\S+?/blobs:path\] StringLike '([^']*)'"
    text = re.sub(path, lambda found: str(fnmatch.fnmatchcase(key, found[1])), condition)
    action = ACTION + AZURE[verb]
    text = re.sub(r"ActionMatches\{'([^']*)'\}", lambda found: str(found[1] == action), text)
    text = text.replace("SubOperationMatches{'Blob.List'}", "False").replace("!", " not ")
    text = text.replace("AND", "and").replace("OR", "or").replace("NOT", "not")
    assert re.fullmatch(r"(?:\(|\)|and|or|not|True|False|\s)*", text), text
    return bool(eval(text.replace("\n", " ")))


def test_files_for_google_and_azure_give_the_same_rights(clouds_python: str) -> None:
    """Google's conditions are evaluated as CEL, Azure's by their few forms; the libraries of both read the other files.

    Nothing is sent to a cloud.
    """
    variables = {
        "BUCKET": "b",
        "PREFIX": PREFIX,
        "DATA": "data",
        "PROJECT": "p",
        "CONTAINER": "c",
        "SUBSCRIPTION": "s",
    }

    def filled(file: str) -> str:
        return shell(f"{function_of_page('fill')}\nfill deploy/buckets/{file}", **variables)

    keys = {each: in_a_run(each) for each in (*RUN, DATA, OTHER)}
    names = {f"projects/_/buckets/b/objects/{key}": name for name, key in keys.items()}
    bindings = json.loads(filled("gcs/bindings.json"))["bindings"]
    bound = [each for each in bindings if "condition" in each]
    azure = {role: json.loads(filled(f"azure/{role}.json")) for role in ROLES}
    done = subprocess.run(
        [clouds_python, "-c", READ_POLICIES],
        input=json.dumps(
            {
                "names": list(names),
                "expressions": [each["condition"]["expression"] for each in bound],
                "azure_lifecycle": json.loads(filled("azure/lifecycle.json")),
                "azure_roles": list(azure.values()),
            }
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["azure_days"] == [7, 90]

    # A create that may not overwrite is a right of its own here.
    hints = ("lobby/", "storage-check-", "secret/wireguard/")
    again = (*hints, "events/", "pulse.json")
    google = {
        "trainer": {"get": (*RUN, DATA), "create": RUN, "delete": again},
        "collector": {"get": MAY["collector"]["get"], "delete": ("ckpt/",)},
        "reader": {"get": READ},
        "operator": {"get": (*RUN, DATA), "create": ("log/",)},
    }
    verbs = {"Read": "get", "Create": "create", "Delete": "delete"}
    for role in ROLES:
        for kind, verb in verbs.items():
            found = {
                names[name]
                for each, allowed in zip(bound, read["google"], strict=True)
                if each["role"] == f"projects/p/roles/elasticPt{kind}"
                and f"serviceAccount:elastic-pt-{role}@p.iam.gserviceaccount.com" in each["members"]
                for name in allowed
            }
            starts = google[role].get(verb, ("nothing",))
            assert found == {name for name in keys if name.startswith(starts)}, (role, verb)
        assert (
            sum(
                role in member
                for each in bindings
                for member in each["members"]
                if each not in bound
            )
            == 1
        )

        rights = MAY[role] | ({"create": MAY[role]["put"]} if "put" in MAY[role] else {})
        if role == "operator":
            rights = {each: starts for each, starts in rights.items() if each != "put"}
        condition = filled(f"azure/{role}.condition")
        actions = set(azure[role]["DataActions"])
        assert actions == {ACTION + AZURE[each] for each in rights if each in AZURE}
        assert "PREFIX" not in condition
        for verb in AZURE:
            found = {
                name
                for name, key in keys.items()
                if ACTION + AZURE[verb] in actions and allowed_by_azure(condition, verb, key)
            }
            starts = rights.get(verb, ("nothing",))
            assert found == {name for name in keys if name.startswith(starts)}, (role, verb)
    for file in (FILES / "gcs").glob("*.yaml"):
        custom = yaml.safe_load(file.read_text())
        assert custom["includedPermissions"] == [
            f"storage.objects.{ {'read': 'get'}.get(file.stem, file.stem) }"
        ]
    for rule in json.loads(filled("gcs/lifecycle.json"))["rule"]:
        assert rule["condition"]["matchesPrefix"] == [f"{PREFIX}/"]
        assert rule["action"]["type"] in ("Delete", "AbortIncompleteMultipartUpload")


@on_ceph
def test_lifecycle_rules_end_uploads_and_delete_old_versions(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's rules, processed by the gateway's own command with seconds instead of days, act below the run only."""
    site.keep_versions()
    bucket, client = site.owner.name, site.client("owner")
    rules = json.loads(site.filled("aws/lifecycle.json"))
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=rules)
    stored = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert sorted(stored, key=lambda rule: rule["ID"]) == sorted(
        rules["Rules"], key=lambda rule: rule["ID"]
    )
    site.act_as("owner", monkeypatch)
    store = open_store(f"{site.owner.url}/{PREFIX}")
    assert isinstance(store, KeepsUnfinished)
    assert store.expires_unfinished("ckpt/")
    kept, gone = f"other/{SHARD}", f"{PREFIX}/{SHARD}"
    for key in (kept, gone):
        client.create_multipart_upload(Bucket=bucket, Key=key)
        for body in (b"old", b"new"):
            client.put_object(Bucket=bucket, Key=key, Body=body)
    events = f"{PREFIX}/events/a-ab/00000000.jsonl"
    client.put_object(Bucket=bucket, Key=events, Body=b"x")

    def uploads() -> set[str]:
        return {each["Key"] for each in client.list_multipart_uploads(Bucket=bucket)["Uploads"]}

    def versions(key: str) -> int:
        return len(client.list_object_versions(Bucket=bucket, Prefix=key)["Versions"])

    give_up_at_s = time.monotonic() + WAIT_S
    while gone in uploads() or versions(gone) > 1:
        assert time.monotonic() < give_up_at_s
        site.ceph.administer("lc", "process", "--rgw-lc-debug-interval=1")
    assert uploads() == {kept}
    assert (versions(gone), versions(kept), versions(events)) == (1, 2, 1)


@on_ceph
def test_a_versioned_bucket_of_this_gateway_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Release 16.2 ignores the condition of a create in a versioned bucket. The page says so, and no run starts there."""
    site.act_as("owner", monkeypatch)
    store = open_store(f"{site.owner.url}/{PREFIX}", timeout_s=WAIT_S)
    assert is_fenced(store).fenced
    site.keep_versions()
    assert not is_fenced(store).fenced


def wait_for(what: str, fleet: Fleet, condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; fail with the ends of the nodes' logs after `WAIT_S`."""
    give_up_at_s = time.monotonic() + WAIT_S
    while not condition():
        tails = f"{what}: {fleet.tail('a')}\n{fleet.tail('b')}"
        assert fleet.running(), tails
        assert time.monotonic() < give_up_at_s, tails
        time.sleep(0.05)


@on_ceph
def test_a_run_trains_without_the_right_to_delete_and_another_role_tidies(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the trainer's credentials and `checkpoint.tidy = false` a run loses a node and completes; the collector tidies.

    Afterwards the reader verifies every byte, the weights are the same, and the secret is closed to the reader.
    """
    site.grant_by_user()
    run_url, data_url = f"{site.owner.url}/{PREFIX}", f"{site.owner.url}/data"
    site.act_as("owner", monkeypatch)
    prepare(tmp_path / "texts", data_url)
    run_log = RunLog(open_store(run_url), writer="test")
    run_log.refresh()

    site.act_as("trainer", monkeypatch)
    more = {"elastic": {"nodes_max": 2}, "checkpoint": {"every_steps": 4, "keep": 2, "tidy": False}}
    cache = {"data": {"cache": str(tmp_path / "cache")}}
    tree = tomlkit.dumps(small_run(run_url, data_url, more, cache))
    with Fleet(parse_config(tree, source="test"), tmp_path / "nodes") as fleet:
        for node in "ab":
            fleet.start(node)
        wait_for("a checkpoint", fleet, lambda: run_log.refresh().committed_step >= 12)
        fleet.kill("b")
        fleet.start("b")
        assert set(fleet.wait(WAIT_S).values()) == {0}, fleet.tail("a")
    told = "".join(each.read_text() for each in (tmp_path / "nodes").glob("*.log"))
    assert "Denied" not in told
    # What `elastic-pt doctor` tries is what a node needs.
    tried = list(rights(open_store(run_url), scratch_folder()))
    assert [each for each in tried if not each.ok] == []
    view = run_log.refresh()
    assert len(view.generations) >= 2

    # What a killed node leaves, as the gateway keeps it: an attempt, and an upload whose parts no listing shows.
    torn = f"{PREFIX}/ckpt/0000000013-g1-beef/shard-00000.safetensors"
    client = site.client("trainer")
    client.put_object(Bucket=site.owner.name, Key=torn, Body=b"half")
    client.create_multipart_upload(Bucket=site.owner.name, Key=torn)

    site.act_as("reader", monkeypatch)
    digest = elastic_pt("digest", run_url, "--json")
    before = set(listed_directories(open_store(run_url)))

    site.act_as("collector", monkeypatch)
    would = json.loads(elastic_pt("tidy", run_url, "--dry-run", "--json"))
    done = json.loads(elastic_pt("tidy", run_url, "--json"))
    for each in would["uploads"] + done["uploads"]:
        del each["age_s"]
    assert done == would | {"dry_run": False}
    assert set(done["kept"]) == {each.directory for each in view.checkpoints}
    assert {each["directory"] for each in done["directories"]} == before - set(done["kept"])
    assert f"{PREFIX}/{done['uploads'][0]['key']}" == torn
    assert len(done["directories"]) >= 3
    again = json.loads(elastic_pt("tidy", run_url, "--json"))
    assert (again["directories"], again["uploads"]) == ([], [])

    site.act_as("reader", monkeypatch)
    assert elastic_pt("digest", run_url, "--json") == digest
    verified = json.loads(elastic_pt("checkpoints", run_url, "--verify", "--json"))
    kept = [each.directory for each in view.checkpoints]
    assert [(each["directory"], each["problems"]) for each in verified] == [
        (each, []) for each in kept
    ]
    for key in (TOKEN_KEY, AUTHORITY_KEY):
        with pytest.raises(AccessDenied):
            open_store(run_url).read(key)
