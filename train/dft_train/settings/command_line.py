"""The command that started this run, as its user typed it, for messages that say how to go on. Called by `faults`.

A launcher hands its own last words on to the ranks. So of this process's ancestors, the farthest whose words end in
this process's own arguments is what the user typed: `torchrun --nproc_per_node 8 -m dft_train --dataset_dir ...`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh", "-bash", "-zsh", "-sh")
"""What a script is run by. It may do more than start this run."""
_RESUME = "--resume_from_checkpoint"


def _own_arguments() -> list[str]:
    """Without what DeepSpeed's launcher adds for each rank."""
    return [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]


def _ancestors() -> list[list[str]]:
    """Words of this process's command line, its parent's, and so on; empty where the system does not tell."""
    found, pid = [], os.getpid()
    try:
        while pid > 1:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:-1])
            # The name in brackets may hold spaces; the parent is the second field after it.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return found


def _launcher(ancestors: Sequence[Sequence[str]], arguments: Sequence[str]) -> list[str]:
    """The words before `arguments` in the farthest ancestor that ends in them."""
    count = len(arguments)
    found = ["dft-train"]
    for words in ancestors:
        if not words or Path(words[0]).name in _SHELLS:
            break
        if arguments and list(words[len(words) - count :]) == list(arguments):
            found = list(words[: len(words) - count])
    return found


def _short(words: Sequence[str]) -> list[str]:
    """`python /venv/bin/torchrun` as `torchrun`, where that is the one on the path."""
    if not words:
        return ["dft-train"]
    python = Path(words[0]).name.startswith("python")
    rest = list(words[1:] if python and words[1:] and not words[1].startswith("-") else words)
    name = Path(rest[0]).name
    on_path = shutil.which(name)
    if on_path is not None and (rest[0] == name or os.path.realpath(on_path) == os.path.realpath(rest[0])):
        return [name, *rest[1:]]
    return list(words)


def resuming(arguments: Sequence[str]) -> list[str]:
    """`arguments` with `--resume_from_checkpoint True` in place of what they said of it."""
    kept, skip = [], False
    for word in arguments:
        if skip:
            skip = False
        elif word.partition("=")[0].replace("-", "_") == _RESUME.replace("-", "_"):
            skip = "=" not in word
        else:
            kept.append(word)
    return [*kept, _RESUME, "True"]


def command_to_go_on() -> str:
    """What to type to go on from the last checkpoint, quoted for a shell."""
    arguments = _own_arguments()
    return shlex.join([*_short(_launcher(_ancestors(), arguments)), *resuming(arguments)])
