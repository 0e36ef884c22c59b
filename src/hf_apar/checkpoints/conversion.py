"""What takes long to convert is kept as safetensors in the user's cache directory: the weights of the default model.

Nothing depends on it. What is damaged is made again, where nothing can be written everything works as without it, and two
processes may do the same at once: an entry appears complete, by one renaming, and whoever comes second keeps what is there.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.errors import ConfigurationError

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]

logger = logging.getLogger(__name__)

_FORMAT = 1
_MANIFEST = "manifest.json"
_UNUSED_SECONDS = 30 * 24 * 3600
_NO_CODE = {"trust_remote_code": False}  # where nothing is said, transformers would ask on the terminal


def cache_directory() -> Path | None:
    """Return where converted weights are kept: ``$HF_APAR_CACHE``, else the user's cache directory; ``off`` is nowhere."""
    if chosen := os.environ.get("HF_APAR_CACHE"):
        return None if chosen == "off" else Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_apar"
    except RuntimeError:  # a user without a home
        return None


def taken_dtype(dtype: torch.dtype | str, options: dict[str, Any]) -> torch.dtype | str:
    """Return the number format that ``from_pretrained`` is asked for, and take its former name out of ``options``.

    >>> taken_dtype("bfloat16", {}), taken_dtype("auto", {"torch_dtype": torch.float16}), taken_dtype("auto", {})
    (torch.bfloat16, torch.float16, 'auto')

    Raises:
        ConfigurationError: if it is a text, and no name of a format.
    """
    former = options.pop("torch_dtype", None)
    chosen = dtype if former is None else former
    if not isinstance(chosen, str) or chosen == "auto":
        return chosen
    found = getattr(torch, chosen.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigurationError(f"dtype is {chosen!r}; give 'auto', or a number format such as 'bfloat16'")
    return found


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights of ``model`` as ``from_pretrained`` does: neither buffers, as RoPE's, nor what stays in float32."""
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        kept |= {*(model._keep_in_fp32_modules or ())}
    for name, parameter in model.named_parameters():
        precise = any(f".{part}." in f".{name}." for part in kept)
        parameter.data = parameter.data.to(torch.float32 if precise else dtype)
    model.config.dtype = dtype
    return model


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def without_numbers(model: PreTrainedModel) -> str | None:
    """Return the name of a weight with NaN or infinity among its values, ``None`` where all that are here are numbers."""
    for name, parameter in model.named_parameters():
        known = parameter.dtype in _FLOATS and not parameter.is_meta and parameter.numel()
        if known and not torch.stack(parameter.detach().aminmax()).isfinite().all():
            return name
    return None


def forget_quantization(model: PreTrainedModel) -> None:
    """Undo the marks of a GGUF file on a model whose weights are plain already: they forbid casting and saving."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def converted(
    name: str, sources: Sequence[Path], convert: Callable[..., Pair], dtype: torch.dtype | str, options: Mapping[str, Any]
) -> Pair:
    """Return what ``convert`` gives, cast to ``dtype``: from the cache where it is there and whole, else made and kept.

    Args:
        name: of the entry in the cache.
        sources: the files that ``convert`` reads: where one has changed it is called again.
        dtype: ``"auto"`` is float32, in which the entry is kept.
        convert: gives a model in float32 that can be saved, and its tokenizer; it takes ``options``, too.
        options: those of ``AutoModelForCausalLM.from_pretrained``, for what is loaded from the cache.
    """
    dtype = torch.float32 if isinstance(dtype, str) else dtype
    parent = cache_directory()
    folder = None if parent is None or not _is_own(parent) else parent / f"{name}-{_key(sources)}"
    pair = None if folder is None else _read(folder, dtype, options)
    if pair is None:
        folder = None if folder is None or not _can_be_kept(folder) else folder
        logger.info("converting the weights of %s%s", name, "" if folder is None else "; only the first time takes so long")
        pair = _made(convert, folder, dtype, options)
    pair[0].config.dtype = dtype
    return pair


def _made(convert: Callable[..., Pair], folder: Path | None, dtype: torch.dtype, options: Mapping[str, Any]) -> Pair:
    if folder is None:
        pair = convert(**options)
    else:
        pair = convert()  # what is kept serves any options
        _keep(pair, folder)
        if options:
            if kept := _read(folder, dtype, options):
                return kept
            pair = convert(**options)  # the disk is full
    cast_parameters(pair[0], dtype)
    return pair


def _key(sources: Sequence[Path]) -> str:
    """Return a name for what the files hold and for the programs that convert them."""
    try:
        ours = version("hf_apar")
    except PackageNotFoundError:
        ours = ""
    theirs = version("transformers").split(".")[:2]
    parts = [_FORMAT, ours, theirs, [[file.name, _digest(file)] for file in sources]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read(folder: Path, dtype: torch.dtype, options: Mapping[str, Any]) -> Pair | None:
    """Return the entry in ``folder``, or ``None`` where it is missing, damaged or gone while it was read."""
    if not _is_whole(folder):
        return None
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **{**_NO_CODE, **options})
        tokenizer = AutoTokenizer.from_pretrained(folder, **_NO_CODE)
    except Exception:
        if _is_whole(folder):  # then it is the options
            raise
        return None
    with suppress(OSError):
        os.utime(folder)  # it is in use
    return model, tokenizer


def _is_own(folder: Path) -> bool:
    """Can nobody but the user and the administrator have written there, as far as the system tells?"""
    if sys.platform == "win32" or not folder.exists():
        return True
    told, user = folder.stat(), os.getuid()
    shared = told.st_mode & stat.S_IWOTH and not told.st_mode & stat.S_ISVTX  # where all may write, and not as in /tmp
    if (user in (0, told.st_uid) or told.st_uid == 0) and not shared:
        return True
    logger.warning(
        "%s is not used as a cache, and loading takes longer: others may write there; make it yours alone (chmod o-w), or "
        "name another folder with HF_APAR_CACHE", folder,
    )  # fmt: skip
    return False


def _is_whole(folder: Path) -> bool:
    """Does ``folder`` hold what was written, and nothing else?"""
    if not folder.is_dir() or not _is_own(folder):
        return False
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        found = {file.name for file in folder.iterdir() if file.is_file()} - {_MANIFEST}
        damaged = sorted(found ^ manifest.keys()) or [name for name in found if _digest(folder / name) != manifest[name]]
        if damaged or not found:
            raise ValueError(f"{', '.join(damaged)[:200]} is not what was written")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:  # gone, changed, other JSON
        logger.info("%s cannot be used and is made again: %s", folder, error)
        return False
    return True


def _can_be_kept(folder: Path) -> bool:
    """Can anything be written beside ``folder``? Asked before minutes are spent on what is to lie there."""
    try:
        folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            return True
    except OSError as error:  # a read-only home
        logger.info("%s cannot be kept: %s", folder, error)
        return False


def _keep(pair: Pair, folder: Path) -> None:
    try:
        _forget_unused(folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir(mode=0o755)
            for part in pair:
                part.save_pretrained(new)
            digests = {file.name: _digest(file) for file in sorted(new.iterdir())}
            (new / _MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
            if _is_whole(folder):  # another process was faster
                return
            if os.path.lexists(folder):
                os.rename(folder, Path(temporary) / "old")
            os.rename(new, folder)
    except (OSError, SafetensorError) as error:  # a full disk, or another process was faster after all
        logger.info("%s cannot be kept: %s", folder, error)


def _forget_unused(folder: Path) -> None:
    """Remove entries beside ``folder`` that an earlier release made, or a process that was killed, and nobody uses."""
    ours = re.compile(re.escape(folder.name.rpartition("-")[0]) + r"-[0-9a-f]{16}(-\w+)?")
    for other in folder.parent.iterdir():
        if other != folder and ours.fullmatch(other.name) and time.time() - other.lstat().st_mtime > _UNUSED_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
