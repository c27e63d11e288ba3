"""Removes secrets from events, before any sink has them. Pure.

Two ways, because neither is enough alone:

known values   the run's token and the secrets in this process's environment, wherever they appear in a text
known places   `user:password@` in a URL, query parameters of signed URLs, values of Authorization and Cookie headers,
               private keys in PEM, and whatever has a name such as `password`; the value itself may be unknown

`Redactor.clean` goes through nested values and turns everything that JSON has no type for into text, because only text
can be searched.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import quote, quote_plus, unquote

REDACTED: Final = "[redacted]"
_SECRET_CHARACTERS_MIN: Final = 8
"""A shorter value would also be found in ordinary words."""
_DEPTH_MAX: Final = 16

_SECRET_VARIABLE: Final = re.compile(
    r"(?:SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY_ID|CONNECTION_STRING|WEBHOOK|WEBHOOK_URL|_(?:KEY|PASS|PWD|PAT|SAS))$",
    re.IGNORECASE,
)
_NAMES: Final = (
    r"(?:token|passwords?|passwd|passphrase|secrets?|cookie|authorization|connection[-_]?string|"
    r"(?:api|access|private|secret|encryption|signing|ssh|account|storage)[-_]?key|"
    r"access[-_]?key[-_]?id|googleaccessid)"
)
"""What has such a name, or one that ends so, is secret. Not `key`: keys of the store have that name."""
_VARIABLE_ENDS: Final = r"[A-Z0-9]_(?:KEY|PASS|PWD|PAT|SAS)"
_FIELD: Final = re.compile(
    rf"(?s:.*)(?:(?i:{_NAMES}|[-_]signature|(?:[-_]|\b)(?:credentials?|auth))|{_VARIABLE_ENDS})|(?i:sig|tokens|pass|pwd)"
)
_OPTION: Final = re.compile(rf"--?(?i:[\w-]{{0,40}}?{_NAMES})")
"""In a list of arguments, the next one is its value."""
_HINTS: Final = (
    *("@", "sig", "auth", "bearer", "basic", "credential", "token", "pass", "pwd"),
    *("secret", "key", "accessid", "string", "cookie", "_pat", "_sas"),
)
"""Most texts have none of them, and need no search for places."""
_QUOTED: Final = r"""b?(?P<quote>\\*["'])(?:(?!(?P=quote))(?:\\+["']?|[^\\\r\n]))+"""
r"""From a quote to the next like it. One with more backslashes belongs to the value: 'a\'b', and \"a\\\"b\" within JSON."""
_WORD: Final = r"""(?:[^\s&"']|["'](?=\w)|&(?![\w.-]+=))+"""
"""To the next space, or parameter of a query."""
_PLACES: Final = (
    # To the end of the text if the end of the key is missing. First: other places would hide its beginning.
    (
        re.compile(r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)"),
        REDACTED,
    ),
    # Header lines, also in the text of a dictionary: the value has spaces, so it ends with the quote or the line.
    (
        re.compile(
            rf"""(?i)((?:\b(?:proxy-)?authorization|\b(?:set-)?cookie)\b\\*["']?\s*[:=]\s*)(?:{_QUOTED}|[^\r\n]+)"""
        ),
        rf"\g<1>{REDACTED}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{8,}"), rf"\g<1>\g<2>{REDACTED}"),
    (re.compile(r"(?i)(\bhttps?://)[^\s/?#\"'<>]*@"), rf"\g<1>{REDACTED}@"),
    (re.compile(r"(://)[^\s/?#:@\"'<>]*:(?:(?!://)[^\s?#\"'<>])*@"), rf"\g<1>{REDACTED}@"),
    # name=value, name: value, 'name': 'value', --name value; names of variables in capitals; parameters of a signed query.
    (
        re.compile(
            rf"""((?:(?i:{_NAMES})|{_VARIABLE_ENDS}|\b[Pp]wd)\\*["']?[ \t]*(?:[:=](?!=\s)|%3[ADad])[ \t]*|"""
            rf"""--(?i:[\w-]{{0,40}}?{_NAMES})\\*["']?,?[ \t]+|(?i:signature|sig|credentials?|\b(?:auth|pass))=)(?:{_QUOTED}|{_WORD})"""
        ),
        rf"\g<1>{REDACTED}",
    ),
)
_USER: Final = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,20})://(?P<user>[^\s/?#:@]*)(?::(?P<password>(?:(?!://)[^\s?#])*))?@",
    re.IGNORECASE,
)
"""What is before the last `@` of a URL. Several may be in one text. Passwords may have a `/` that somebody forgot to quote."""


