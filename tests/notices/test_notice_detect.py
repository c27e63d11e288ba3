"""Which sources are watched, by the configuration and by the facts about the machine."""

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
    """A machine with these files."""
    for name, text in dmi.items():
        (tmp_path / name).write_text(f"{text}\n")
    return read_machine(tmp_path, environment)


def wanted(value: str) -> str | tuple[str, ...]:
    """`elastic.notices` after parsing."""
    return parse_config(TEXT, source="t", overrides=[f"elastic.notices={value}"]).elastic.notices


@pytest.mark.parametrize("kind", CLOUDS)
def test_a_cloud_is_detected_by_its_firmware(kind: str, tmp_path: Path) -> None:
    """`auto` chooses the machine's own cloud and no other one, and sends no request."""
    found = machine(CLOUDS[kind], tmp_path)
    assert chosen("auto", found) == FOUND.get(kind, ())
    assert parse_config(TEXT, source="t").elastic.notices == "auto"


@pytest.mark.parametrize("variable", ["KUBERNETES_SERVICE_HOST", "SLURM_JOB_ID"])
def test_no_source_is_chosen_under_kubernetes_or_slurm(variable: str, tmp_path: Path) -> None:
    """A pod or task that ends by itself is not started again; Kubernetes and Slurm send SIGTERM instead."""
    found = machine(CLOUDS["aws"], tmp_path, **{variable: "1"})
    assert chosen("auto", found) == ()
    assert chosen(("aws",), found) == ("aws",)


def test_mithrils_directory_is_found() -> None:
    """Its file is watched in addition to the cloud."""
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
def test_configured_sources_are_watched(value: str, names: list[str], tmp_path: Path) -> None:
    """`off`, one source, or a list of sources that may contain `auto`; the value survives a round trip through TOML."""
    found = chosen(wanted(value), machine(CLOUDS["aws"], tmp_path))
    assert [each.name for each in sources(found, "a", b"")] == names
    config = parse_config(TEXT, source="t", overrides=[f"elastic.notices={value}"])
    assert parse_config(config.to_toml(comments=True), source="t") == config


@pytest.mark.parametrize(
    "value",
    ["on", "5", "true", "aws2", "file:relative", "webhook:9500", "webhook:0.0.0.0:0",
     "webhook:0.0.0.0:70000", "aws:ftp://x", '["aws", "off"]', '["aws", 5]', '["aws\\n"]'],
)  # fmt: skip
def test_an_unknown_source_is_an_error_with_its_name(value: str) -> None:
    """The error is one line with the key, the value, and what is expected."""
    with pytest.raises(ConfigError, match=r"elastic\.notices = .*expected 'auto', 'off'") as caught:
        wanted(value)
    assert "\n" not in str(caught.value)


def test_a_trailing_slash_of_a_base_url_is_dropped(tmp_path: Path) -> None:
    """A slash at the end of a base URL does not change the requested path."""
    (first, _) = sources(("gcp:http://127.0.0.1:1338/",), "a", b"")
    assert first._url.startswith("http://127.0.0.1:1338/computeMetadata/")  # type: ignore[attr-defined]
