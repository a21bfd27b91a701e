"""The errors a user may meet. Each carries one line: what is wrong, then what to do about it.

`cli.py` is the only place that prints them. They take exactly one string, so that a worker process can pickle them.
"""

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

# What is wanted, by pydantic's kind of error; in braces what pydantic knows of it.
_WANTED = {
    "missing": "is missing",
    "extra_forbidden": "is unknown",
    "model": "must be keys and values",
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
    "path": "must be a path",
    "is_instance_of": "must be a path",
    "literal": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "finite_number": "must be a finite number",
    "too_short": "needs {min_length} values or more",
    "too_long": "takes {max_length} values at most",
    "list": "must be a list: [a,b]",
    "tuple": "must be a list: [a,b]",
    "dict": "must be keys and values: {{name: value}}",
}


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


def wanted(problem: Mapping[str, Any]) -> str:
    """What a value must be, of one of the problems that pydantic's ValidationError lists."""
    kind: str = problem["type"]
    if kind == "value_error":  # of a validator here, in words of its own
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["input"] == "":
        return "must not be empty"
    family = kind if kind in _WANTED else kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_error")
    family = "int" if family.startswith("int") else family  # int_parsing_size, int_from_float
    return _WANTED.get(family, "can't be taken").format(**problem.get("ctx", {}))


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
