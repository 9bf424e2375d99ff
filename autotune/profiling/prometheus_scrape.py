"""One reading of a server's `/metrics`: fetched with care, parsed by the Prometheus client."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.parse import SplitResult, urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families

from autotune.errors import BadInput, EnvironmentMissing

TIMEOUT_S = 5.0
# A server with many labels exposes some megabytes; what is far above is no metrics page.
LARGEST_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 16

# The labels of one series, sorted by name.
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Scrape:
    """Every series of one reading, by the sample's name and its labels.

    `at_s` is on the clock of the one who samples. Counters are named without their `_total`, which
    releases of one server write or leave out.
    """

    at_s: float
    series: Mapping[str, Mapping[Labels, float]]


def metrics_url(text: str) -> str:
    """The address of a metrics endpoint; a server's address gets the path `/metrics`.

    Raises:
        BadInput: it is no http or https address of a server.
    """
    try:
        parts = urlsplit(text.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise BadInput(f"{text!r} is not the address of a server: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise BadInput(f"{text!r} is not the address of a server: write http://host:port/metrics")
    if not host:
        raise BadInput(f"{text!r} names no host: write http://host:port/metrics")
    if parts.username is not None or parts.password is not None:
        raise BadInput(
            "a metrics address with a user and password is not accepted, as it would be written to "
            "the profile: make the endpoint reachable without one"
        )
    path = parts.path if parts.path not in ("", "/") else "/metrics"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def scrape(
    url: str, at_s: float, *, timeout_s: float = TIMEOUT_S, api_key: str | None = None
) -> Scrape:
    """Read an endpoint once; `api_key` is sent as a bearer token.

    Raises:
        EnvironmentMissing: nobody answers, or not in time.
        BadInput: what answers is not a metrics page.
    """
    return parse_metrics(_fetch(url, timeout_s, api_key), at_s, url)


def parse_metrics(text: str, at_s: float, url: str) -> Scrape:
    """The series of a page in the Prometheus text format.

    Raises:
        BadInput: it is in no such format.
    """
    series: dict[str, dict[Labels, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                of_name = series.setdefault(sample.name.removesuffix("_total"), {})
                of_name[tuple(sorted(sample.labels.items()))] = float(sample.value)
    except (ValueError, KeyError, IndexError) as error:
        looks = "a web page" if re.match(r"\s*<", text) else f"text in another format ({error})"
        raise BadInput(
            f"{url} answers with {looks}, not with Prometheus metrics: give the server's /metrics"
        ) from None
    if not series:
        raise BadInput(f"{url} answers with no metrics at all: give the server's /metrics")
    return Scrape(at_s, series)


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects within the host that was named, to no other."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        asked, answered = urlsplit(req.full_url), urlsplit(newurl)
        if answered.scheme not in ("http", "https") or _host(answered) != _host(asked):
            raise BadInput(
                f"{req.full_url} sends to another host, {answered.netloc or newurl}: give the "
                "address of that server if it is meant"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _host(parts: SplitResult) -> tuple[str | None, int | None]:
    return parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _fetch(url: str, timeout_s: float, api_key: str | None) -> str:
    deadline = time.monotonic() + timeout_s
    headers = {"Accept": "text/plain;version=0.0.4"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    # The scheme was checked by `metrics_url`, and redirects are by `_SameHost`.
    request = urllib.request.Request(url, headers=headers)  # noqa: S310
    # Asked as it is loaded: directly, whatever proxies the environment names.
    opener = urllib.request.build_opener(_SameHost, urllib.request.ProxyHandler({}))
    content = bytearray()
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            # A server that trickles would outlast a timeout that holds for each read alone.
            while chunk := answer.read1(_CHUNK_BYTES):
                content += chunk
                if len(content) > LARGEST_BYTES:
                    raise BadInput(
                        f"{url} answers with more than {LARGEST_BYTES >> 20} MiB, which is no "
                        "metrics page"
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        error.close()
        raise _refused(url, error.code) from None
    except TimeoutError:
        raise EnvironmentMissing(f"{url} does not answer within {timeout_s:g} s") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise EnvironmentMissing(f"{url} does not answer within {timeout_s:g} s") from None
        raise EnvironmentMissing(
            f"{url} cannot be reached: {getattr(reason, 'strerror', None) or reason}"
        ) from None
    return content.decode("utf-8", errors="replace")


def _refused(url: str, status: int) -> BadInput | EnvironmentMissing:
    """The error for an answer that is not 200."""
    if status >= 500:
        return EnvironmentMissing(f"{url} answers with the HTTP error {status}")
    hint = (
        ": the usual path is /metrics, and SGLang has it only with --enable-metrics"
        if status == 404
        else ""
    )
    return BadInput(f"{url} answers with the HTTP error {status}{hint}")
