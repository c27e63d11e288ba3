"""What a foreign exception means: every known form of it in libraries and stores."""

import errno

import pytest
from botocore import exceptions as boto
from s3fs.errors import translate_boto_error

from elastic_pt.store.client import Fault, fault_of
from elastic_pt.store.s3 import s3_fault_of


def s3fs_error(code: str, status: int, **details: str) -> Exception:
    """The exception that s3fs raises for an S3 error document."""
    response = {
        "Error": {"Code": code, "Message": "told by the store", **details},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    error = translate_boto_error(boto.ClientError(response, "PutObject"))
    assert isinstance(error, Exception)
    return error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (s3fs_error("PreconditionFailed", 412, Condition="If-None-Match"), Fault.EXISTS),
        (s3fs_error("PreconditionFailed", 412), Fault.EXISTS),
        (s3fs_error("412", 412), Fault.EXISTS),
        (s3fs_error("ConditionalRequestConflict", 409), Fault.TRANSIENT),
        (s3fs_error("OperationAborted", 409), Fault.TRANSIENT),
        (s3fs_error("SlowDown", 503), Fault.TRANSIENT),
        (s3fs_error("InternalError", 500), Fault.TRANSIENT),
        (s3fs_error("InternalError", 200), Fault.TRANSIENT),
        (s3fs_error("RequestTimeout", 400), Fault.TRANSIENT),
        (s3fs_error("NoSuchKey", 404), Fault.MISSING),
        (s3fs_error("404", 404), Fault.MISSING),
        (s3fs_error("NoSuchBucket", 404), Fault.NO_BUCKET),
        (s3fs_error("InvalidRange", 416), Fault.BEYOND),
        (s3fs_error("AccessDenied", 403), Fault.DENIED),
        (s3fs_error("QuotaExceeded", 403), Fault.DENIED),
        (s3fs_error("ExpiredToken", 400), Fault.DENIED),
        (s3fs_error("RequestTimeTooSkewed", 403), Fault.DENIED),
        (s3fs_error("InvalidArgument", 400), Fault.FINAL),
        (s3fs_error("PermanentRedirect", 301), Fault.FINAL),
        (boto.NoCredentialsError(), Fault.DENIED),
        (boto.ReadTimeoutError(endpoint_url="http://x"), Fault.TRANSIENT),
        (boto.EndpointConnectionError(endpoint_url="http://x"), Fault.UNREACHABLE),
        (boto.ConnectionClosedError(endpoint_url="http://x"), Fault.TRANSIENT),
        (boto.ParamValidationError(report="Invalid bucket name"), Fault.NO_BUCKET),
    ],
)
def test_s3_errors_map_by_code_then_status(error: Exception, fault: Fault) -> None:
    """Failed conditions (in both forms), conflicts, throttling and refusals are distinguished."""
    assert s3_fault_of(error) is fault


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (FileNotFoundError("x"), Fault.MISSING),
        (FileExistsError("x"), Fault.EXISTS),
        (PermissionError("x"), Fault.DENIED),
        (OSError("Forbidden: https://storage.googleapis.com/x"), Fault.DENIED),
        (TimeoutError(), Fault.TRANSIENT),
        (ConnectionResetError(), Fault.TRANSIENT),
        (OSError(errno.EIO, "x"), Fault.TRANSIENT),
        (OSError(errno.ENOSPC, "x"), Fault.FINAL),
        (TypeError("x"), Fault.BUG),
        (KeyError("x"), Fault.BUG),
    ],
)
def test_other_errors_map_by_type(error: Exception, fault: Fault) -> None:
    """Python's own types decide; an exception that is not a store's error is a bug."""
    assert fault_of(error) is fault


def test_errors_with_a_status_map_by_status() -> None:
    """gcsfs and adlfs carry the HTTP status on the exception."""

    class HttpError(Exception):
        code = 429

    assert fault_of(HttpError()) is Fault.TRANSIENT
    HttpError.code = 412
    assert fault_of(HttpError()) is Fault.EXISTS
