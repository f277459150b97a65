"""Muon (Jordan et al. 2024) for 2-D weights, Adam with Nesterov momentum for the rest. Torch only: paste it anywhere.

    optimizer = Muon(model.parameters(), lr=0.01, weight_decay=1e-3)

Muon replaces the momentum of a weight matrix by the nearest semi-orthogonal matrix, roughly, with five Newton-Schulz
steps. Networks like Nequix have dozens of small matrices, for which a loop over matrices is thousands of launches: here
they are stacked, zero-padded, into a few batches, which is exact (zero rows and columns stay zero), and each step of the
iteration is three batched products a batch.

Conventions are those of optax.contrib.muon 0.2.5, which trained nequix-mp-1: the momentum is a bias-corrected moving
average with Nesterov's look-ahead, the update is scaled by sqrt(max(1, fan_out / fan_in)) for a weight of shape (fan_in,
fan_out), and the decay multiplies the learning rate. (Nequix' PyTorch code has the scale the other way round.)
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
    """Muon for parameters with two dimensions, Adam for those with one. Raises ValueError for any other, and for one given
    twice.

    weight_decay: for matrices only. momentum, steps: Muon's; betas, eps: Adam's. lr is shared, as in optax. A parameter
    without a gradient counts as one whose gradient is zero. Moments are kept flat, in the state of a group's first
    parameter.
    """

    run = None  # flat momentum -> padded stacks, orthogonalized -> flat update

    def __init__(self, params, lr=0.01, weight_decay=0.0, momentum=0.95, steps=5, betas=(0.9, 0.999), eps=1e-8):
        params = [p for p in params if p.requires_grad]
        matrices = [p for p in params if p.ndim == 2]
        vectors = [p for p in params if p.ndim == 1]
        if len(matrices) + len(vectors) != len(params) or len(set(params)) != len(params):
            raise ValueError("every parameter must be a matrix or a vector and be given once")
        groups = [dict(params=matrices, kind="muon"), dict(params=vectors, kind="adam")]
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, steps=steps, betas=betas, eps=eps, t=0)
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            grad = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params])
            group["t"] += 1
            if group["kind"] == "muon":
                update = self.orthogonal(params, self.lookahead(group, grad, group["momentum"]), group["steps"])
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            else:
                beta1, beta2 = group["betas"]
                square = self.moment(group, "square", grad.square(), beta2) / (1 - beta2 ** group["t"])
                update = self.lookahead(group, grad, beta1) / (square.sqrt() + group["eps"])
            updates = update.split([p.numel() for p in params])
            torch._foreach_add_(params, [u.view_as(p) for u, p in zip(updates, params)], alpha=-lr)

    def moment(self, group, name, value, beta):
        state = self.state[group["params"][0]]
        if name not in state:
            state[name] = torch.zeros_like(value)
        return state[name].lerp_(value, 1 - beta)

    def lookahead(self, group, grad, beta):
        """Nesterov: the bias-corrected moving average as it would be after one more step with the same gradient."""
        t, average = group["t"], self.moment(group, "average", grad, beta)
        return (average * (beta / (1 - beta ** (t + 1)))).add_(grad, alpha=(1 - beta) / (1 - beta**t))

    def orthogonal(self, params, flat, steps):
        """All matrices orthogonalized and scaled: (n,) -> (n,). On CUDA a graph replays the 80 launches as one."""
        if self.run is None:
            gathers, scales, scatter = stack_maps([p.shape for p in params], flat)

            def run(flat):
                padded = torch.cat([flat, flat.new_zeros(1)])
                one = lambda gather, scale: orthogonalize(padded[gather], steps) * scale
                stacks = side_by_side(one, list(zip(gathers, scales)), flat.is_cuda)
                return torch.cat([x.flatten() for x in stacks])[scatter]

            self.run = replayed(run, flat) if flat.is_cuda else run
        return self.run(flat)


def side_by_side(function, arguments, cuda):
    """[function(*a) for a in arguments], on CUDA each on a stream of its own: none of the stacks fills the GPU."""
    if not cuda:
        return [function(*a) for a in arguments]
    main, sides, out = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in arguments], []
    for a, side in zip(arguments, sides):
        side.wait_stream(main)
        with torch.cuda.stream(side):
            out.append(function(*a))
    for side in sides:
        main.wait_stream(side)
    return out


def replayed(function, example):
    """`function` of one CUDA tensor, captured as a CUDA graph. Its result is overwritten by the next call."""
    static, side = example.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(static)  # libraries set themselves up outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on working
        out = function(static)

    def replay(x):
        static.copy_(x)
        graph.replay()
        return out

    replay.holds = function  # and with it the tensors that the graph reads
    return replay


def stack_maps(shapes, like):
    """Index maps between the matrices, flat and one after another, (n,), and zero-padded stacks, one for each power of two
    that shorter sides round up to; wide matrices lie in them as they are, tall ones transposed.

    Returns gathers, an index (k, r, c) into (n+1,) for each stack, n where padded; scales (k, 1, 1) of the updates; and
    scatter (n,), where each element of the matrices lies in the stacks, flat and one after another.
    """
    sizes = [r * c for r, c in shapes]
    n, classes = sum(sizes), {}
    for shape, index in zip(shapes, torch.arange(n).split(sizes)):
        classes.setdefault(max(32, 1 << (min(shape) - 1).bit_length()), []).append(index.view(shape))
    gathers, scales = [], []
    for members in classes.values():
        gather = torch.full((len(members), max(min(m.shape) for m in members), max(max(m.shape) for m in members)), n)
        for slot, m in zip(gather, members):
            slot[: min(m.shape), : max(m.shape)] = m if m.shape[0] <= m.shape[1] else m.T
        gathers.append(gather.to(like.device))
        scale = [max(1, fan_out / fan_in) ** 0.5 for fan_in, fan_out in (m.shape for m in members)]
        scales.append(like.new_tensor(scale)[:, None, None])
    flat = torch.cat([g.flatten() for g in gathers])
    scatter = torch.empty(n + 1, dtype=torch.int64, device=like.device)
    scatter[flat] = torch.arange(len(flat), device=like.device)
    return gathers, scales, scatter[:-1]
