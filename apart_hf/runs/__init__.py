"""One training run, from its settings to the folder that it leaves."""
