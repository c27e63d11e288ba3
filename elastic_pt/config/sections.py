"""The sections of the configuration: every key with its type, bounds, default and a sentence.

A rule over several keys of a section is a validator of that section.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{1,2}|$)")

# Every number has a finite range. A value outside is a mistake, and a library would fail late.
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Factor = Annotated[float, Field(ge=0.0, le=1e6)]
PositiveFactor = Annotated[float, Field(gt=0.0, le=1e9)]
Seconds = Annotated[float, Field(ge=0.001, le=1e6)]
"""A duration, from a millisecond to eleven days."""
SecondsOrZero = Annotated[float, Field(ge=0.0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Failures = Annotated[int, Field(ge=1, le=64)]
"""At most the number of generations that `RunView` keeps (`runlog.log.GENERATIONS_KEPT`)."""
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Size = Annotated[int, Field(ge=1, le=2**24)]
"""A dimension of a tensor."""
Processes = Annotated[int, Field(ge=0, le=1024)]
Copies = Annotated[int, Field(ge=0, le=8)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


def broken_scheme(text: str) -> str:
    """The scheme of a malformed URL (s3:/bucket, S3://bucket); empty for any other text."""
    found = _SCHEME.match(text.strip())
    if found is None or (found[2] == "//" and found[1] == found[1].lower()):
        return ""
    return found[1]


def _without_trailing_slash(url: str) -> str:
    if not url.strip():
        raise ValueError("must not be empty; expected a directory or a URL such as s3://bucket/run")
    if scheme := broken_scheme(url):
        raise ValueError(f"malformed URL of {scheme!r}; expected {scheme.lower()}://... or a path")
    stripped = url.rstrip("/") or "/"
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", stripped):
        raise ValueError(f"has nothing after the scheme; expected {stripped}//... or a path")
    return stripped if "://" in stripped else f"file://{Path(stripped).expanduser().resolve()}"


Url = Annotated[str, AfterValidator(_without_trailing_slash)]

_NOTICE_SOURCE = re.compile(
    r"auto|(?:aws|gcp|azure)(?::https?://\S+)?|file:/.+|webhook:\S+:(?P<port>\d{1,5})"
)


def _notice_sources(value: object) -> object:
    if value in ("auto", "off"):
        return value
    listed = list(value) if isinstance(value, list | tuple) else [value]
    for each in listed:
        found = _NOTICE_SOURCE.fullmatch(each) if isinstance(each, str) else None
        if found is None or not 1 <= int(found["port"] or 1) <= 65535:
            raise ValueError(
                f"{each!r} is no source; expected 'auto', 'off', or a list of auto, aws, gcp, azure (also as "
                "NAME:http://HOST:PORT), file:/PATH and webhook:ADDRESS:PORT"
            )
    return tuple(listed)


Notices = Annotated[str | tuple[str, ...], BeforeValidator(_notice_sources)]


class Section(BaseModel):
    """A frozen table of the TOML file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunSection(Section):
    """The run directory and the seed."""

    url: Url
    """The run directory: a path or an fsspec URL (file://, s3://, ...). Only this directory has to survive."""
    seed: Seed = 0
    """Seed of the initial weights and of the data order."""


class DataSection(Section):
    """The prepared data, and how it is read."""

    url: Url
    """The directory that `elastic-pt prepare` wrote."""
    sequence_length: Size = 256
    """Tokens per training sequence."""
    shuffle_window_tokens: Annotated[int, Field(ge=1, le=2**50)] = 2**30
    """Tokens that all slots together shuffle at a time; a node whose cache has no room for its share downloads more."""
    prefetch_steps: Count = 2
    """Steps that each worker reads ahead."""
    cache: str = ""
    """Directory for fetched blocks of token shards; empty: one per user in the system's temporary directory."""
    cache_bytes: Annotated[int, Field(ge=1, le=2**60)] = 100 * 2**30
    """Maximum size of that directory in bytes; what no coming step needs is removed first."""
    on_damage: Literal["stop", "skip"] = "stop"
    """What a damaged block does: "stop" ends the run; "skip" leaves its tokens out of training, from a recorded step on."""


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
                f"model.width = {self.width} with model.heads = {self.heads}: "
                "expected width / heads to be an even whole number"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads = {self.kv_heads}: expected a divisor of model.heads = {self.heads}"
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
    """Batch, optimizer and numerics. One step reads `global_batch` sequences, in V = global_batch / micro_batch slots."""

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
    """Share of the run, at its end, in which `wsd` decays the learning rate."""
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
    """Type of activations and matrix products; auto is bfloat16 on CUDA, float32 on CPU. Master weights are float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the workers; auto takes CUDA if there is any."""
    threads: Threads = 1
    """CPU threads per worker. They affect the bits: a matrix product may round differently with another number."""
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
                f"train.global_batch = {self.global_batch}: expected a multiple of "
                f"train.micro_batch = {self.micro_batch}"
            )
        return self

    @property
    def slots(self) -> int:
        """V: micro-batches per step, and the most workers that a run can use."""
        return self.global_batch // self.micro_batch


class ElasticSection(Section):
    """Number of nodes, timeouts, and limits on failures."""

    nodes_min: Count = 1
    """Fewest nodes that train; with fewer the run pauses and keeps its state."""
    nodes_max: Count = 64
    """Most nodes that train; further nodes wait as spares."""
    workers_per_node: Processes = 0
    """Worker processes on this node; 0 takes one per GPU, or one on a CPU node."""
    heartbeat_interval_s: Seconds = 0.2
    """Seconds between two heartbeats to each peer."""
    heartbeat_timeout_s: Seconds = 1.5
    """Seconds without proof of life after which a peer counts as silent; a refused connection counts at once."""
    takeover_s: Seconds = 3.0
    """A node that is cut off from most members waits this many seconds without a change in log or pulse, then takes over."""
    join_window_s: SecondsOrZero = 0.5
    """Seconds without a newcomer before a generation is formed, so that nodes join together."""
    settle_timeout_s: Seconds = 600.0
    """Seconds that nodes wait until the last state of a planned stop is in memory or committed."""
    collective_timeout_s: Seconds = 300.0
    """Seconds after which a collective operation between workers fails."""
    hang_timeout_s: Seconds = 2.0
    """Seconds without Python code after which a worker is killed; longer for a worker with longer known pauses."""
    startup_timeout_s: Seconds = 600.0
    """Seconds that a worker may take for one part of its start, or for its first step."""
    leave_timeout_s: Seconds = 25.0
    """Seconds that a leaving node (SIGTERM) may take until its last state is safe."""
    notices: Notices = "auto"
    """Sources of notices that this machine will be taken away: auto (its cloud), off, or a list of sources."""
    zone: Annotated[str, Field(max_length=100)] = ""
    """This node's zone, such as us-east-1a: nodes that may be lost together. Empty: unknown, which is a zone of its own."""
    port: Port = 0
    """Port on which this node's agent answers its peers; 0 takes a free one. Other ports are always free ones."""
    tls: bool = True
    """Whether agents encrypt what they send each other and prove that they belong to the run; the same on all nodes of a run."""
    retries_without_progress: Count = 3
    """Failures of this node's own workers without a new step before the node leaves the run."""
    flaps_max: Count = 3
    """Times that a node may cause a new generation within `flap_window_s` before it is kept out for a while."""
    flap_window_s: Seconds = 600.0
    """Seconds after which a node's failures are forgotten."""
    quarantine_s: Seconds = 30.0
    """Seconds for which it is kept out the first time; twice as long each further time, at most an hour."""
    same_failures_max: Failures = 3
    """Times that the program may fail in the same way at the same step, on two nodes or alone, before the run stops."""
    failures_max: Failures = 20
    """Worker failures in a row, on any nodes, without a new step before the run stops."""
    chaos: bool = False
    """Whether `elastic-pt chaos live` may kill this node. Only for runs that may be disturbed."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "ElasticSection":
        if self.nodes_min > self.nodes_max:
            raise ValueError(
                f"elastic.nodes_min = {self.nodes_min}: expected at most elastic.nodes_max = {self.nodes_max}"
            )
        if self.heartbeat_timeout_s < 3 * self.heartbeat_interval_s:
            raise ValueError(
                f"elastic.heartbeat_timeout_s = {self.heartbeat_timeout_s}: expected at least three times "
                f"elastic.heartbeat_interval_s = {self.heartbeat_interval_s}"
            )
        if self.takeover_s < 2 * self.heartbeat_timeout_s:
            raise ValueError(
                f"elastic.takeover_s = {self.takeover_s}: expected at least twice "
                f"elastic.heartbeat_timeout_s = {self.heartbeat_timeout_s}, or a node that is cut off could "
                "take over before the others notice"
            )
        return self


class CheckpointSection(Section):
    """How often checkpoints are written, how many are kept, and where states are in memory."""

    every_steps: Count = 50
    """Steps between checkpoints; one waits until the one before is uploaded and the newest snapshot is on all mirrors."""
    snapshot_every_steps: CountOrZero = 0
    """Steps between copies of the state into memory, from which the others resume when a node is lost; 0 chooses by their cost."""
    mirror_copies: Copies = 1
    """Other nodes that hold a copy of each node's state in memory; 0 makes no copies."""
    mirror_zones: bool = False
    """Copy to other zones (`elastic.zone`), which clouds bill; false copies within a zone, and a node alone in its zone has no copy."""
    mirror_bytes_per_s: Annotated[int, Field(ge=0, le=2**50)] = 0
    """Most bytes per second that this node reads for those copies; 0 sets no bound."""
    keep: Count = 3
    """Number of newest commits that are kept; at least two are always kept."""
    keep_every_steps: CountOrZero = 0
    """Keep the first commit at or after each multiple of this many steps permanently; 0 keeps none."""
    tidy: bool = True
    """Whether agents delete old checkpoints and parts of uploads; false leaves all of `ckpt/` to `elastic-pt tidy`."""
    staging: str = "/dev/shm"
    """Local directory, best in memory, where states are kept: those of this node's workers, and copies of other nodes'."""

    @model_validator(mode="after")
    def _staging_is_absolute(self) -> "CheckpointSection":
        if not self.staging.startswith("/"):
            raise ValueError(f"checkpoint.staging = {self.staging!r}: expected an absolute path")
        return self


class EvaluationSection(Section):
    """The held-out loss during training. All nodes must have the same values; a later start may have others."""

    every_steps: CountOrZero = 0
    """Steps between evaluations; one more follows the last step. 0: never."""
    rows: CountOrZero = 256
    """Held-out rows of `data.sequence_length` tokens that an evaluation reads, spread evenly; 0 reads all."""

    def due(self, step: int, last_step: int) -> bool:
        """Whether the state after `step` steps is evaluated."""
        every = self.every_steps
        return every > 0 and (step % every == 0 or step == last_step)


class TelemetrySection(Section):
    """Metrics and events."""

    metrics_address: str = "127.0.0.1"
    """Address on which the agent serves /metrics and /sd; 0.0.0.0 or :: for all of this machine."""
    metrics_port: Port = 0
    """Port of /metrics; 0 takes a free one, which `status` shows."""
    metrics_token_file: str = ""
    """Local file with a token that each request for /metrics and /sd must carry (Authorization: Bearer); empty: none."""
    metrics_certificate_file: str = ""
    """Local PEM file with a certificate chain: /metrics and /sd are served over TLS; empty: plain HTTP."""
    metrics_key_file: str = ""
    """Local PEM file with its private key; empty: the key is in `metrics_certificate_file`."""
    peak_flops: Annotated[float, Field(ge=0.0, le=1e18)] = 0.0
    """FLOP/s of one device for model FLOPs utilization; 0: of a known GPU by its name, else no utilization is shown."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of the events that are written."""
    price_per_hour: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """What one node costs, in USD per hour, for `goodput`; 0 if unknown."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Format of events on standard error; auto is text on a terminal and JSON elsewhere."""
    log_file: str = ""
    """Local file for events as JSON lines, rotated; {node} becomes the node's name, for several nodes on one machine; empty: none."""


class StoreSection(Section):
    """Requests to the bucket."""

    deadline_s: Seconds = 120.0
    """Seconds for which one request to the bucket is retried."""
