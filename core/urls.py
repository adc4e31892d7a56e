"""URLs of servers and object stores: which ones are refused, and which stay on this machine."""

from __future__ import annotations

from urllib.parse import urlsplit


def url_problem(text: str) -> str | None:
    """Why the URL (of a folder in an object store, or of a server) is refused; None for others and for paths.

    URLs are saved, printed and logged, so they must not hold a secret; the answer does not repeat them. fsspec takes
    some characters of a key as a pattern, so that a write or a delete would reach other folders.
    """
    scheme, separator, _ = text.partition("://")
    if not separator or scheme == "file":
        return None
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = None
    if parts is None:
        return f"the {scheme} URL cannot be read"
    if parts.password is not None or (parts.username and scheme in ("http", "https")):
        return f"the {scheme} URL holds a user name or password: give credentials by environment variables"
    if parts.query or parts.fragment or "?" in text:
        return f"the {scheme} URL has a query or a fragment (`?`, `#`): give keys by environment variables"
    if scheme not in ("http", "https") and any(character in text for character in "*["):
        return f"the {scheme} URL has `*` or `[`, which the storage driver takes as a pattern: choose another name"
    return None


def exposes_key(url: str) -> bool:
    """Whether others could read a key that is sent to `url`: it goes over plain http to another machine."""
    parts = urlsplit(url)
    return parts.scheme != "https" and not is_loopback(parts.hostname or "")


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine."""
    from ipaddress import ip_address  # only here: --help should be quick

    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
