"""How p.grad is filled for one batch: methods, the two-pass scheme, and what it perturbs."""
