"""A secret is found in an address before it is stored, and taken out of what an endpoint says."""

from __future__ import annotations

import asyncio
import json

import httpx2
import pytest

from ultrarag.data.synthesize_client import Endpoint, EndpointError
from ultrarag.errors import UsageError
from ultrarag.io import secret_in, without_secret
from ultrarag.retrieve.engines.address import parse_uri

KEY = "sk-secret/0123456789"


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@host/v1",
        "http://s3cret@host/v1",
        "https://host/v1?api-key=s3cret",
        "https://host/v1?API_KEY=s3cret",
        "https://host/v1?x=1&access_token=s3cret",
        "https://host/v1?sig=s3cret",
        "https://host/v1?subscription-key=s3cret",
        "https://host/v1?Ocp-Apim-Subscription-Key=s3cret",
        "https://host/v1?X-Amz-Signature=s3cret",
        "https://host/v1?clientSecret=s3cret",
        "https://host/v1?auth=s3cret",
        "https://host/v1?code=s3cret",
        "https://host/v1#api_key=s3cret",
        "https://host/v1;api_key=s3cret",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(url):
    assert secret_in(url)
    with pytest.raises(UsageError, match="--api_key_env") as refused:
        Endpoint(url, "m")
    assert "s3cret" not in str(refused.value)
    with pytest.raises(UsageError, match="key_env") as refused:
        parse_uri(url.replace("https:", "qdrant:").replace("http:", "qdrant:"))
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://host/v1",
        "https://host/v1?model=key",
        "http://host:80/a@b?tokens_max=3",
        "http://host?max_tokens=3",
        "http://host?monkey=1&author=x&keyword=y#top",
        "http://host/v1?api-version=2026-01-01",
    ],
)
def test_an_address_without_one_is_taken(url):
    assert secret_in(url) is None
    Endpoint(url, "m")


@pytest.mark.parametrize("form", [KEY, KEY.replace("/", "\\/"), KEY.replace("/", "%2F"), "sk-secret/\n0123456789"])
@pytest.mark.parametrize("before", [0, 285, 295, 310])
def test_an_excerpt_holds_no_part_of_the_key(form, before):
    """Cut at 300 characters, an error that repeats the key would keep its beginning."""
    endpoint = Endpoint("http://host/v1", "m", KEY)
    body = "." * before + form + "." * 50

    async def ask() -> None:
        async with endpoint:
            endpoint._client = httpx2.AsyncClient(
                transport=httpx2.MockTransport(lambda request: httpx2.Response(401, text=body))
            )
            await endpoint.ask("?")

    with pytest.raises(EndpointError) as error:
        asyncio.run(ask())
    assert "sk-" not in str(error.value)
    assert "0123" not in str(error.value)


def test_a_text_without_the_key_stays_as_it_is():
    assert without_secret("all is well", KEY) == "all is well"
    assert without_secret("a key", None) == "a key"
    assert without_secret(json.dumps({"key": KEY}), KEY) == '{"key": "***"}'
