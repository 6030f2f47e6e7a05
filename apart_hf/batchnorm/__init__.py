"""Batch normalisation with perturbed statistics: the formula, its kernels, and its place in a model."""
