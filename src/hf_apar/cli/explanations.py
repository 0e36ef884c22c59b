"""An exception in one sentence that says what to do, for people who did not write the code that raised it."""

import os

from hf_apar.errors import AparError, lacks_memory

_AGAIN = "run it again with --debug to see where"


def explain(error: Exception) -> tuple[str, bool]:
    """Return a sentence, and whether the user can mend it.

    >>> explain(FileNotFoundError(2, "No such file or directory", "prompts.jsonl"))
    ('No such file or directory: prompts.jsonl', True)
    >>> explain(KeyError("x"))
    ("unexpected KeyError: 'x'; run it again with --debug to see where, and report it", False)
    """
    message = "".join(letter if letter.isprintable() else "\ufffd" for letter in _one_line(error))  # a file's words, perhaps
    if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
        return "vllm is not installed; name the engine transformers, or pip install 'hf-apar[vllm]'", True
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install 'hf-apar[cli,train,default]'", True
    if isinstance(error, AparError):
        return message, True
    library, name = type(error).__module__.split(".")[0], type(error).__name__
    if library.startswith("safetensors"):  # this comes from Rust: it has no base class that says more
        return f"a safetensors file cannot be read or written ({message}); it is damaged or cut: copy or make it again", True
    if lacks_memory(error):
        return f"out of memory ({message}); try --dtype bfloat16, a shorter --max-new-tokens or another --device", True
    if isinstance(error, UnicodeError):
        return f"a text is not valid UTF-8 ({message}); convert it first", True
    if isinstance(error, OSError):
        return message, True
    if "inline_container" in message or "iostream error" in message:  # torch.save: no class of an error says what it met
        return f"a checkpoint cannot be written ({message}); make room on the disk, and call it again to go on", True
    if isinstance(error, ValueError):  # how transformers refuses options and files
        return f"{message}; {_AGAIN}", True
    return f"unexpected {name}: {message}; {_AGAIN}, and report it", False


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        names = [os.fspath(name) for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        return ": ".join([error.strerror, *names])
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
