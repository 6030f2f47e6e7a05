"""The commands behind apart-hf, python -m apart_hf and the repository's scripts."""
