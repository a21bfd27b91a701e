"""Images that can't be read, found before the first step rather than after the first epoch."""

import numpy as np

from pipeline.data.decoding import decode
from pipeline.data.images import ImageSource
from pipeline.errors import DataError

_LOOKED_AT = 16  # a fault of all files, such as pointers that git-lfs left, is found; a single torn one need not be


def check_readable(source: ImageSource) -> None:
    """Look for empty files, by the lengths that the listing has, and decode a few images spread over the whole.

    To decode all of them would take as long as an epoch.

    Raises:
        DataError: an image is empty, a link to nowhere, or doesn't decode; the line names it and counts its like.
    """
    empty = np.flatnonzero(source.lengths == 0)
    if len(empty):
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise DataError(
            f"{source.root}: image {source.key(int(empty[0]))} is empty, or a link to nowhere{more}: "
            "restore the file or take it away"
        )
    for index in dict.fromkeys(place * len(source) // _LOOKED_AT for place in range(_LOOKED_AT)):
        data = source.read(index)
        try:
            decode(data)
        except DataError as error:
            raise DataError(f"image {source.key(index)}: {error}; repair it or take it away") from error
