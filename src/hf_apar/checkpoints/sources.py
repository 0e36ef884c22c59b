"""Where a checkpoint, an adapter or its base is: a folder, or a repository on the Hub; found or missed at once.

transformers takes a name that is no folder for one on the Hub, and asks there again and again where nothing answers. Here a
name is looked up once, before anything is loaded.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_apar.errors import CheckpointError

logger = logging.getLogger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
"""The options of ``from_pretrained`` that say how to get files from the Hub."""

FILES = ("config.json", "adapter_config.json")
"""A checkpoint has one of them."""


@dataclass(frozen=True)
class Source:
    """A folder, or a repository on the Hub that can be read.

    Attributes:
        name: the folder, or the repository's name.
        options: those of ``HUB_OPTIONS`` that its files are got with.
    """

    name: str
    options: Mapping[str, Any]

    def file(self, name: str) -> Path | None:
        """Return the path of one of its files, which is got from the Hub if need be; ``None`` if there is none."""
        if is_folder(self.name):
            path = Path(self.name) / self.options.get("subfolder", "") / name
            return path if path.is_file() else None
        options = {key: value for key, value in self.options.items() if key != "proxies"}
        try:
            return Path(hf_hub_download(self.name, name, **options))
        except LocalEntryNotFoundError as error:  # where the Hub is asked, it is not known whether there is one
            if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
                return None
            raise CheckpointError(f"the Hub does not answer for {name} of {self.name}; try again later") from error
        except EntryNotFoundError:
            return None

    def check_settings(self) -> None:
        """Check that the files of settings hold what they must, see :func:`settings_in`.

        Raises:
            CheckpointError: if one is not.
        """
        for name in _PROBLEMS:
            if (path := self.file(name)) is not None:
                settings_in(path)


def settings_in(path: Path) -> dict[str, Any]:
    """Return the settings that the file ``path`` of a checkpoint holds.

    Raises:
        CheckpointError: if it holds no object of JSON, or something in it is of another kind than it must be.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({_first_line(error)}); copy the checkpoint again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is a {type(settings).__name__}, and must be an object of settings")
    for problem in _PROBLEMS[path.name](settings) if path.name in _PROBLEMS else ():
        raise CheckpointError(f"{path} has {problem}")
    return settings


def _of_generation(settings: Mapping[str, Any]) -> Iterator[str]:
    for name in ("bos_token_id", "eos_token_id"):
        given = settings.get(name)
        if given is not None and not all(type(one) is int for one in (given if isinstance(given, list) else [given])):
            yield f"{name} {str(given)[:80]!r}; it must be the number of a token, or a list of such"
    if type(given := settings.get("pad_token_id", 0)) not in (int, NoneType):
        yield f"pad_token_id {str(given)[:80]!r}; it must be the number of a token, or null"
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        given = settings.get(name, [])
        if given is not None and not (isinstance(given, list) and all(type(one) is int for one in given)):
            yield f"{name} {str(given)[:80]!r}; it must be a list of the numbers of tokens"


def _of_tokenizer(settings: Mapping[str, Any]) -> Iterator[str]:
    for name in ("model_max_length", "max_len"):  # transformers compares it with lengths, whatever it is
        if not isinstance(given := settings.get(name, 0), int | float | None):
            yield f"{name} {str(given)[:80]!r}; it must be a number of tokens, or left out"


def _of_model(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, given in settings.items():
        if name.endswith("_implementation") and "/" in str(given):  # a kernel on the Hub, which transformers gets and runs
            yield f"{name} {str(given)[:80]!r}, which is code from elsewhere; remove it, or pass it yourself"
        if name.endswith("_config") and isinstance(given, dict):
            yield from _of_model(given)


def _of_adapter(settings: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(given := settings.get("revision"), str | None):
        yield f"revision {str(given)[:80]!r}; it must be the name of a revision of its base, or null"
    if settings.get("megatron_config") is not None:  # then PEFT imports the module that stands beside it
        yield "a megatron_config, which names code to import; remove it"


_PROBLEMS: Mapping[str, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "generation_config.json": _of_generation, "tokenizer_config.json": _of_tokenizer, "config.json": _of_model,
    "adapter_config.json": _of_adapter,
}  # fmt: skip


def find_source(name: str | Path, options: Mapping[str, Any] | None = None, *, files: Sequence[str] = FILES) -> Source:
    """Return where ``name`` is.

    Args:
        name: a folder, or a name on the Hub.
        options: of ``HUB_OPTIONS``; where the Hub does not answer, a copy in the cache is taken (``local_files_only``).
        files: it has one of them.

    Raises:
        CheckpointError: if it is nowhere.
    """
    given = {key: value for key, value in (options or {}).items() if value is not None}
    source = Source(str(name), given)
    if is_folder(source.name):
        if not any(source.file(name) for name in files) and not any(Path(source.name).glob("*.gguf")):
            raise CheckpointError(f"the folder {source.name} holds no checkpoint and no adapter: it has no {files[0]}")
        return source
    _refuse_paths(source.name)
    if given.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return _from_cache(source, files, "the Hub is not asked (local_files_only, or HF_HUB_OFFLINE)")
    url = hf_hub_url(source.name, files[0], subfolder=given.get("subfolder"), revision=given.get("revision"))
    try:
        get_hf_file_metadata(url, token=given.get("token"))
    except EntryNotFoundError:
        pass  # it is there, without this file
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(_missing(source, error)) from error
    except Exception as error:  # whatever the network has to say
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise CheckpointError(f"the Hub does not give {source.name}: {_first_line(error)}") from error
        return _from_cache(source, files, f"the Hub does not answer ({_first_line(error)})")
    return source


def is_folder(name: str) -> bool:
    """Is ``name`` an existing folder, which comes before the Hub as everywhere in transformers?"""
    return bool(name) and Path(name).is_dir()


def is_path(name: str) -> bool:
    """Can ``name`` be a path alone, and no name on the Hub?

    >>> [is_path(name) for name in ("/models/gemma", "./gemma", "models/2026/gemma", "google/gemma", "gemma")]
    [True, True, True, False, False]
    """
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name


def _refuse_paths(name: str) -> None:
    if Path(name).is_file():
        raise CheckpointError(f"{name} is a file; give the folder that it lies in")
    if is_path(name):
        raise CheckpointError(f"there is no folder {name}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a name on the Hub") from error


def _from_cache(source: Source, files: Sequence[str], reason: str) -> Source:
    cached = Source(source.name, {**source.options, "local_files_only": True, "force_download": False})
    if not any(cached.file(name) for name in files):
        raise CheckpointError(
            f"there is no folder {source.name} here, {reason}, and no copy is in the cache; give a folder, or come back "
            "when the Hub can be reached"
        )
    if not source.options.get("local_files_only") and not constants.HF_HUB_OFFLINE:
        logger.warning("%s; %s is taken from the cache", reason, source.name)
    return cached


def _missing(source: Source, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"{source.name} on the Hub is gated: ask for access on its page, and pass token="
    if isinstance(error, RevisionNotFoundError):
        return f"{source.name} on the Hub has no revision {source.options.get('revision')}"
    return f"there is no folder {source.name} here, and no model of that name on the Hub that your token may read"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
