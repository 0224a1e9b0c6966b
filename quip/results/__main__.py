"""`python -m quip.results`."""

from quip.results.command import main

if __name__ == "__main__":
    main()
