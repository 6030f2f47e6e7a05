#!/usr/bin/env python
"""Figures 1 and 2 of the paper for trained models: `apart_hf.cli.analyse`."""

from apart_hf.cli.analyse import main

if __name__ == "__main__":
    main()
