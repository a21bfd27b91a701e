"""Code of a user's own, loaded before a command reads its config: `mrmae --plugin FILE.py COMMAND ...`.

Such code registers objectives (`pipeline.models.OBJECTIVES`), teachers (`pipeline.teachers.TEACHERS`) and timm models.
Only a name on the command line loads code: no config, environment variable or file of the current folder does.
"""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from pipeline.errors import ConfigError
from pipeline.files import hash_source

OPTION = "--plugin"
# Name as another process can load it (a file's is absolute) → hash of the file that was loaded.
_loaded: dict[str, str] = {}


def load_plugins(names: Iterable[str]) -> None:
    """Import each plug-in, in order, unless it is loaded already.

    Processes that a command forks (loaders of data) have what it registers. Commands that a command starts (`ablate`,
    `bootstrap`) get the same options: see `plugin_options`.

    Args:
        names: each a file by its path, which ends in .py, or an installed module by its dotted name.

    Raises:
        ConfigError: there is no such file or module, its name is taken, or its code raises.
    """
    for name in names:
        file = Path(os.path.expanduser(name)).resolve() if name.endswith(".py") or os.sep in name else None
        portable = name if file is None else str(file)
        if portable not in _loaded:
            module = _load(name, file)
            source = getattr(module, "__file__", None)  # a module that is built in has none
            _loaded[portable] = f"{hash_source(Path(source).read_bytes()):016x}" if source else ""


def plugin_options() -> list[str]:
    """The options by which another `mrmae` loads what this process has loaded."""
    return [word for name in _loaded for word in (OPTION, name)]


def plugin_hashes() -> dict[str, str]:
    """Name of each loaded file or module, without its folder → xxh3-64 of its file, in hex."""
    return {Path(name).name: digest for name, digest in _loaded.items()}


def _load(name: str, file: Path | None) -> ModuleType:
    if file is not None and not file.is_file():
        raise ConfigError(f"{OPTION} {name}: no such file")
    try:
        if file is None:
            return importlib.import_module(name)
        return _run(name, file)
    except ModuleNotFoundError as error:
        if file is None and error.name == name.split(".")[0]:
            raise ConfigError(
                f"{OPTION} {name}: no such module is installed; give a file by its path, as in ./{name}.py"
            ) from error
        raise _fault(name, error) from error
    except ConfigError:
        raise
    except Exception as error:
        raise _fault(name, error) from error


def _run(name: str, file: Path) -> ModuleType:
    """Import a file as the module of its name, so that what it defines can be pickled and is named well.

    Raises:
        ConfigError: a module of that name is there already.
    """
    if not file.stem.isidentifier():
        raise ConfigError(f"{OPTION} {name}: {file.stem} is no name of a module: use letters, digits and '_'")
    found = importlib.util.find_spec(file.stem)
    if found is not None and (found.origin is None or Path(found.origin).resolve() != file):
        raise ConfigError(f"{OPTION} {name}: there is another module '{file.stem}': rename the file")
    if file.stem in sys.modules:
        return sys.modules[file.stem]
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{OPTION} {name}: a plug-in's name ends in .py")
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module


def _fault(name: str, error: Exception) -> ConfigError:
    """What the code raised, and the line where."""
    line = error.lineno if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1].lineno
    reason = str(error).strip().partition("\n")[0] or "no reason given"
    return ConfigError(f"{OPTION} {name} can't be loaded: {type(error).__name__}, line {line}: {reason}")
