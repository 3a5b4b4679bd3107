"""One run among several: begun or gone on with, in silence, and a failure is a reason instead of an end."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch

from recbole_hatllm.errors import HatError
from recbole_hatllm.files import publish
from recbole_hatllm.quick_start import resume
from recbole_hatllm.trainer import GivenUp


def attempt(
    folder: Path,
    begin: Callable[[], dict],
    show_progress: bool = False,
    callback_fn: Callable[[int, float], bool] | None = None,
) -> dict:
    """What the run in `folder` came to.

    Args:
        folder: of the run; where it holds one already, that is gone on with, or read if it is finished.
        begin: makes the run there. show_progress: whether one that is gone on with shows its bars. callback_fn: as in
            `quick_start.run`, for one that is gone on with.

    Returns:
        what `quick_start.run` does, or {"reason": one sentence}; what is no plain message leaves `error.txt` in `folder`.

    Raises:
        Interrupted: Ctrl-C. GivenUp: `callback_fn` wanted it.
    """
    gc.collect()
    torch.cuda.empty_cache()  # what a run before left behind
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the run's own log has it all
            return resume(folder, show_progress, callback_fn) if (folder / "config.yaml").is_file() else begin()
    except GivenUp:
        raise
    except HatError as error:
        return {"reason": str(error)}
    except Exception as error:  # out of memory is a RuntimeError, and RecBole's models raise whatever they like
        publish(folder / "error.txt", lambda file: file.write_text(traceback.format_exc(), encoding="utf-8"))
        return {"reason": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
