#!/usr/bin/env python
"""Publish a run, or a folder in timm's form, on the Hub: `apart_hf.push`."""

from apart_hf.push import main

if __name__ == "__main__":
    main()
