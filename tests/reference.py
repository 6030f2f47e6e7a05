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


# What each method moves: (deltas, weights), and whether the clean gradient is kept.
METHODS = {
    "standard": (None, None, True),
    "apart": ("gradient", None, True),
    "sam": (None, "sam", False),
    "apart-sam": ("gradient", "sam", True),
    "asam": (None, "asam", False),
    "apart-asam": ("gradient", "asam", True),
    "sam-on": (None, "sam-on", False),
    "random-bn": ("random", None, True),
    "ghost-bn": ("none", None, True),
}


def _uphill(kind, model, names, g, rho, eta):
    """The step in each parameter: rho T^2 g / ||T g||, with T = 1 (SAM), |w| + eta in weights (ASAM), or only in
    normalisation layers (SAM-ON)."""
    weights = dict(model.named_parameters())
    norms = {
        f"{layer}.{name}"
        for layer, m in model.named_modules()
        for name, _ in m.named_parameters(recurse=False)
        if isinstance(m, (_BatchNorm, torch.nn.LayerNorm, torch.nn.GroupNorm))
    }
    t_g, t_t_g = [], []
    for name, part in zip(names, g):
        t = torch.ones_like(weights[name])
        if kind == "asam" and name.split(".")[-1] == "weight":
            t = weights[name].abs() + eta
        if part is None or (kind == "sam-on" and name not in norms):
            part = torch.zeros_like(t)
        t_g.append(t * part)
        t_t_g.append(t * t * part)
    size = torch.sqrt(sum(part.square().sum() for part in t_g))
    return [rho * part / size for part in t_t_g]


def reference_step(
    model,
    images,
    targets,
    criterion,
    method,
    *,
    epsilon=0.1,
    groups=16,
    ratio=1.0,
    rho=0.05,
    eta=0.01,
    local_attack=False,
    global_norm=False,
    generator=None,
    ranks=1,
):
    """The gradient that `method` gives for one batch, and what it does to the buffers.

    With `ranks` > 1, the batch is what that many processes hold together, each an equal part in order: one attack from
    the mean of g_theta (local_attack: each from its own), weights moved by each rank's own gradient (global_norm: by
    the mean), the mean of all gradients, the buffers of rank 0.

    Returns: (gradients, buffers, deltas): {parameter name: gradient or None}, {buffer name: value},
    {layer name: (delta_mu, delta_sigma)}.
    """
    parts = list(zip(images.chunk(ranks), targets.chunk(ranks)))
    delta_kind, weight_kind, keeps_clean = METHODS[method]
    replicas = [copy.deepcopy(model) for _ in parts]
    norms = [_NaiveBatchNorms(replica) for replica in replicas]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    layers = list(norms[0].layers)
    M = len(parts[0][0])

    # lines 1-4: theta = 0, one forward and backward over D
    g_phi, g_theta = [], []
    for replica, norm, (x, y) in zip(replicas, norms, parts):
        phi = [p for p in replica.parameters() if p.requires_grad]
        zeros = [{n: phi[0].new_zeros(norm.layers[n].num_features).requires_grad_() for n in layers} for _ in range(2)]
        norm.set(*zeros)
        theta = [z for pair in zip(*(d.values() for d in zeros)) for z in pair]
        grads = torch.autograd.grad(criterion(replica(x), y), [*phi, *theta], allow_unused=True)
        g_phi.append(grads[: len(phi)])
        g_theta.append([torch.zeros_like(t) if g is None else g for t, g in zip(theta, grads[len(phi) :])])
        norm.track = False
    buffers = {n: b.clone() for n, b in replicas[0].named_buffers()}
    if method == "standard":
        return dict(zip(names, _mean(g_phi))), buffers, {}

    # line 5: theta = epsilon sign(g_theta), for each rank
    sign_of = {"gradient": _sign_outside_dead_zone, "none": lambda *g: [torch.zeros_like(x) for x in g]}
    if delta_kind == "random":
        signs = iter(2 * torch.randint(2, (sum(t.numel() for t in g_theta[0]),), generator=generator) - 1)
        drawn = [[next(signs) for _ in t] for t in g_theta[0]]
        deltas_of = [[epsilon * t.new_tensor(s) for t, s in zip(g_theta[0], drawn)]] * ranks
    else:
        sign = sign_of[delta_kind or "none"]
        attacks = g_theta if local_attack else [_mean(g_theta)] * ranks
        deltas_of = [[epsilon * s for i in range(0, len(g), 2) for s in sign(g[i], g[i + 1])] for g in attacks]
    deltas_of = [{n: (d[2 * i], d[2 * i + 1]) for i, n in enumerate(layers)} for d in deltas_of]

    combined = []
    for replica, norm, (x, y), g, deltas in zip(replicas, norms, parts, g_phi, deltas_of):
        norm.set({n: d[0] for n, d in deltas.items()}, {n: d[1] for n, d in deltas.items()})
        phi = [p for p in replica.parameters() if p.requires_grad]
        # Eq. 7 with p = 2
        if weight_kind:
            steps = _uphill(weight_kind, replica, names, _mean(g_phi) if global_norm else g, rho, eta)
            with torch.no_grad():
                for p, step in zip(phi, steps):
                    p += step
        # lines 6-11: one forward and backward a group
        n = groups if delta_kind else 1
        N = round(ratio * M)
        S = list(range(M)) if N == M else torch.randperm(M, generator=generator)[:N].tolist()
        h = [None] * len(phi)
        for j in range(n):
            loss = criterion(replica(x[S[j::n]]), y[S[j::n]])
            for k, part in enumerate(torch.autograd.grad(loss, phi, allow_unused=True)):
                if part is not None:
                    h[k] = part / n if h[k] is None else h[k] + part / n
        # line 12
        if not keeps_clean:
            combined.append(h)
        else:
            combined.append([None if a is None else M / (M + N) * a + N / (M + N) * b for a, b in zip(g, h)])
    return dict(zip(names, _mean(combined))), buffers, deltas_of[0]


def _mean(rows):
    return [None if row[0] is None else sum(row) / len(row) for row in zip(*rows)]
