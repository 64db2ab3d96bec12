"""`python -m mmd2v` is the command `mmd2v`."""

from mmd2v.cli.main import run

if __name__ == "__main__":
    run()
