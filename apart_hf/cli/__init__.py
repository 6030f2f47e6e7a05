"""The commands behind scripts/*.py and python -m apart_hf."""
