"""Kernels that start warm: forked from a process that has imported PyTorch and the package, with a limit of memory."""

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

__all__ = ["kernels", "start"]

_PRELOADED = ["ldm_edu", "matplotlib.pyplot", "ipykernel.kernelapp"]
_NAME = "ldm_edu-warm"
_starting = threading.Lock()  # threads start processes one after the other
_limits: dict[str, Any] = {"memory": None, "student": None}  # what the next kernel gets


def _context() -> Any:
    "Where processes are forked from: started once, with what every exercise imports."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextmanager
def _no_main() -> Iterator[None]:
    "The script that runs now is not run again in the new process, as multiprocessing would do."
    kept = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = kept


def start(
    target: Callable[..., None],  # a function of a module, with arguments that can be pickled
    *args: Any,
) -> BaseProcess:
    "A process that has imported PyTorch and the package at once, on Linux and macOS."
    process = _context().Process(target=target, args=args)
    with _starting, _no_main():
        process.start()
    return process


def _serve(argv: list[str], folder: str, variables: dict[str, str], memory: int | None) -> None:
    "Be a kernel of Jupyter: `argv` names its connection file, `memory` is its limit in bytes."
    import resource

    os.setsid()  # an interrupt or a kill reaches what the notebook started, too
    os.chdir(folder)
    os.environ.update(variables)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what the kernel itself has to say; what cells print goes to the notebook
        os.dup2(nowhere, stream)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from ipykernel.kernelapp import IPKernelApp

    sys.argv = ["ipykernel_launcher", *argv]
    IPKernelApp.launch_instance(argv=[*argv, f"--IPKernelApp.parent_handle={os.getppid()}"])  # ends with its parent


class _Process:
    "A process of multiprocessing with the methods of `subprocess.Popen` that Jupyter's provisioner calls."

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess):
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.pid is not None and self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()


class WarmProvisioner(LocalProvisioner):
    "Starts a kernel of IPython by forking, where Jupyter would start a new Python."

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        "Launch the kernel that the command names, which is one of IPython."
        argv = cmd[cmd.index("ipykernel_launcher") + 1 :]
        folder = str(kwargs.get("cwd") or Path.cwd())
        variables = {k: str(v) for k, v in (kwargs.get("env") or {}).items()}
        if _limits["student"] is not None:
            variables["LDM_EDU_STUDENT"] = _limits["student"]
        process = start(_serve, argv, folder, variables, _limits["memory"])
        self.process = _Process(process)
        self.pid = self.pgid = process.pid
        self.cwd = folder
        return self.connection_info


@contextmanager
def kernels(
    memory: float | None,  # the most memory that a kernel may take, in GiB of address space; None: any
    student: str | None = None,  # whose variant the exercises are; None: what the notebook says
) -> Iterator[None]:
    """While this is open, kernels of Python start warm, with these limits.

    Windows, which cannot fork, starts them as usual, without a limit of memory.
    """
    factory = KernelProvisionerFactory.instance()
    kept, limits = factory.default_provisioner_name, dict(_limits)
    variable = os.environ.get("LDM_EDU_STUDENT")
    if "forkserver" in multiprocessing.get_all_start_methods():
        group = KernelProvisionerFactory.GROUP_NAME
        factory.provisioners[_NAME] = EntryPoint(_NAME, f"{__name__}:WarmProvisioner", group)
        factory.default_provisioner_name = _NAME
        _limits.update(memory=None if memory is None else int(memory * 2**30), student=student)
    elif student is not None:
        os.environ["LDM_EDU_STUDENT"] = student
    try:
        yield
    finally:
        factory.default_provisioner_name = kept
        _limits.update(limits)
        if variable is None:
            os.environ.pop("LDM_EDU_STUDENT", None)
        else:
            os.environ["LDM_EDU_STUDENT"] = variable
