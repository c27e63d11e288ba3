"""Which sources are watched: by the configuration, and by what the machine says of itself."""

from pathlib import Path

import pytest

from elastic_pt.config import parse_config
from elastic_pt.errors import ConfigError
from elastic_pt.notices.detect import MITHRIL, Machine, chosen, read_machine, sources

TEXT = '[run]\nurl = "run"\n[data]\nurl = "data"\n'
CLOUDS = {
    "aws": {"sys_vendor": "Amazon EC2", "product_name": "m7i.large"},
    "aws on xen": {"sys_vendor": "Xen", "bios_version": "4.11.amazon"},
    "gcp": {"sys_vendor": "Google", "product_name": "Google Compute Engine"},
    "azure": {
        "sys_vendor": "Microsoft Corporation",
        "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77",
    },
    "hyper-v": {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "None"},
    "chromebook": {"sys_vendor": "Google", "product_name": "Eve"},
    "own": {"sys_vendor": "QEMU"},
    "none": {},
}
FOUND = {"aws": ("aws",), "aws on xen": ("aws",), "gcp": ("gcp",), "azure": ("azure",)}


def machine(dmi: dict[str, str], tmp_path: Path, **environment: str) -> Machine:
    """What is read of a machine with these files."""
    for name, text in dmi.items():
        (tmp_path / name).write_text(f"{text}\n")
    return read_machine(tmp_path, environment)


def wanted(value: str) -> str | tuple[str, ...]:
    """`elastic.notices` after parsing."""
    return parse_config(TEXT, source="t", overrides=[f"elastic.notices={value}"]).elastic.notices


@pytest.mark.parametrize("kind", CLOUDS)
def test_a_cloud_is_known_by_its_firmware(kind: str, tmp_path: Path) -> None:
    """`auto` asks the machine's own cloud and no other one: nothing is sent to find out."""
    found = machine(CLOUDS[kind], tmp_path)
    assert chosen("auto", found) == FOUND.get(kind, ())
    assert parse_config(TEXT, source="t").elastic.notices == "auto"


@pytest.mark.parametrize("variable", ["KUBERNETES_SERVICE_HOST", "SLURM_JOB_ID"])
def test_nobody_is_asked_where_a_signal_comes(variable: str, tmp_path: Path) -> None:
    """A pod or task that ended by itself would not be started again; Kubernetes and Slurm send SIGTERM instead."""
    found = machine(CLOUDS["aws"], tmp_path, **{variable: "1"})
    assert chosen("auto", found) == ()
    assert chosen(("aws",), found) == ("aws",)


def test_mithrils_directory_is_found() -> None:
    """Its file is watched beside the cloud."""
    found = Machine(dict.fromkeys(("sys_vendor", "product_name", "bios_version", "chassis_asset_tag"), ""), True, "")  # fmt: skip
    assert chosen("auto", found) == (f"file:{MITHRIL}",)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("off", []),
        ("[]", []),
        ("file:/run/notice", ["file"]),
        ('["auto", "file:/run/notice"]', ["aws", "aws-rebalance", "file"]),
        ("aws:http://127.0.0.1:1338/", ["aws", "aws-rebalance"]),
        ('["gcp", "azure"]', ["gcp", "gcp-maintenance", "azure"]),
        ('["file:/a", "file:/b", "webhook:[::1]:9500"]', ["file", "file", "webhook"]),
    ],
)
def test_what_may_be_configured(value: str, names: list[str], tmp_path: Path) -> None:
    """`off`, one source, or a list of them, with `auto` as one of it; it survives being written as TOML."""
    found = chosen(wanted(value), machine(CLOUDS["aws"], tmp_path))
    assert [each.name for each in sources(found, "a", lambda: b"")] == names
    config = parse_config(TEXT, source="t", overrides=[f"elastic.notices={value}"])
    assert parse_config(config.to_toml(comments=True), source="t") == config


@pytest.mark.parametrize(
    "value",
    ["on", "5", "true", "aws2", "file:relative", "webhook:9500", "webhook:0.0.0.0:0",
     "webhook:0.0.0.0:70000", "aws:ftp://x", '["aws", "off"]', '["aws", 5]', '["aws\\n"]'],
)  # fmt: skip
def test_a_source_that_does_not_exist_is_named(value: str) -> None:
    """One line with the key, the value, and what is expected."""
    with pytest.raises(ConfigError, match=r"elastic\.notices = .*expected 'auto', 'off'") as caught:
        wanted(value)
    assert "\n" not in str(caught.value)


def test_a_base_url_is_asked_as_it_is_written(tmp_path: Path) -> None:
    """A slash at its end makes no other path."""
    (first, _) = sources(("gcp:http://127.0.0.1:1338/",), "a", lambda: b"")
    assert first._url.startswith("http://127.0.0.1:1338/computeMetadata/")  # type: ignore[attr-defined]
