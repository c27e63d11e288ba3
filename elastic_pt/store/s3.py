"""S3 and compatible stores, through s3fs.

Create-once is one PutObject with `If-None-Match: *`. It is never a multipart upload, because some stores
ignore the condition there. Large objects are uploaded in parts; each part is a request with its own
deadline. The object appears under its key when the last request completes the upload. A writer that dies
leaves only parts, never a partial object. `unfinished` and `abandon` let the run remove those. The bucket should
still have an `AbortIncompleteMultipartUpload` rule, for runs that do not continue.

Endpoint, region, credentials and checksums come from the standard AWS environment and files
(`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_PROFILE`, `AWS_REQUEST_CHECKSUM_CALCULATION`, ...). s3fs and
botocore do not retry; `store/retry.py` does.
"""

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as boto
from botocore.credentials import RefreshableCredentials
from fsspec.asyn import sync

from elastic_pt.errors import AlreadyExists, ConfigError, NotFound
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.store.client import BeyondEnd, Client, Fault, fault_of, fault_of_status
from elastic_pt.store.observer import Observer
from elastic_pt.store.port import (
    Credentials,
    Source,
    UnfinishedUpload,
    as_part,
    checked_key,
    checked_prefix,
    checked_range,
    checked_record,
    checked_source,
    checked_whole,
    holds,
)
from elastic_pt.store.retry import Retry

Result = TypeVar("Result")

PART_BYTES = 16 * 2**20
PARTS_LIMIT = 10_000
PARTS_AT_ONCE = 4
UNFINISHED_PER_PAGE = 1000
UNFINISHED_PAGES_MAX = 10
"""Limit of requests for one list of unfinished uploads."""

_UPLOAD_NONCE = "elastic-pt-upload"

_FAULT_OF_CODE = {
    "NoSuchBucket": Fault.NO_BUCKET,
    "InvalidBucketName": Fault.NO_BUCKET,
    # These come with status 400, although other credentials or another attempt may succeed.
    "ExpiredToken": Fault.DENIED,
    "InvalidToken": Fault.DENIED,
    "TokenRefreshRequired": Fault.DENIED,
    "RequestTimeout": Fault.TRANSIENT,
    "IncompleteBody": Fault.TRANSIENT,
    "BadDigest": Fault.TRANSIENT,
    "XAmzContentSHA256Mismatch": Fault.TRANSIENT,
    "SlowDown": Fault.TRANSIENT,
    "InternalError": Fault.TRANSIENT,  # may come with status 200 when an upload is completed
    "PreconditionFailed": Fault.EXISTS,
}


_NO_LOGIN = (
    boto.NoCredentialsError,
    boto.CredentialRetrievalError,
    boto.SSOError,
    boto.TokenRetrievalError,
    boto.NoAuthTokenError,
    boto.LoginError,
)
# Errors in the user's settings, raised before any request is sent.
_SETTINGS = (
    boto.ConfigNotFound,
    boto.ConfigParseError,
    boto.InfiniteLoopConfigError,
    boto.InvalidChecksumConfigError,
    boto.InvalidConfigError,
    boto.InvalidDefaultsMode,
    boto.InvalidEndpointConfigurationError,
    boto.InvalidIMDSEndpointError,
    boto.InvalidProxiesConfigError,
    boto.InvalidRegionError,
    boto.InvalidRetryConfigurationError,
    boto.InvalidRetryModeError,
    boto.InvalidS3AddressingStyleError,
    boto.MissingDependencyException,
    boto.NoRegionError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.UnknownCredentialError,
    boto.UnknownSignatureVersionError,
)


_OF_A_SERVER = (Fault.MISSING, Fault.EXISTS, Fault.BEYOND)


