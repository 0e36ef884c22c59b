"""A process that has imported everything, and lets children of it run commands: orders and reports are lines of JSON.

``python -m storm.warm`` reads orders. Each child counts what it does to files under ``root``, and at the ``kill``-th kills
itself before it is done: what a process that is killed at that moment leaves, with no clock in it.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
HALF = b'{"prompt": "hal'


class Warm:
    """The process, seen from outside."""

    def __init__(self) -> None:
        tests = Path(__file__).parents[1]
        paths = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "storm.warm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def run(self, **order: Any) -> list[dict[str, Any]]:
        """Run an order, as :func:`_child` takes it, in ``times`` children at once; return what each came to."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        return list(json.loads(stdout.readline()))


def _watch(root: str, kill: int, torn: bool, report: Path) -> None:
    """Count in the file ``report`` what is done under ``root``, and kill this process at the ``kill``-th, if it is not 0."""
    state = {"count": 0, "inside": False}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if state["inside"] or not (opens or event in CHANGES) or not _under(root, arguments):
            return
        state["inside"] = True
        state["count"] += 1
        report.write_text(str(state["count"]), encoding="utf-8")
        if state["count"] == kill:
            if torn and opens:
                _tear(arguments[0], arguments[2])
            os.kill(os.getpid(), signal.SIGKILL)
        state["inside"] = False

    sys.addaudithook(hook)


def _under(root: str, arguments: tuple[Any, ...]) -> bool:
    names = [os.fspath(one) for one in arguments if isinstance(one, str | os.PathLike)]
    return any(isinstance(name, str) and name.startswith(root) for name in names)


def _tear(name: str, flags: int) -> None:
    """Open the file as it was to be opened, and write half a line if it grows."""
    handle = os.open(name, flags, 0o666)
    if flags & os.O_APPEND:
        os.write(handle, HALF)


def _child(
    call: list[Any], root: str, files: str, number: int, env: dict[str, str] = {}, kill: int = 0, torn: bool = False,  # noqa: B006
    largest: int = 0, user: int = 0, **_: Any,
) -> None:  # fmt: skip
    """Run ``call``, a module, a function in it and its argument; what it says and counts goes to ``files``."""
    said = os.open(f"{files}.said.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(env)
    _watch(root, kill, torn, Path(f"{files}.count.{number}"))
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    code = 1
    try:
        if user:
            os.setuid(user)
        module, function, argument = call
        getattr(import_module(module), function)(argument)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        with suppress(PermissionError):  # another user's, of a call before
            Path(f"{files}.modules").write_text("\n".join(sys.modules), encoding="utf-8")
        os._exit(code)


def _ran(order: dict[str, Any]) -> list[dict[str, Any]]:
    children, began = [], time.monotonic()
    for number in range(order.get("times", 1)):
        child = os.fork()
        if not child:
            _child(number=number, **order)
        children.append(child)
    if order.get("after"):
        time.sleep(order["after"])
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    seconds = time.monotonic() - began
    _import_too(Path(f"{order['files']}.modules"))
    return [{"code": code, "seconds": seconds, **_read(order["files"], number)} for number, code in enumerate(codes)]


def _import_too(modules: Path) -> None:
    """Import what a child has imported, which the next one then finds here."""
    for name in modules.read_text(encoding="utf-8").splitlines() if modules.exists() else ():
        if name not in sys.modules:
            with suppress(Exception):
                import_module(name)


def _read(files: str, number: int) -> dict[str, Any]:
    said, count = Path(f"{files}.said.{number}"), Path(f"{files}.count.{number}")
    counted = count.read_text(encoding="utf-8") if count.exists() else ""
    return {"said": said.read_text(encoding="utf-8", errors="replace")[-3000:], "count": int(counted or 0)}


def main() -> None:
    """Import what the commands need, and run orders until there are no more."""
    import torch

    for name in ("peft", "datasets", "accelerate", "hf_apar.training.fine_tuning", "hf_apar.training.heads", "storm.faults"):
        import_module(name)
    import_module("hf_apar.cli.recipes").EVALUATED = 1  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    for line in sys.stdin:
        report = _ran(json.loads(line))
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
