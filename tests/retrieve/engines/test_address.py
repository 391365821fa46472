"""Addresses of vector servers: what they say, and what they may not hold."""

from __future__ import annotations

import pytest

from ultrarag.errors import UsageError
from ultrarag.retrieve.engines.address import parse_uri, with_quantise


def test_an_address_says_where_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    address = parse_uri("qdrant://db.example:7000/kb?tls=true&key_env=MY_KEY&timeout=5")
    assert (address.url, address.name, address.timeout) == ("https://db.example:7000", "kb", 5.0)
    with pytest.raises(UsageError, match="MY_KEY, which is not set"):
        address.secret()
    monkeypatch.setenv("MY_KEY", "s3cret")
    assert address.secret() == "s3cret"
    assert "s3cret" not in repr(address)
    assert parse_uri("milvus://localhost").port == 19530


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("quadrant://x", "did you mean 'qdrant'"),
        ("qdrant://user:s3cret@x", "set QDRANT_API_KEY"),
        ("milvus://x?token=s3cret", "key_env"),
        ("milvus://x?tsl=true", "did you mean 'tls'"),
        ("milvus://x?tls=maybe", "true or false"),
        ("milvus://x?timeout=0", "above 0"),
        ("milvus://x/a-b", "letters, digits"),
        ("milvus://x?quantise=int4", "int8 or binary"),
        ("qdrant:///folder?quantise=int8", "local mode keeps float32"),
        ("milvus:///folder", "names no host"),
        ("qdrant://x:99999", "x:99999"),
    ],
)
def test_a_bad_address_is_refused_without_repeating_a_secret(uri: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_uri(uri)
    assert "s3cret" not in str(caught.value)


def test_an_address_is_given_another_quantise() -> None:
    uri = "qdrant://x/kb?tls=true&quantise=int8&timeout=5"
    assert parse_uri(uri).quantise == "int8"
    assert with_quantise(uri, "binary") == "qdrant://x/kb?tls=true&timeout=5&quantise=binary"
    assert with_quantise("milvus://x?quantise=int8", "") == "milvus://x"
    assert with_quantise(uri, "int8") == uri
