"""Entry point of `python -m storage_initializer`."""

from storage_initializer.cli.main import run_and_exit

if __name__ == "__main__":
    run_and_exit()
