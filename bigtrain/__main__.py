"""`python -m bigtrain` is the command `bigtrain`."""

from bigtrain.cli import main

if __name__ == "__main__":
    main()
