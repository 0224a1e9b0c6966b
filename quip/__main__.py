"""`python -m quip`: the command line."""

from quip.cli import main

if __name__ == "__main__":
    main()
