"""``python -m dcafy``."""

from dcafy.cli import main

main()
