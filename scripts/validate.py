#!/usr/bin/env python
"""Measure a trained model again, and compare with what it claims: `apart_hf.cli.validate`."""

from apart_hf.cli.validate import main

if __name__ == "__main__":
    main()
