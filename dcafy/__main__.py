"""``python -m dcafy``."""

import os
import sys

# ``python -m`` puts the current folder in front: what lies there is imported where the user names it, and only then.
if not getattr(sys.flags, "safe_path", False) and sys.path and os.path.realpath(sys.path[0]) == os.path.realpath("."):
    del sys.path[0]

from dcafy.cli import main

main()
