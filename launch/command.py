"""One `hope` command in a job: `python -m launch.command DIRECTORY ARGUMENTS`, started in the directory of the frozen code.

`python -m` puts the directory it starts in before everything else in the import path. Changing to the user's directory only
afterwards keeps the user's checkout out of it.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """Change to the directory and run the command."""
    os.chdir(sys.argv[1])
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module("hope_megatron", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
