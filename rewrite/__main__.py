"""``python -m rewrite``."""

from rewrite.cli.commands import main

if __name__ == "__main__":
    main()
