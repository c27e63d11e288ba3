"""`python -m elastic_pt` is the command line."""

from elastic_pt.cli import main

if __name__ == "__main__":
    main()
