"""`python -m repfuse` is the `repfuse` command."""

from repfuse.cli import program

if __name__ == "__main__":
    program()
