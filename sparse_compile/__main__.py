"""The command line, as `python -m sparse_compile`."""

from sparse_compile.cli.main import main

if __name__ == "__main__":
    main()
