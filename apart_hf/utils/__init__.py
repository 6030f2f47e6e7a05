"""Helpers that know nothing of training: files, processes, the command line, the Hub's client, plots."""
