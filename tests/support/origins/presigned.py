"""Presigned S3 URLs, by AWS's rules for Signature Version 4 in the query string, and nothing else of S3.

Apart from what a node uses to speak to an origin, so that it can stand beside it: the proxy, its tests and the plain
downloads of a benchmark sign with it.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from urllib.parse import quote, urlsplit


def presigned_url(
    endpoint: str,
    key: str,
    access_key: str,
    secret_key: str,
    *,
    method: str = "GET",
    region: str = "us-east-1",
    expires_s: int = 3600,
    query: Mapping[str, str] | None = None,
    now_s: float | None = None,
) -> str:
    """A URL for `key` ("bucket/name") at an endpoint ("http://host:port"), path-style, for whoever has it.

    Only the Host header is signed, so that a request may carry any Range. Source: "Authenticating Requests: Using
    Query Parameters (AWS Signature Version 4)".
    """
    host = urlsplit(endpoint).netloc
    at = time.gmtime(time.time() if now_s is None else now_s)
    moment, day = time.strftime("%Y%m%dT%H%M%SZ", at), time.strftime("%Y%m%d", at)
    scope = f"{day}/{region}/s3/aws4_request"
    asked = {
        **(query or {}),
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{access_key}/{scope}",
        "X-Amz-Date": moment,
        "X-Amz-Expires": str(expires_s),
        "X-Amz-SignedHeaders": "host",
    }
    path = "/" + quote(key, safe="/-_.~")
    line = "&".join(f"{quote(name, safe='-_.~')}={quote(asked[name], safe='-_.~')}" for name in sorted(asked))
    canonical = "\n".join([method, path, line, f"host:{host}\n", "host", "UNSIGNED-PAYLOAD"])
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    signing = b"AWS4" + secret_key.encode()
    for part in (day, region, "s3", "aws4_request"):
        signing = hmac.digest(signing, part.encode(), "sha256")
    text = "\n".join(["AWS4-HMAC-SHA256", moment, scope, digest])
    signature = hmac.digest(signing, text.encode(), "sha256").hex()
    return f"{endpoint}{path}?{line}&X-Amz-Signature={signature}"
