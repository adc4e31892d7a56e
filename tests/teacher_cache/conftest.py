"""An S3 server for the tests of caches in an object store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.s3 import s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of an empty bucket on a server of our own."""
    with s3_server() as url:
        yield url
