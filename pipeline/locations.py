"""Where things lie: in a local folder, or behind a URL."""

import re

SCHEMES = ("s3", "gs", "hf", "https", "http")  # that caches are read from
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_text(name: str) -> bool:
    """Whether a name can be written down: one that is no UTF-8 on the disk arrives with lone surrogates."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


def check_url(url: str) -> str:
    """The URL of a folder, without a slash at its end.

    Raises:
        ValueError: another scheme, no folder, or a password or signature in the URL, which would be logged with it.
    """
    scheme, _, place = url.rstrip("/").partition("://")
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme}:// is not read: give a local folder, s3://, gs://, hf://datasets/ or https://")
    if "@" in place.partition("/")[0] or "?" in place or "#" in place:
        raise ValueError(
            "a URL with a user, a password or a query is refused, for it would be logged: give the library its "
            "credentials in its usual places (AWS_PROFILE, hf auth login, ~/.netrc, ...)"
        )
    if scheme == "hf" and (len(place.split("/")) < 3 or not place.startswith("datasets/")):
        raise ValueError("hf:// needs the kind and the name of the repository: hf://datasets/OWNER/NAME/FOLDER")
    if not place:
        raise ValueError(f"{url} names no folder")
    return f"{scheme}://{place}"