def secrets_in(environment: Mapping[str, str]) -> list[str]:
    """The values of all variables whose name says that they are secret, and passwords in the URLs of others (REDIS_URL)."""
    found = [value for name, value in environment.items() if _SECRET_VARIABLE.search(name)]
    for value in environment.values():
        for url in _USER.finditer(value):
            if url["password"] is not None:
                found += [url["password"], unquote(url["password"])]
            elif url["scheme"].lower() in ("http", "https"):
                found += [url["user"], unquote(url["user"])]
    return found


def without_credentials(url: str) -> str:
    """The URL without password and query. A name before `@` without a password is a part of the address (abfs)."""
    return _USER.sub(_address, url).partition("?")[0]


def _address(url: re.Match[str]) -> str:
    return url[0] if url["password"] is None else f"{url['scheme']}://"


class Redactor:
    """Replaces secrets by `[redacted]`. Immutable, so any thread may use it."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """Values of fewer than eight characters are ignored: they would be found in ordinary words."""
        known = {each.strip() for each in secrets}
        forms = {
            form for each in known if len(each) >= _SECRET_CHARACTERS_MIN for form in _forms(each)
        }
        # The longest first: another secret may be a part of it.
        ordered = sorted(forms, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def text(self, text: str) -> str:
        """The text without secrets."""
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        lowered = text.lower()
        if any(hint in lowered for hint in _HINTS):
            for place, replacement in _PLACES:
                text = place.sub(replacement, text)
        return text

    def clean(self, value: Any, depth: int = 0) -> Any:
        """The value without secrets, of JSON's types only. Never raises."""
        match value:
            case None | bool() | int():
                return value
            case float():
                return value if math.isfinite(value) else str(value)
            case str():
                return self.text(str(value))
            case _ if depth >= _DEPTH_MAX:
                return "..."
            case Mapping():
                return {
                    self.text(_as_text(name)): self._named(name, each, depth)
                    for name, each in value.items()
                }
            case list() | tuple():
                befores = (None, *value[:-1])
                return [
                    REDACTED if _is_option(before) else self.clean(each, depth + 1)
                    for before, each in zip(befores, value, strict=False)
                ]
            case set() | frozenset():
                return [self.clean(each, depth + 1) for each in value]
            case _:
                return self.text(_as_text(value))

    def _named(self, name: Any, value: Any, depth: int) -> Any:
        secret = isinstance(name, str) and _FIELD.fullmatch(name) is not None
        if secret and not isinstance(value, int | float | None):
            return REDACTED if value else ""
        return self.clean(value, depth + 1)


def _is_option(argument: Any) -> bool:
    return isinstance(argument, str) and _OPTION.fullmatch(argument) is not None


def _forms(secret: str) -> set[str]:
    """How a secret appears in a text: as it is, in a URL, and within quotes of JSON or Python."""
    return {
        secret,
        quote(secret, safe=""),
        quote(secret),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        ascii(secret)[1:-1],
    }


def _as_text(value: Any) -> str:
    try:
        return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    except Exception as error:  # any error: an event must never be the reason that a run ends
        return f"<{type(value).__name__}: {type(error).__name__} in its text>"
