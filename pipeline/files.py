"""Files: what their bytes are known by."""

import xxhash


def hash_source(content: bytes) -> int:
    """xxh3-64 of an image file: what a cache's `source_hash` holds."""
    return xxhash.xxh3_64_intdigest(content)