def s3_fault_of(error: Exception) -> Fault:
    """What an exception of s3fs means: by the S3 error code, then the status, then the Python type."""
    response = _response(error)
    if response is not None:
        code = str(response.get("Error", {}).get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _FAULT_OF_CODE:
            return _FAULT_OF_CODE[code]
        return fault_of_status(int(code) if code.isdigit() else int(status))
    if isinstance(error, boto.ParamValidationError):
        return Fault.NO_BUCKET
    if isinstance(error, _NO_LOGIN):
        return Fault.DENIED
    if isinstance(error, _SETTINGS) or _is_invalid_endpoint(error):
        return Fault.SETTINGS
    if isinstance(error, boto.HTTPClientError) and isinstance(
        error.kwargs.get("error"), (FileNotFoundError, PermissionError, IsADirectoryError)
    ):
        return Fault.SETTINGS
    if isinstance(error, boto.EndpointConnectionError):
        return Fault.UNREACHABLE
    if isinstance(error, (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)):
        return Fault.TRANSIENT
    if type(error).__name__ == "ResponseParserError":  # a proxy's HTML page instead of XML
        return Fault.TRANSIENT
    fault = fault_of(error)
    # No server sent this error. It is about a local file, such as CA certificates or a token.
    return Fault.SETTINGS if fault in _OF_A_SERVER else fault


def _is_invalid_endpoint(error: Exception) -> bool:
    return isinstance(error, ValueError) and "endpoint" in str(error).lower()


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse AWS settings with which every request would fail. The `ConfigError` names the variable.

    The libraries would retry for minutes, or fail without naming it.
    """
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        url = environment.get(name, "")
        if url and not _is_web_address(url):
            raise ConfigError(f"{name} = {url!r}: expected a URL such as https://host:9000")
    token = environment.get("AWS_WEB_IDENTITY_TOKEN_FILE", "")
    if token and not Path(token).exists():
        raise ConfigError(
            f"AWS_WEB_IDENTITY_TOKEN_FILE = {token!r}: no such file; expected the token of a service account"
        )
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        path = environment.get(name, "")
        if path and not Path(path).exists():
            raise ConfigError(
                f"{name} = {path!r}: no such file; expected a file of CA certificates"
            )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        value = environment.get(name, "")
        # The value itself is a secret and is not shown.
        if not value.isprintable() or value != value.strip():
            raise ConfigError(
                f"{name}: contains a line end, a leading or trailing space, or another control character; "
                "expected the key alone"
            )


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket is not closed, or the port is no number
        return False


def _response(error: BaseException | None) -> dict[str, Any] | None:
    while error is not None:
        if isinstance(error, boto.ClientError):
            return dict(error.response)
        error = error.__cause__
    return None


async def _body(filesystem: Any, wanted: dict[str, str], whole: str) -> bytes:
    """The bytes of an object. `whole` is what the error says for a large one, or empty if any size is wanted."""
    # Not s3fs's cat_file: it requests the size first, may mix two versions of a large object, and parses
    # a "?versionId=" in a key.
    response = await filesystem._call_s3("get_object", **wanted)
    try:
        if whole:
            checked_whole(whole, int(response.get("ContentLength", 0)))
        return bytes(await response["Body"].read())
    finally:
        response["Body"].close()


def _without_library_retries(filesystem: Any) -> None:
    filesystem.retries = 1


class S3Store:
    """A `Store` below `s3://bucket/prefix`. Needs Get, Put, List and DeleteObject there.

    Without the permission to list, S3 answers 403 for a missing object, and `AccessDenied` is raised.
    """

    def __init__(
        self, url: str, *, retry: Retry, patient: bool = True, observer: Observer | None = None
    ) -> None:
        bucket, _, root = url.partition("://")[2].partition("/")
        if not bucket:
            raise ConfigError(f"{url} names no bucket; expected s3://bucket/run")
        check_environment(os.environ)
        # They log the traceback of each error that they raise. Without any handler, Python would print it.
        for name in ("botocore", "aiobotocore"):
            logging.getLogger(name).addHandler(logging.NullHandler())
        self._bucket = bucket
        self._root = f"{root}/" if root else ""
        self._clock_ahead_s: float | None = None
        read_timeout_s = min(60.0, retry.timeout_s / 2)
        self._client = Client(
            url,
            retry=retry,
            options={
                "config_kwargs": {
                    # Not max_attempts: it counts only the retries.
                    "retries": {"mode": "standard", "total_max_attempts": 1},
                    "connect_timeout": min(5.0, read_timeout_s),
                    "read_timeout": read_timeout_s,
                    "max_pool_connections": 64,
                    "tcp_keepalive": True,
                }
            },
            configure=_without_library_retries,
            fault_of=s3_fault_of,
            patient=patient,
            observer=observer,
        )

    @property
    def url(self) -> str:
        """The URL of the store, without a trailing slash."""
        return self._client.url

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """See `Store.read`: one GET, whatever the size."""
        checked_range(start, end)
        wanted = {"Bucket": self._bucket, "Key": self._name(key)}
        if start or end is not None:
            wanted["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        if start == end:
            return b""
        whole = f"reading {key} of {self.url}" if end is None else ""

        def send(filesystem: Any, root: str, timeout: dict[str, float]) -> bytes:
            return bytes(sync(filesystem.loop, _body, filesystem, wanted, whole, **timeout))

        try:
            return self._client.request(f"reading {key}", send, bounded=end is not None)
        except BeyondEnd:
            return b""

    def create(self, key: str, data: bytes) -> None:
        """See `Store.create`: one conditional PUT, and a read of the object if the condition failed."""
        body = checked_record(data)
        try:
            self._call(f"creating {key}", "put_object", key, Body=body, IfNoneMatch="*")
        except AlreadyExists:
            if not holds(self, key, data):
                raise

    def write(self, key: str, source: Source) -> None:
        """See `Store.write`: one PUT, or a multipart upload above two parts."""
        size = checked_source(source)
        if size > 2 * PART_BYTES:
            self.write_in_parts(key, source)
        else:
            body = _bytes_at(source, 0, size)
            self._call(f"writing {key}", "put_object", key, Body=body)

    def size(self, key: str) -> int | None:
        """See `Store.size`."""
        try:
            return int(self._call(f"measuring {key}", "head_object", key)["ContentLength"])
        except NotFound:
            return None

    def keys(self, prefix: str) -> list[str]:
        """See `Store.keys`: one request per thousand keys."""
        found: list[str] = []
        more: dict[str, str] = {}
        listed = {"Bucket": self._bucket, "Prefix": self._root + checked_prefix(prefix)}
        while True:
            page = self._request(f"listing {prefix}", "list_objects_v2", **listed, **more)
            found += [entry["Key"][len(self._root) :] for entry in page.get("Contents", [])]
            if not page.get("IsTruncated"):
                return sorted(key for key in found if key and not key.endswith("/"))
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self._call(f"deleting {key}", "delete_object", key)

    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        """See `KeepsUnfinished.unfinished`. Needs ListBucketMultipartUploads on the bucket."""
        found: list[UnfinishedUpload] = []
        more: dict[str, str] = {}
        listed: dict[str, Any] = {
            "Bucket": self._bucket,
            "Prefix": self._root + checked_prefix(prefix),
            "MaxUploads": UNFINISHED_PER_PAGE,
        }
        what = f"listing unfinished uploads of {prefix}"
        for _ in range(UNFINISHED_PAGES_MAX):
            page = self._request(what, "list_multipart_uploads", **listed, **more)
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            for entry in page.get("Uploads", []):
                age_s = (now - entry["Initiated"]).total_seconds()
                key = entry["Key"][len(self._root) :]
                found.append(UnfinishedUpload(key, entry["UploadId"], age_s))
            if not page.get("IsTruncated"):
                break
            more = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }
        return found

    def abandon(self, upload: UnfinishedUpload) -> None:
        """See `KeepsUnfinished.abandon`."""
        with contextlib.suppress(NotFound):
            self._call(
                f"abandoning {upload.key}",
                "abort_multipart_upload",
                upload.key,
                UploadId=upload.upload_id,
            )

    def expires_unfinished(self, prefix: str) -> bool:
        """See `KeepsUnfinished.expires_unfinished`. Needs GetLifecycleConfiguration on the bucket."""
        return any(_ends_uploads(rule) for rule in self._rules(prefix))

    def write_in_parts(self, key: str, source: Source) -> None:
        """See `Examinable.write_in_parts`."""
        size = checked_source(source)
        nonce = uuid.uuid4().hex
        what = f"writing {key}"
        part_bytes = max(PART_BYTES, -(-size // PARTS_LIMIT))
        upload = self._call(what, "create_multipart_upload", key, Metadata={_UPLOAD_NONCE: nonce})[
            "UploadId"
        ]

        def send_part(number: int) -> dict[str, Any]:
            body = _bytes_at(source, (number - 1) * part_bytes, part_bytes)
            sent = self._call(
                what, "upload_part", key, UploadId=upload, PartNumber=number, Body=body
            )
            failpoint(Failpoint.OBJECT_PART)
            return {"PartNumber": number, "ETag": sent["ETag"]}

        try:
            numbers = range(1, -(-size // part_bytes) + 1)
            parts = _in_threads(send_part, numbers)
            failpoint(Failpoint.OBJECT_PARTS)
            self._complete(key, upload, parts, nonce)
        except BaseException:
            self._abort(key, upload)
            raise

    def begin_upload(self, key: str) -> UnfinishedUpload:
        """See `Examinable.begin_upload`."""
        begun = self._call(f"writing {key}", "create_multipart_upload", key)
        return UnfinishedUpload(key, begun["UploadId"], 0.0)

    @property
    def clock_ahead_s(self) -> float | None:
        """See `Examinable.clock_ahead_s`."""
        return self._clock_ahead_s

    def credentials(self) -> Credentials:
        """See `Examinable.credentials`."""

        def send(filesystem: Any, root: str, timeout: dict[str, float]) -> Credentials:
            found: Credentials = sync(filesystem.loop, _credentials, filesystem, **timeout)
            return found

        return self._client.request("finding the credentials", send)

    def keeps_all_versions(self, prefix: str) -> bool:
        """See `Examinable.keeps_all_versions`. Needs GetBucketVersioning, and GetLifecycleConfiguration if they are kept."""
        found = self._request(
            "reading the versioning", "get_bucket_versioning", Bucket=self._bucket
        )
        if found.get("Status") != "Enabled":
            return False
        return not any("NoncurrentVersionExpiration" in rule for rule in self._rules(prefix))

    def _rules(self, prefix: str) -> list[Mapping[str, Any]]:
        """The lifecycle rules in force for all keys that start with `prefix`."""
        what, root = "reading the lifecycle rules", self._root + checked_prefix(prefix)
        try:
            found = self._request(what, "get_bucket_lifecycle_configuration", Bucket=self._bucket)
        except NotFound:
            # The bucket has no rules at all.
            return []
        return [rule for rule in found.get("Rules", []) if _is_for(rule, root)]

    def _name(self, key: str) -> str:
        return self._root + checked_key(key)

    def _call(self, what: str, method: str, key: str, **arguments: Any) -> dict[str, Any]:
        return self._request(what, method, Bucket=self._bucket, Key=self._name(key), **arguments)

    def _request(self, what: str, method: str, **arguments: Any) -> dict[str, Any]:
        def send(filesystem: Any, root: str, timeout: dict[str, float]) -> dict[str, Any]:
            try:
                answer = dict(filesystem.call_s3(method, **arguments, **timeout))
            except Exception as error:
                self._note_time(_response(error) or {})
                raise
            self._note_time(answer)
            return answer

        return self._client.request(what, send, sends=len(arguments.get("Body", b"")))

    def _note_time(self, answer: Mapping[str, Any]) -> None:
        told = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        if told:
            with contextlib.suppress(ValueError):
                # The server's second has begun up to a second ago.
                server_s = parsedate_to_datetime(told).timestamp() + 0.5
                self._clock_ahead_s = time.time() - server_s

    def _complete(self, key: str, upload: str, parts: list[dict[str, Any]], nonce: str) -> None:
        complete = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        try:
            self._call(f"writing {key}", "complete_multipart_upload", key, **complete)
        except NotFound:
            # The upload is gone. If the object has our nonce, an earlier attempt completed the upload and its
            # response was lost.
            head = self._call(f"writing {key}", "head_object", key)
            if head.get("Metadata", {}).get(_UPLOAD_NONCE) != nonce:
                raise

    def _abort(self, key: str, upload: str) -> None:
        # The first error is the one to report; the bucket's lifecycle rule removes the parts.
        with contextlib.suppress(Exception):
            self._call(
                f"aborting the upload of {key}", "abort_multipart_upload", key, UploadId=upload
            )


async def _credentials(filesystem: Any) -> Credentials:
    await filesystem.set_session()
    found = await filesystem.session.get_credentials()
    if found is None:
        return Credentials("", renewed=False)
    # Those of the environment are read again, too, but the environment of a process does not change.
    if isinstance(found, RefreshableCredentials) and found.method != "env":
        return Credentials(found.method, renewed=True)
    temporary = bool((await found.get_frozen_credentials()).token)
    expires = os.environ.get("AWS_CREDENTIAL_EXPIRATION", "") if found.method == "env" else ""
    return Credentials(found.method, renewed=not temporary, expires=expires)


def _is_for(rule: Mapping[str, Any], prefix: str) -> bool:
    """Whether a lifecycle rule is in force for all keys that start with `prefix`."""
    below = rule.get("Filter", {}).get("Prefix", rule.get("Prefix", ""))
    return rule.get("Status") == "Enabled" and prefix.startswith(below)


def _ends_uploads(rule: Mapping[str, Any]) -> bool:
    """Whether a lifecycle rule ends unfinished uploads."""
    return bool(rule.get("AbortIncompleteMultipartUpload", {}).get("DaysAfterInitiation"))


def _in_threads(send: Callable[[int], Result], numbers: range) -> list[Result]:
    with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="store-part") as pool:
        sent = [pool.submit(send, number) for number in numbers]
        try:
            return [future.result() for future in sent]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _bytes_at(source: Source, start: int, count: int) -> bytes:
    if isinstance(source, bytes):
        return source[start : start + count]
    return as_part(source).read(start, count)
