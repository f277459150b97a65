"""Median time of an all-reduce of the gradients, 707,658 floats, alone: torchrun --nproc_per_node=2 allreduce.py"""

import os, statistics, torch, torch.distributed as dist

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
x, times = torch.zeros(707_658, device="cuda"), []
for _ in range(220):
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    dist.all_reduce(x)
    b.record()
    torch.cuda.synchronize()
    times.append(a.elapsed_time(b))
if dist.get_rank() == 0:
    q = statistics.quantiles(times[20:], n=10)
    print(
        f"{torch.cuda.get_device_name()}: all-reduce of {4 * len(x) / 1e6:.2f} MB over {dist.get_world_size()} GPUs: median {statistics.median(times[20:]):.3f} ms, deciles {q[0]:.3f} to {q[-1]:.3f} ms, n = 200"
    )
dist.destroy_process_group()
