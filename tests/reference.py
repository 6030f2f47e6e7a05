"""The oracle: Algorithm 1 written out naively. Slow, obviously right, and free of anything from the package under test.

delta_mu and delta_sigma are explicit tensors in the autograd graph, every group of samples has a forward of its own,
batch statistics are plain means. The input model is copied; nothing happens to it.
"""

from __future__ import annotations

import copy

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch.nn.modules.batchnorm import _BatchNorm

DEAD_ZONE = 2e-6


class _NaiveBatchNorms:
    """Gives each BN layer of a model (a throwaway copy) the forward of Eq. 3, with explicit deltas."""

    def __init__(self, model):
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
        self.delta_mu, self.delta_sigma = {}, {}
        self.track = True
        for name, layer in self.layers.items():
            if layer.training:
                layer.forward = lambda x, name=name, layer=layer: self.forward(name, layer, x)

    def set(self, delta_mu, delta_sigma):
        self.delta_mu, self.delta_sigma = delta_mu, delta_sigma

    def forward(self, name, layer, x):
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mu = x.mean(dims)
        var = (x - mu.view(shape)).square().mean(dims)
        sigma = (var + layer.eps).sqrt()
        if self.track and layer.track_running_stats:
            with torch.no_grad():
                count = x.numel() / x.shape[1]
                layer.num_batches_tracked += 1
                m = layer.momentum if layer.momentum is not None else 1.0 / float(layer.num_batches_tracked)
                layer.running_mean.mul_(1 - m).add_(m * mu)
                layer.running_var.mul_(1 - m).add_(m * var * count / (count - 1))
        gamma = layer.weight if layer.affine else torch.ones_like(mu)
        beta = layer.bias if layer.affine else torch.zeros_like(mu)
        # (x - (1 + delta_mu) mu) / sigma, where mu/sigma in the shift is a constant for autograd
        shifted = (x - mu.view(shape)) / sigma.view(shape) - (self.delta_mu[name] * (mu / sigma).detach()).view(shape)
        out = (gamma * (1 + self.delta_sigma[name])).view(shape) * shifted + beta.view(shape)
        if isinstance(layer, BatchNormAct2d):
            out = layer.act(layer.drop(out))
        return out


def _sign_outside_dead_zone(g_mu, g_sigma):
    bound = DEAD_ZONE * max(g_mu.abs().max(), g_sigma.abs().max())
    return [torch.where(g.abs() > bound, g.sign(), torch.zeros_like(g)) for g in (g_mu, g_sigma)]


def reference_step(model, images, targets, criterion, method, *, epsilon=0.1, groups=16, ratio=1.0, rho=0.05,
                   generator=None):
    """The gradient that `method` gives for one batch, and what it does to the buffers.

    Returns: (gradients, buffers, deltas): {parameter name: gradient or None}, {buffer name: value},
    {layer name: (delta_mu, delta_sigma)}.
    """
    model = copy.deepcopy(model)
    norms = _NaiveBatchNorms(model)
    names, phi = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    M = len(images)
    attack_bn, attack_weights = method in ("apart", "apart-sam"), method in ("sam", "apart-sam")

    # lines 1-4: theta = 0, one forward and backward over D
    any_parameter = next(model.parameters())
    zeros = [
        {n: any_parameter.new_zeros(layer.num_features).requires_grad_() for n, layer in norms.layers.items()}
        for _ in range(2)
    ]
    norms.set(*zeros)
    delta_mu, delta_sigma = zeros
    wanted = [*phi, *delta_mu.values(), *delta_sigma.values()]
    grads = torch.autograd.grad(criterion(model(images), targets), wanted, allow_unused=True)
    g_phi, g_theta = grads[: len(phi)], grads[len(phi):]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    norms.track = False
    if method == "standard":
        return dict(zip(names, g_phi)), buffers, {}

    # line 5: theta = epsilon sign(g_theta)
    new_mu, new_sigma = {}, {}
    for i, name in enumerate(norms.layers):
        g_mu, g_sigma = g_theta[i], g_theta[len(norms.layers) + i]
        if g_mu is None or not attack_bn:
            g_mu = g_sigma = torch.zeros_like(delta_mu[name])
        s_mu, s_sigma = _sign_outside_dead_zone(g_mu, g_sigma)
        new_mu[name], new_sigma[name] = epsilon * s_mu, epsilon * s_sigma
    norms.set(new_mu, new_sigma)

    # Eq. 7 with p = 2
    if attack_weights:
        norm = torch.sqrt(sum(g.square().sum() for g in g_phi if g is not None))
        with torch.no_grad():
            for p, g in zip(phi, g_phi):
                if g is not None:
                    p += rho * g / norm

    # lines 6-11: one forward and backward a group
    if not attack_bn:
        groups = 1
    N = round(ratio * M)
    S = list(range(M)) if N == M else torch.randperm(M, generator=generator)[:N].tolist()
    h_phi = [None] * len(phi)
    for j in range(groups):
        S_j = S[j::groups]
        loss = criterion(model(images[S_j]), targets[S_j])
        for k, g in enumerate(torch.autograd.grad(loss, phi, allow_unused=True)):
            if g is not None:
                h_phi[k] = g / groups if h_phi[k] is None else h_phi[k] + g / groups

    # line 12
    if method == "sam":
        combined = h_phi
    else:
        combined = [
            None if g is None else M / (M + N) * g + N / (M + N) * h for g, h in zip(g_phi, h_phi)
        ]
    return dict(zip(names, combined)), buffers, {n: (new_mu[n], new_sigma[n]) for n in norms.layers}
