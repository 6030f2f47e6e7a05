#!/usr/bin/env python
"""Run a table of the paper, or our study, row by row and seed by seed: `apart_hf.cli.reproduce`."""

from apart_hf.cli.reproduce import main

if __name__ == "__main__":
    main()
