"""`python -m uft` is `uft`."""

from uft.cli import main

if __name__ == "__main__":
    main()
