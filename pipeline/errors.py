"""The errors a user may meet. Each carries one line: what is wrong, then what to do about it.

`cli.py` is the only place that prints them. They take exactly one string, so that a worker process can pickle them.
"""

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class PipelineError(Exception):
    """Base of every error that is the user's to mend; its message is one line that ends with the remedy."""

    exit_code = 2  # 1 is for what a command found, such as a damaged cache; 2 is for what kept it from running


class ConfigError(PipelineError):
    """A key is unknown, of the wrong type or out of range, or two keys contradict each other."""


class DataError(PipelineError):
    """The images: a path that isn't there, an empty folder, a file that doesn't decode."""


class StorageError(PipelineError):
    """The machine lacks memory or descriptors, or a disk doesn't answer: no fault of the file that was asked for."""


class CacheError(PipelineError):
    """The teacher cache can't be used as asked: absent, of another dataset, teacher or grid, or a full disk."""


class CacheDamage(CacheError):  # noqa: N818 - the name of the fact, not of the exception
    """Bytes of the cache are not what was written; the message names the shard and the sample."""


class TeacherError(PipelineError):
    """A teacher can't be built: unknown spec, weights that aren't there or don't fit."""


class CheckpointError(PipelineError):
    """A checkpoint is absent, torn, or of another architecture."""


class TrainingError(PipelineError):
    """Training can't go on: a non-finite loss, batch sizes that don't divide."""


def suggest(name: str, choices: Iterable[str], otherwise: str) -> str:
    """The end of a line about an unknown name: up to three choices that look like it, or `otherwise`."""
    near = difflib.get_close_matches(name, choices, n=3)
    return f"did you mean {', '.join(repr(choice) for choice in near)}?" if near else otherwise


@contextmanager
def naming_image(name: str, remedy: str) -> Iterator[None]:
    """Name the image that some library fails on: a worker's traceback is gone by the time that a user reads of it.

    Errors of ours pass as they are; they name it, or blame something else.

    Raises:
        DataError: something failed; the message names the image and ends with `remedy`.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        log.debug("image %s", name, exc_info=True)
        reason = " ".join(str(error).split())
        raise DataError(f"image {name}: {type(error).__name__}: {reason}; {remedy}") from error
