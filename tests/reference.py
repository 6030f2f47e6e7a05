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
    "gsam": (None, "sam", False),
    "awp": (None, "awp", False),
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


def _relatively_uphill(model, names, g, gamma):
    """AWP's step: gamma ||w|| g / ||g|| in each weight of two dimensions or more, none in what is called otherwise."""
    weights, steps = dict(model.named_parameters()), []
    for name, part in zip(names, g):
        w = weights[name].detach()
        if part is None or w.dim() < 2 or "weight" not in name.split(".")[-1] or not part.any():
            steps.append(torch.zeros_like(w))
        else:
            steps.append(gamma * w.square().sum().sqrt() * part / part.square().sum().sqrt())
    return steps


def _surrogate_gap(g, h, alpha):
    """GSAM's direction: the perturbed h less alpha times what is left of the clean g without its part along h."""
    along = sum((a * b).sum() for a, b in zip(g, h) if a is not None and b is not None)
    size = sum(b.square().sum() for b in h if b is not None)
    return [None if a is None else b - alpha * (a - along / size * b) for a, b in zip(g, h)]


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
    gamma=0.005,
    alpha=0.01,
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
            climbed = _mean(g_phi) if global_norm else g
            if weight_kind == "awp":
                steps = _relatively_uphill(replica, names, climbed, gamma)
            else:
                steps = _uphill(weight_kind, replica, names, climbed, rho, eta)
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
        if method == "gsam":
            combined.append(_surrogate_gap(g, h, alpha))
        elif not keeps_clean:
            combined.append(h)
        else:
            combined.append([None if a is None else M / (M + N) * a + N / (M + N) * b for a, b in zip(g, h)])
    return dict(zip(names, _mean(combined))), buffers, deltas_of[0]


def _mean(rows):
    return [None if row[0] is None else sum(row) / len(row) for row in zip(*rows)]


def reference_images_step(
    model,
    images,
    targets,
    criterion,
    method,
    *,
    mean,
    std,
    pixel_epsilon=4.0,
    pixel_step=1.0,
    steps=5,
    random_start=False,
    aux_affine=False,
    ratio=1.0,
    epsilon=0.1,
    groups=1,
    generator=None,
    auxiliary=None,
):
    """What `advprop` and `fast-advprop` give for one batch, and `apart-advprop`, which moves BN statistics as well.

    AdvProp's Algorithm 1: adversarial images by PGD on the network with auxiliary BN, then both losses, weighted here
    as Algorithm 1 of APART weights two gradients. The network with auxiliary BN is a second network, `double`, with
    the same weights. Delta is kept in pixels of 0 to 255. `auxiliary`: the double's BN tensors by name; None: the
    model's.

    Returns: (gradients, buffers, auxiliary gradients, auxiliary BN tensors): dicts by name.
    """
    if method == "fast-advprop":
        steps, random_start = 1, False
    clean, double = copy.deepcopy(model), copy.deepcopy(model)
    double.load_state_dict(auxiliary or {}, strict=False)
    norms, doubles = _NaiveBatchNorms(clean), _NaiveBatchNorms(double)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    phi, psi = ([p for p in network.parameters() if p.requires_grad] for network in (clean, double))
    layers = list(norms.layers)
    zeros = [{n: phi[0].new_zeros(norms.layers[n].num_features).requires_grad_() for n in layers} for _ in range(2)]
    M, N, n = len(images), round(ratio * len(images)), groups if method == "apart-advprop" else 1
    mean, std = (torch.tensor(value, dtype=images.dtype).view(1, -1, 1, 1) for value in (mean, std))

    def moved(x, d):
        """Images whose pixels are moved by d."""
        return (((x * std + mean) * 255 + d) / 255 - mean) / std

    def clipped(x, d):
        """The nearest move within the radius that leads no pixel, or no further, out of 0 to 255."""
        pixels = (x * std + mean) * 255
        d = d.clamp(-pixel_epsilon, pixel_epsilon)
        return torch.minimum(torch.maximum(d, (0 - pixels).clamp(max=0)), (255 - pixels).clamp(min=0))

    # the clean pass over all images, by the network's own BN
    norms.set(*zeros)
    x = images.clone().requires_grad_()
    theta = [z for pair in zip(*(one.values() for one in zeros)) for z in pair]
    grads = torch.autograd.grad(criterion(clean(x), targets), [*phi, *theta, x], allow_unused=True)
    g_phi, g_theta, g_x = grads[: len(phi)], grads[len(phi) : -1], grads[-1]
    g_theta = [torch.zeros_like(t) if g is None else g for t, g in zip(theta, g_theta)]
    buffers = {name: b.clone() for name, b in clean.named_buffers()}

    # the first step of each component, then the samples of all that follows
    deltas = [torch.zeros_like(t) for t in theta]
    if method == "apart-advprop":
        pairs = (_sign_outside_dead_zone(*g_theta[i : i + 2]) for i in range(0, len(g_theta), 2))
        deltas = [epsilon * sign for pair in pairs for sign in pair]
    if random_start:
        d = (2 * torch.rand(images.shape, generator=generator, dtype=images.dtype) - 1) * pixel_epsilon
    else:
        d, steps = pixel_step * g_x.sign(), steps - 1
    d = clipped(images, d)
    S = list(range(M)) if N == M else torch.randperm(M, generator=generator)[:N].tolist()
    x, y, d = images[S], targets[S], d[S]

    # further steps, at the point that all have reached
    doubles.set(dict(zip(layers, deltas[::2])), dict(zip(layers, deltas[1::2])))
    doubles.track = False
    for _ in range(steps):
        for j in range(n):
            at = moved(x[j::n], d[j::n]).requires_grad_()
            (g,) = torch.autograd.grad(criterion(double(at), y[j::n]), at)
            d[j::n] = clipped(x[j::n], d[j::n] + pixel_step * g.sign())

    # the perturbed pass
    doubles.track = method != "apart-advprop"
    h = [torch.zeros_like(p) for p in psi]
    for j in range(n):
        found = torch.autograd.grad(criterion(double(moved(x[j::n], d[j::n])), y[j::n]), psi, allow_unused=True)
        h = [total if part is None else total + part / n for total, part in zip(h, found)]

    clean_weight, weight = M / (M + N), N / (M + N)
    if method == "fast-advprop":  # a sample that is seen twice counts half each time
        clean_weight, weight = 1 - N / (2 * M), N / (2 * M)
    own = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} if aux_affine else set()
    gradients, auxiliary_gradients = {}, {}
    for name, a, b in zip(names, g_phi, h):
        a = torch.zeros_like(b) if a is None else a
        whole = method == "fast-advprop"  # what one pass alone reaches has the mean over the samples of that pass
        if name in own:
            gradients[name] = a if whole else clean_weight * a
            auxiliary_gradients[name] = b if whole else weight * b
        else:
            gradients[name] = clean_weight * a + weight * b
    kinds = ("running_mean", "running_var", "num_batches_tracked", *(("weight", "bias") if aux_affine else ()))
    state = double.state_dict()
    held = {f"{layer}.{kind}" for layer in layers for kind in kinds}
    return gradients, buffers, auxiliary_gradients, {name: state[name] for name in state if name in held}


