"""Secrets in addresses and texts: found in a URL before it is stored or printed, and taken out of what others say."""

from __future__ import annotations

import json
import re
from urllib.parse import parse_qsl, quote, urlsplit

#: Names of query parameters that hold a secret, without case, dashes and underscores.
_SECRET = re.compile(
    r"(api|access|auth|secret|private)?(key|token|secret|password|passwd|pwd|credential|signature|sig)s?"
)


def secret_in(url: str) -> str | None:
    """Name the part of a URL that holds a secret ("a password", "the parameter 'api-key'"); None where none does."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        return "a user or password"
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if _SECRET.fullmatch(re.sub(r"[-_.]", "", name.lower())):
            return f"the parameter '{name}'"
    return None


def without_secret(text: str, secret: str | None) -> str:
    """A text with `***` where it repeats the secret, also as JSON or in a URL, or broken by white space."""
    if not secret:
        return text
    for form in dict.fromkeys((secret, json.dumps(secret)[1:-1], secret.replace("/", r"\/"), quote(secret, safe=""))):
        text = re.sub(r"\s*".join(re.escape(character) for character in form), "***", text)
    return text
