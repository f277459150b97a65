"""Muon (Jordan et al. 2024) for matrices, Adam with Nesterov momentum for the rest. Torch only: paste it anywhere.

    optimizer = Muon(model.parameters(), lr=0.01, weight_decay=1e-3)  # weights of shape (fan_in, fan_out), as in x @ w

For a network of nn.Linear, whose weights have the shape (fan_out, fan_in), with an embedding:

    table = net.embedding.weight  # 2-D, but a list of vectors and no linear map: only you can tell
    rest = [p for p in net.parameters() if p is not table]
    optimizer = Muon([dict(params=rest), dict(params=[table], use_muon=False)], lr=0.01, fan_in_dim=1)

Muon replaces the momentum of a matrix, roughly, by the nearest semi-orthogonal matrix, with five Newton-Schulz steps.
Matrices are zero-padded and stacked into a few batches. This is exact, and saves a loop of thousands of launches.

Conventions are those of optax.contrib.muon 0.2.5, which trained nequix-mp-1 (Koker et al. 2025, arXiv:2508.16067): the
momentum is a bias-corrected moving average with Nesterov's look-ahead, the update is scaled by sqrt(max(1, fan_out /
fan_in)), and the learning rate multiplies the weight decay. (The PyTorch code of Nequix has the inverse ratio.)
"""

import torch


def orthogonalize(x, steps=5, eps=1e-8):
    """Newton-Schulz iteration on a batch of matrices (n, r, c), r <= c: singular values go to about 1 (0.7 to 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # maximise the slope at zero
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A A
        x = torch.baddbmm(x, poly, x, beta=a)  # a X + (b A + c A A) X
    return x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters, Adam for 1-D ones and for all in a group with use_muon=False, such as embeddings.

    params: as for any torch optimizer. A group that holds both kinds becomes two in `param_groups`, Muon's first, with
    the same options. Frozen parameters are left out. A parameter whose grad is None stays as it is.
    fan_in_dim: the dimension of a weight that is summed over, 0 if it is used as x @ w, 1 in nn.Linear.
    weight_decay: for 2-D parameters, and for all in a group with use_muon=False.
    momentum, steps: Muon's. betas, eps: Adam's. Both use lr, as in optax.
    Raises ValueError for a parameter given twice, and for one neither 1-D nor 2-D in a group without use_muon=False.
    """

    def __init__(
        self, params, lr=0.01, weight_decay=0.0, momentum=0.95, steps=5, betas=(0.9, 0.999), eps=1e-8, fan_in_dim=0
    ):
        options = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, steps=steps, betas=betas, eps=eps)
        super().__init__(params, dict(options, fan_in_dim=fan_in_dim, use_muon=True, t=0))

    def add_param_group(self, group):
        """Splits a group into one for Muon and one for Adam, without empty ones, and further by dtype and device."""
        super().add_param_group(dict(group))  # checks, defaults, names
        group, parts = self.param_groups.pop(), {}
        if len(set(group["params"])) != len(group["params"]):
            raise ValueError("every parameter must be given once")
        for i, p in enumerate(group["params"]):
            if group["use_muon"] and p.ndim not in (1, 2):
                raise ValueError(f"a parameter of shape {tuple(p.shape)} must be in a group with use_muon=False")
            if p.requires_grad:
                parts.setdefault((not group["use_muon"] or p.ndim == 1, str(p.dtype), str(p.device)), []).append(i)
        for (adam, *_), members in sorted(parts.items()):
            part = {k: [group[k][i] for i in members] for k in ("params", "param_names") if k in group}
            decay = 0.0 if adam and group["use_muon"] else group["weight_decay"]
            self.param_groups.append({**group, **part, "use_muon": not adam, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            if all(p.grad is None for p in params):
                continue
            grad = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params])
            group["t"] += 1
            if group["use_muon"]:
                update = self.orthogonal(group, self.lookahead(group, grad, group["momentum"]))
            else:
                beta1, beta2 = group["betas"]
                square = self.moment(group, "square", grad.square(), beta2) / (1 - beta2 ** group["t"])
                update = self.lookahead(group, grad, beta1) / (square.sqrt() + group["eps"])
            updates = zip(params, update.split([p.numel() for p in params]))
            params, updates = zip(*((p, u.view_as(p)) for p, u in updates if p.grad is not None))
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-lr)
        return loss

    def moment(self, group, name, value, beta):
        state = self.state[group["params"][0]]  # flat, for all of the group
        if name not in state:
            state[name] = torch.zeros_like(value)
        return state[name].lerp_(value, 1 - beta)

    def lookahead(self, group, grad, beta):
        """Nesterov: the average one step ahead with the same gradient, each term bias-corrected, as in optax."""
        t, average = group["t"], self.moment(group, "average", grad, beta)
        return (average * (beta / (1 - beta ** (t + 1)))).add_(grad, alpha=(1 - beta) / (1 - beta**t))

    def orthogonal(self, group, flat):
        """The matrices of a group, flat and one after another, orthogonalized and scaled: (n,) -> (n,)."""
        cache = vars(self).setdefault("cache", {})  # deepcopy, pickle and state_dict leave it out
        key = tuple(p.shape for p in group["params"]), group["fan_in_dim"], group["steps"], flat.dtype, flat.device
        if key not in cache:
            cache[key] = stacked(*key)
        return cache[key](flat)


def stacked(shapes, fan_in_dim, steps, dtype, device):
    """The function of `Muon.orthogonal` for these shapes. There is one stack for each power of two that shorter sides
    round up to; tall matrices lie in it transposed. On CUDA a call overwrites the result of the one before."""
    sizes = [r * c for r, c in shapes]
    n, classes, gathers = sum(sizes), {}, []  # where each element of a stack comes from, (k, r, c), n for padding
    for shape, index in zip(shapes, torch.arange(n).split(sizes)):
        classes.setdefault(max(32, 1 << (min(shape) - 1).bit_length()), []).append(index.view(shape))
    for members in classes.values():
        gather = torch.full((len(members), max(min(m.shape) for m in members), max(max(m.shape) for m in members)), n)
        for slot, m in zip(gather, members):
            slot[: min(m.shape), : max(m.shape)] = m if m.shape[0] <= m.shape[1] else m.T
        gathers.append(gather.to(device))
    scatter = torch.cat([g.flatten() for g in gathers]).argsort()[:n]  # where in the stacks each element lies
    scale = torch.tensor([max(1, s[1 - fan_in_dim] / s[fan_in_dim]) ** 0.5 for s in shapes], dtype=dtype)
    scale = scale.repeat_interleave(torch.tensor(sizes)).to(device)

    sides = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in gathers]

    def run(flat):
        padded, out = torch.cat([flat, flat.new_zeros(1)]), []
        for gather, side in zip(gathers, sides):  # on streams of their own: none of the stacks fills a GPU
            if side:
                side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                out.append(orthogonalize(padded[gather], steps).flatten())
        for side in filter(None, sides):
            torch.cuda.current_stream(device).wait_stream(side)
        return torch.cat(out)[scatter] * scale

    if device.type != "cuda":
        return run
    static, graph = torch.zeros(n, dtype=dtype, device=device), torch.cuda.CUDAGraph()
    run(static)  # libraries set themselves up outside the capture
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on working
        out = run(static)

    def replay(flat, keep=run):  # the graph reads the index tensors of run
        static.copy_(flat)
        graph.replay()
        return out

    return replay