def reference_advbn_step(
    model,
    images,
    targets,
    criterion,
    layer,
    *,
    epsilon=1.1,
    step_size=0.2,
    steps=6,
    ratio=1.0,
    channels=1,
    generator=None,
):
    """The gradient that AdvBN gives for one batch, the buffers, and delta_mu and delta_sigma of the layer's features.

    The features' mean over the batch is multiplied by 1 + delta_mu, what is left of them by 1 + delta_sigma. All BN
    layers normalise by the batch statistics of the pass; only the clean pass is tracked.
    """
    model = copy.deepcopy(model)
    norms = _NaiveBatchNorms(model)
    phi = [p for p in model.parameters() if p.requires_grad]
    none = {n: phi[0].new_zeros(m.num_features) for n, m in norms.layers.items()}
    norms.set(none, none)
    delta = None

    def move(module, inputs, x):
        nonlocal delta
        if delta is None:
            delta = [x.new_zeros(x.shape[channels]) for _ in range(2)]
        for d in delta:
            d.requires_grad_()
        dims = [d for d in range(x.dim()) if d != channels]
        mu = x.mean(dims, keepdim=True)
        shape = mu.shape
        moved = (x - mu) * (1 + delta[1].view(shape)) + mu * (1 + delta[0].view(shape))
        return torch.where(moved < 0, torch.zeros_like(moved), moved) if (x >= 0).all() else moved

    handle = model.get_submodule(layer).register_forward_hook(move)
    M = len(images)
    loss = criterion(model(images), targets)
    gradients = torch.autograd.grad(loss, [*phi, *delta], allow_unused=True)
    g_phi, g_delta = gradients[:-2], gradients[-2:]
    norms.track = False
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    N = round(ratio * M)
    S = list(range(M)) if N == M else torch.randperm(M, generator=generator)[:N].tolist()
    x, y = images[S], targets[S]
    for step in range(steps):
        if step:
            g_delta = torch.autograd.grad(criterion(model(x), y), delta)
        signs = _sign_outside_dead_zone(*g_delta)
        delta = [(d.detach() + step_size * s).clamp(-epsilon, epsilon) for d, s in zip(delta, signs)]
    h_phi = torch.autograd.grad(criterion(model(x), y), phi, allow_unused=True)
    handle.remove()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    combined = [None if g is None else M / (M + N) * g + N / (M + N) * h for g, h in zip(g_phi, h_phi)]
    return dict(zip(names, combined)), buffers, [d.detach() for d in delta]
