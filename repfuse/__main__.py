"""`python -m repfuse` is the `repfuse` command."""

from repfuse.cli import main

if __name__ == "__main__":
    main()
