"""While the command `ldm-edu` imports what it needs, which takes seconds, Ctrl-C ends it without a traceback."""

import signal
import sys
import threading
from pathlib import Path

__all__: list[str] = []


def is_command() -> bool:
    "Was this process started as `ldm-edu`, or as `python -m ldm_edu`?"
    words = sys.orig_argv
    return Path(sys.argv[0]).stem == "ldm-edu" or ("-m", "ldm_edu") in zip(words, words[1:])


def let_ctrl_c_end(at_once: bool) -> None:
    "Whether Ctrl-C ends the process at once, or as a KeyboardInterrupt, which can be handled. An ignored one stays so."
    before, after = signal.default_int_handler, signal.SIG_DFL
    if not at_once:
        before, after = after, before
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == before:
        signal.signal(signal.SIGINT, after)


if is_command():
    let_ctrl_c_end(at_once=True)
