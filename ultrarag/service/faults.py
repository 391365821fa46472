"""Faults: which status an error of the library has over HTTP, and how each kind of client reads it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError

from ultrarag.errors import (
    DataError,
    ExistsError,
    FingerprintError,
    GateError,
    ResourceError,
    UltraragError,
    UsageError,
)
from ultrarag.retrieve.shared import LeaseError

#: Whose client reads the answer: ours and OpenAI's, text-embeddings-inference's, or Cohere's.
Shape = Literal["own", "tei", "cohere"]
#: Error -> status, the first that fits; any other one of the library is a conflict with the index's state.
STATUS: tuple[tuple[type[UltraragError], int], ...] = (
    (FingerprintError, 409),
    (ExistsError, 409),
    (GateError, 409),
    (UsageError, 400),
    (DataError, 400),
    (ResourceError, 503),
    (LeaseError, 503),
    (UltraragError, 409),
)
#: Characters of the message of a value that cannot be used, and of any message: an id may have millions.
_LONGEST, _LONGEST_MESSAGE = 300, 1000
#: What pydantic calls errors whose message says all that there is to say.
_TOLD = ("missing", "json_invalid", "extra_forbidden", "too_short", "too_long", "value_error")


class Fault(UltraragError):
    """A request that is answered with an error of its own status."""

    def __init__(self, status: int, message: str, kind: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(_shortened(message, _LONGEST_MESSAGE))
        self.status, self.kind, self.headers = status, kind or _KINDS.get(status, "error"), headers or {}


_KINDS = {
    400: "UsageError",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    408: "RequestTimeout",
    409: "Conflict",
    413: "TooLarge",
    415: "UnsupportedMediaType",
    421: "MisdirectedRequest",
    429: "TooManyRequests",
    500: "InternalError",
    503: "Unavailable",
}


def fault_of(error: Exception, stopping: bool = False) -> Fault:
    """The answer to an error that was raised on purpose; of any other one it tells nothing."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, ValidationError):
        return Fault(400, invalid(error))
    if isinstance(error, UltraragError):
        status = next(status for kind, status in STATUS if isinstance(error, kind))
        if stopping and status == 409:
            return Fault(503, "the service is stopping; ask again", "Unavailable", {"Retry-After": "5"})
        return Fault(status, str(error), type(error).__name__, {"Retry-After": "2"} if status == 503 else {})
    return Fault(500, "the service failed; its log says where, under this request's id (X-Request-Id)")


def invalid(error: ValidationError) -> str:
    """What is wrong with a request, in a line: the first field, and how many more there are."""
    first, *others = error.errors(include_url=False, include_context=False)
    place = ".".join(str(part) for part in first["loc"])
    found = "" if first["type"] in _TOLD else f", not {_shown(first['input'])}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{f'{place!r}: ' if place else ''}{first['msg'].removeprefix('Value error, ')}{found}{more}"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else f"{type(value).__name__} of {len(value)}"
    return _shortened(text, _LONGEST)


def _shortened(text: str, most: int) -> str:
    """A text without its middle where it is too long: what is wrong comes first, and what to do last."""
    if len(text) <= most:
        return text
    return f"{text[: most - most // 3]} ... {text[len(text) - most // 3 :]}"


def body_of(fault: Fault, shape: Shape) -> dict[str, Any]:
    """The JSON of an error, as the client of that shape reads it."""
    if shape == "tei":
        return {"error": str(fault), "error_type": fault.kind}
    if shape == "cohere":
        return {"message": str(fault)}
    return {"error": {"message": str(fault), "type": fault.kind, "code": fault.status, "param": None}}
