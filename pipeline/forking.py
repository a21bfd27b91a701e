"""Processes that are forked from the one that trains, and stay out of its way."""

import gc
import os
import signal
import warnings

import torch


def fork() -> int:
    """`os.fork` where there may be threads: the new process must take no lock that one of them might hold."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # Python 3.12
        return os.fork()


def settle() -> None:
    """One thread, and deaf to the signals that a terminal or a scheduler sends to the whole process group.

    The owner answers those, and wants its batches until it has saved.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.freeze()  # or a collection would write to every page of the owner's objects, and so copy it
