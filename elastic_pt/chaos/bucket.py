"""A bucket on an S3 server of this machine, with credentials that open nothing else."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_PREFIX: Final = "AWS_"
_REGION: Final = "us-east-1"


def aws_variables(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    """The standard variables with which every S3 client talks to `endpoint`, and reads no file of the user."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": _REGION,
        "AWS_DEFAULT_REGION": _REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@dataclass(frozen=True)
class Bucket:
    """Where an empty bucket is, and the credentials of its owner."""

    name: str
    endpoint: str
    """The URL of the S3 server."""
    access_key: str
    secret_key: str

    @property
    def url(self) -> str:
        """As in `run.url`, without the run's directory."""
        return f"s3://{self.name}"

    def environment(self, base: Mapping[str, str], *, endpoint: str = "") -> dict[str, str]:
        """`base` for a process that uses this bucket, directly or through `endpoint`, such as that of a proxy.

        All AWS variables of `base` are left out.
        """
        others = {name: value for name, value in base.items() if not name.startswith(_PREFIX)}
        return others | aws_variables(endpoint or self.endpoint, self.access_key, self.secret_key)
