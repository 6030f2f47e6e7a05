"""Batch normalisation with perturbed statistics: the formula, its kernels, and its place in a model."""

from apart_hf.batchnorm.kernels import use_kernels

__all__ = ["use_kernels"]
