"""One directory for the modelling code that transformers imports from exports, for the whole session and its child processes.

transformers puts this directory on sys.path once and imports the package `transformers_modules` from the first one there. A
second directory in the same process would never be looked into.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile

_DIRECTORY = tempfile.mkdtemp(prefix="hope-test-modules-")
_OWNER = os.getpid()

assert "transformers" not in sys.modules, "transformers reads HF_MODULES_CACHE once, when it is imported"
os.environ["HF_MODULES_CACHE"] = _DIRECTORY


@atexit.register
def _remove() -> None:
    if os.getpid() == _OWNER:  # not in forked children
        shutil.rmtree(_DIRECTORY, ignore_errors=True)
