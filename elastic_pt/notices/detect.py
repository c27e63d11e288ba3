"""Which sources of notices this machine has.

    elastic.notices ─┐
    Machine ─────────┴─► chosen ─► sources

`auto` reads the vendor of the machine (DMI) and sends no request. If Kubernetes or Slurm started this process, it
chooses no source: they send a signal when the cloud gives a notice, and they restart the agent.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_pt.notices import aws, azure, gcp
from elastic_pt.notices.file import File
from elastic_pt.notices.signals import supervisor
from elastic_pt.notices.watch import Source
from elastic_pt.notices.webhook import Webhook

DMI: Final = Path("/sys/class/dmi/id")
MITHRIL: Final = Path("/opt/mithril/MITHRIL_SIGNAL.yml")
_DMI_BYTES_MAX: Final = 256
_AZURE_ASSET_TAG: Final = "7783-7084-3265-9085-8269-3286-77"
"""Distinguishes a machine of Azure from one of Hyper-V elsewhere."""


@dataclass(frozen=True)
class Machine:
    """What is known of this machine."""

    dmi: Mapping[str, str]
    """Contents of the files of `DMI`, by name; empty for a missing file."""
    mithril: bool
    """Whether Mithril's directory exists."""
    supervisor: str
    """See `signals.supervisor`."""


def read_machine(dmi: Path = DMI, environment: Mapping[str, str] = os.environ) -> Machine:
    """Read the facts about this machine; sends no request."""
    names = ("sys_vendor", "product_name", "bios_version", "chassis_asset_tag")
    return Machine(
        dmi={name: _read(dmi / name) for name in names},
        mithril=MITHRIL.parent.is_dir(),
        supervisor=supervisor(environment),
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_DMI_BYTES_MAX).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def chosen(notices: str | tuple[str, ...], machine: Machine) -> tuple[str, ...]:
    """The sources to watch, in the form of `elastic.notices`, with `auto` replaced. Pure."""
    if notices == "off":
        return ()
    wanted = (notices,) if isinstance(notices, str) else notices
    found = [name for each in wanted for name in (_detect(machine) if each == "auto" else [each])]
    return tuple(dict.fromkeys(found))


def _detect(machine: Machine) -> list[str]:
    if machine.supervisor:
        return []
    found = []
    vendor, asset_tag = machine.dmi["sys_vendor"], machine.dmi["chassis_asset_tag"]
    # Older instances of AWS run on Xen.
    if vendor == "Amazon EC2" or "amazon" in machine.dmi["bios_version"]:
        found.append("aws")
    elif machine.dmi["product_name"] == "Google Compute Engine":
        found.append("gcp")
    elif vendor == "Microsoft Corporation" and asset_tag == _AZURE_ASSET_TAG:
        found.append("azure")
    if machine.mithril:
        found.append(f"file:{MITHRIL}")
    return found


def sources(wanted: tuple[str, ...], node: str, key: bytes) -> list[Source]:
    """The sources of these names. `key` is that of the webhook's signatures."""
    found: list[Source] = []
    for each in wanted:
        name, _, argument = each.partition(":")
        url = argument.rstrip("/")
        match name:
            case "aws":
                found += aws.sources(url or aws.URL)
            case "gcp":
                found += gcp.sources(url or gcp.URL)
            case "azure":
                names = {node, socket.gethostname()}
                found.append(azure.Azure(names, url or azure.URL))
            case "file":
                found.append(File(Path(argument), node))
            case "webhook":
                address, _, port = argument.rpartition(":")
                found.append(Webhook(address.strip("[]"), int(port), node, key))
    return found
