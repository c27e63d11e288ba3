"""Every knob of a run, in one frozen tree.

A TOML file gives the tree; `--set section.key=value` overrides single leaves; unknown keys are errors.
Each section is handed alone to the code that needs it. The sections in `IDENTITY_SECTIONS` decide the
bits of the weights: they are written to the run directory once and every node must agree on them. The
others may differ from node to node.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from elastic_pt.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{1,2}|$)")
IDENTITY_SECTIONS = ("data", "model", "train")
INTRODUCED: dict[str, Any] = {}
"""Keys of these sections that came after the first version, by name, with the default that each had then. A run that
knows nothing of one has that value, and its identity and fingerprint stay what they were."""

# Every number has a finite range. Beyond it, nothing here was meant, and some library below would fail late.
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Factor = Annotated[float, Field(ge=0.0, le=1e6)]
PositiveFactor = Annotated[float, Field(gt=0.0, le=1e9)]
Seconds = Annotated[float, Field(ge=0.001, le=1e6)]
"""A duration, from a millisecond to eleven days."""
SecondsOrZero = Annotated[float, Field(ge=0.0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Failures = Annotated[int, Field(ge=1, le=64)]
"""As many generations as the view of a log remembers (`runlog.log.GENERATIONS_KEPT`)."""
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Size = Annotated[int, Field(ge=1, le=2**24)]
"""A dimension of a tensor."""
Processes = Annotated[int, Field(ge=0, le=1024)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


def broken_scheme(text: str) -> str:
    """The scheme of a text that was meant to be a URL and is none (s3:/bucket, S3://bucket); else empty."""
    found = _SCHEME.match(text.strip())
    if found is None or (found[2] == "//" and found[1] == found[1].lower()):
        return ""
    return found[1]


def _without_trailing_slash(url: str) -> str:
    if not url.strip():
        raise ValueError(
            "must not be empty; a URL such as s3://bucket/run or a directory would be right"
        )
    if scheme := broken_scheme(url):
        raise ValueError(
            f"begins like a URL of {scheme!r} and is none; expected {scheme.lower()}://... or a path"
        )
    stripped = url.rstrip("/") or "/"
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", stripped):
        raise ValueError(f"names no place behind the scheme; expected {stripped}//... or a path")
    return stripped if "://" in stripped else f"file://{Path(stripped).expanduser().resolve()}"


Url = Annotated[str, AfterValidator(_without_trailing_slash)]


class Section(BaseModel):
    """A frozen table of the TOML file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunSection(Section):
    """What this run is."""

    url: Url
    """The run directory: a path or an fsspec URL (file://, s3://, ...). The only thing that has to survive."""
    seed: Seed = 0
    """Seed of the initial weights and of the data order."""


class DataSection(Section):
    """What it reads."""

    url: Url
    """The directory that `elastic-pt prepare` wrote."""
    sequence_length: Size = 256
    """Tokens per training sequence."""
    prefetch_steps: Count = 2
    """Steps that each worker reads ahead."""
    cache: str = ""
    """Directory for token shards that are downloaded; empty: one per user below the system's temporary directory."""
    cache_bytes: Annotated[int, Field(ge=1, le=2**60)] = 100 * 2**30
    """Most bytes that it may hold; least recently used files are removed first."""


class ModelSection(Section):
    """A Llama-shape decoder. Its vocabulary is that of the prepared data."""

    layers: Size = 4
    """Decoder blocks."""
    width: Size = 256
    """Size of the residual stream; a multiple of `heads`, and width / heads must be even."""
    heads: Size = 4
    """Query heads per block."""
    kv_heads: Size = 2
    """Key and value heads per block (grouped-query attention); must divide `heads`."""
    ffn_width: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Inner size of the SwiGLU layer; 0 chooses 8/3 of the width, rounded up to a multiple of 64."""
    rope_theta: PositiveFactor = 10000.0
    """Base of the rotary position embedding."""
    norm_epsilon: PositiveFactor = 1e-5
    """Epsilon of every RMSNorm."""
    qk_norm: bool = False
    """Normalise queries and keys per head before attention (the export is then a Qwen3, else a Llama)."""
    tied_embeddings: bool = True
    """Use the token embedding as the output layer too."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelSection":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"model.width = {self.width} does not fit model.heads = {self.heads}: "
                "width / heads must be an even whole number"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads = {self.kv_heads} must divide model.heads = {self.heads}"
            )
        return self

    @property
    def head_width(self) -> int:
        """Size of one attention head."""
        return self.width // self.heads

    @property
    def inner_width(self) -> int:
        """Inner size of the SwiGLU layer after the default is applied."""
        return self.ffn_width or -(-(8 * self.width // 3) // 64) * 64


class TrainSection(Section):
    """How it learns. One step reads `global_batch` sequences, in V = global_batch / micro_batch slots."""

    steps: Count = 1000
    """Optimizer steps of the whole run."""
    global_batch: Size = 32
    """Sequences per optimizer step, whatever the number of nodes."""
    micro_batch: Size = 4
    """Sequences per slot; V = global_batch / micro_batch slots are the most workers a run can use."""
    learning_rate: PositiveFactor = 2e-3
    """Peak learning rate."""
    min_learning_rate_ratio: Share = 0.1
    """Learning rate at the last step, as a share of the peak."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """Warm-up, stable, decay (wsd); or warm-up and cosine decay (cosine)."""
    warmup_steps: CountOrZero = 20
    """Steps of linear warm-up."""
    decay_share: Share = 0.2
    """Share of the run that the decay of `wsd` takes, at its end."""
    weight_decay: Factor = 0.1
    """Decoupled weight decay of matrices; vectors (the norms) are not decayed."""
    beta1: Decay = 0.9
    """AdamW's decay of the first moment."""
    beta2: Decay = 0.95
    """AdamW's decay of the second moment."""
    epsilon: PositiveFactor = 1e-8
    """AdamW's epsilon."""
    clip_norm: Factor = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    z_loss: Factor = 0.0
    """Weight of the z-loss, which keeps the softmax normaliser near 1; 0 turns it off."""
    numerics: Literal["exact", "native"] = "exact"
    """exact: the same bits for every number of workers; native: the library's reduce-scatter."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matrix products; auto is bfloat16 on CUDA, float32 on CPU. Masters are float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; auto takes CUDA if there is any."""
    threads: Threads = 1
    """CPU threads per worker. Part of the bits: a matrix product may round differently with another number."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products and attention, or whole blocks."""
    compile: bool = False
    """Compile each block with torch.compile."""
    max_skipped_steps: CountOrZero = 3
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run stops."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainSection":
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch = {self.global_batch} must be a multiple of "
                f"train.micro_batch = {self.micro_batch}"
            )
        return self

    @property
    def slots(self) -> int:
        """V: micro-batches per step, and the most workers that a run can use."""
        return self.global_batch // self.micro_batch


class ElasticSection(Section):
    """Who takes part."""

    nodes_min: Count = 1
    """Nodes below which the run pauses, with its state kept."""
    nodes_max: Count = 64
    """Nodes above which further ones wait as spares."""
    workers_per_node: Processes = 0
    """Worker processes on this node; 0 takes one per GPU, or one on a CPU node."""
    heartbeat_interval_s: Seconds = 0.2
    """Seconds between two questions to each peer."""
    heartbeat_timeout_s: Seconds = 1.5
    """Seconds without proof of life after which a peer counts as silent; a refused connection counts at once."""
    takeover_s: Seconds = 3.0
    """Seconds that a node which is cut off from most members leaves the run to them, while log and pulse stand still."""
    join_window_s: SecondsOrZero = 0.5
    """Seconds without a newcomer before a world is formed, so that nodes join together."""
    settle_timeout_s: Seconds = 600.0
    """Seconds that nodes wait for the checkpoint of a planned stop before they go on without it."""
    collective_timeout_s: Seconds = 300.0
    """Seconds after which a collective operation between workers fails."""
    hang_timeout_s: Seconds = 2.0
    """Seconds that a worker may stand still altogether before it is killed; more where it is known to be slow."""
    startup_timeout_s: Seconds = 600.0
    """Seconds that a worker may take for one part of its start, or for its first step."""
    leave_timeout_s: Seconds = 25.0
    """Seconds that a node which is asked to leave (SIGTERM) may take for its last checkpoint."""
    retries_without_progress: Count = 3
    """Failures of this node's own workers without a new step after which the node leaves the run."""
    flaps_max: Count = 3
    """Times that a node may bring the world down within `flap_window_s` before it is kept out for a while."""
    flap_window_s: Seconds = 600.0
    """Seconds after which a node's failures are forgotten."""
    quarantine_s: Seconds = 30.0
    """Seconds that such a node is kept out the first time; twice as long each further time, at most an hour."""
    same_failures_max: Failures = 3
    """Times that the program may fail in the same way at the same step, on two nodes or alone, before the run stops."""
    failures_max: Failures = 20
    """Worker failures in a row, on any nodes, without a new step before the run stops."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "ElasticSection":
        if self.nodes_min > self.nodes_max:
            raise ValueError(
                f"elastic.nodes_min = {self.nodes_min} must not exceed elastic.nodes_max = {self.nodes_max}"
            )
        if self.heartbeat_timeout_s < 3 * self.heartbeat_interval_s:
            raise ValueError(
                f"elastic.heartbeat_timeout_s = {self.heartbeat_timeout_s}: must be at least three times "
                f"elastic.heartbeat_interval_s = {self.heartbeat_interval_s}"
            )
        if self.takeover_s < 2 * self.heartbeat_timeout_s:
            raise ValueError(
                f"elastic.takeover_s = {self.takeover_s}: must be at least twice "
                f"elastic.heartbeat_timeout_s = {self.heartbeat_timeout_s}, or a node that is cut off could "
                "take over before the others have noticed"
            )
        return self


class CheckpointSection(Section):
    """What is kept, and how often."""

    every_steps: Count = 50
    """Steps between checkpoints; a checkpoint waits while the one before is still being uploaded."""
    keep: Count = 3
    """Committed checkpoints that are kept."""
    staging: str = "/dev/shm"
    """Local directory (best: memory) where workers leave their shards for the agent to upload."""

    @model_validator(mode="after")
    def _staging_is_absolute(self) -> "CheckpointSection":
        if not self.staging.startswith("/"):
            raise ValueError(f"checkpoint.staging = {self.staging!r}: expected an absolute path")
        return self


class TelemetrySection(Section):
    """What operators see."""

    metrics_address: str = "127.0.0.1"
    """Address on which the agent serves /metrics."""
    metrics_port: Port = 0
    """Port of /metrics; 0 takes a free one, which `status` shows."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe event that is written."""


class StoreSection(Section):
    """How the bucket is used."""

    deadline_s: Seconds = 120.0
    """Seconds for which one request to the bucket is retried."""


class Config(Section):
    """The whole tree."""

    run: RunSection
    data: DataSection
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    elastic: ElasticSection = ElasticSection()
    checkpoint: CheckpointSection = CheckpointSection()
    telemetry: TelemetrySection = TelemetrySection()
    store: StoreSection = StoreSection()

    def to_toml(self, *, comments: bool = False) -> str:
        """The effective configuration as TOML, on request with a sentence per key."""
        lines: list[str] = []
        for section_name, section_field in Config.model_fields.items():
            section = getattr(self, section_name)
            lines += [f"[{section_name}]"]
            doc = (section_type(section_field.annotation).__doc__ or "").strip()
            if comments and doc:
                lines += [f"# {doc.splitlines()[0]}"]
            for key, field in type(section).model_fields.items():
                if comments and field.description:
                    lines += [f"# {field.description}"]
                lines += [f"{key} = {_toml_value(getattr(section, key))}"]
            lines += [""]
        return "\n".join(lines)

    def identity(self) -> dict[str, Any]:
        """The part that decides the bits of the weights, as `section.key -> value`."""
        leaves: dict[str, Any] = {"run.seed": self.run.seed}
        for name in IDENTITY_SECTIONS:
            section: Section = getattr(self, name)
            leaves |= {f"{name}.{key}": value for key, value in section.model_dump().items()}
        # Where data lies and how it is read decides no bit.
        for key in ("url", "prefetch_steps", "cache", "cache_bytes"):
            del leaves[f"data.{key}"]
        return {
            name: value
            for name, value in leaves.items()
            if name not in INTRODUCED or value != INTRODUCED[name]
        }

    def fingerprint(self) -> str:
        """SHA-256 over `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def section_type(annotation: Any) -> type[Section]:
    """The class of a section field."""
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides. Raises `ConfigError` in one line."""
    try:
        # Editors on Windows begin a file with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; a TOML file would be right"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text at byte {error.start}; a TOML file would be right"
        ) from error
    return parse_config(text, source=str(path), overrides=overrides)


def parse_config(text: str, *, source: str, overrides: Iterable[str] = ()) -> Config:
    """Parse TOML text (`source` names it in errors) and apply `section.key=value` overrides."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals or not dot or not key or "." in key:
        raise ConfigError(
            f"--set {override!r}: section.key=value would be right, such as train.steps=100"
        )
    table = tree.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(
            f"--set {override!r}: {section} is a value in the file; a [{section}] table would be right"
        )
    try:
        table[key] = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        table[key] = value.strip()


def _explain(error: ValidationError, source: str) -> str:
    """All mistakes in one line: field, value, what would be right."""
    parts = []
    for mistake in error.errors():
        field = ".".join(str(part) for part in mistake["loc"]) or source
        value = mistake["input"]
        if mistake["type"] == "extra_forbidden":
            parts.append(
                f"{field} = {value!r}: unknown key; {_known_keys(mistake['loc'])} would be right"
            )
        elif mistake["type"] == "missing":
            parts.append(f"{field}: missing; {_wanted(mistake['loc'])}")
        elif mistake["type"] == "value_error":
            # A rule over several keys names them itself.
            leaf = f"{field} = {value!r}: " if len(mistake["loc"]) > 1 else ""
            parts.append(f"{leaf}{mistake['ctx']['error']}")
        else:
            parts.append(f"{field} = {value!r}: {_expectation(mistake['msg'])}")
    return f"{source}: " + "; ".join(parts)


def _expectation(message: str) -> str:
    """What pydantic says of a value, as this project says it."""
    if message.startswith("Input should be "):
        return f"expected {message.removeprefix('Input should be ')}"
    return f"{message[0].lower()}{message[1:]}"


def _known_keys(location: tuple[int | str, ...]) -> str:
    fields = Config.model_fields
    if len(location) > 1 and str(location[0]) in fields:
        fields = section_type(fields[str(location[0])].annotation).model_fields
    return "one of " + ", ".join(fields)


def _wanted(location: tuple[int | str, ...]) -> str:
    field = Config.model_fields[str(location[0])]
    section = section_type(field.annotation)
    if len(location) == 1:
        required = [key for key, leaf in section.model_fields.items() if leaf.is_required()]
        return f"a [{location[0]}] table with {', '.join(required)} would be right"
    return section.model_fields[str(location[1])].description or "a value would be right"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = (
            value.replace("\\", "\\\\")
            .replace('"', '\\"')
            .replace("\n", "\\n")
            .replace("\t", "\\t")
        )
        return f'"{escaped}"'
    return repr(value)
