#!/usr/bin/env python
"""Publish a run, or a folder in timm's form, on the Hub: `apart_hf.cli.push_to_hub`."""

from apart_hf.cli.push_to_hub import main

if __name__ == "__main__":
    main()
