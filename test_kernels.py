"""The fused kernels against plain torch in float64. On a GPU: python -m pytest -s test_kernels.py

Without one, their own source is compiled as C++ and run on the CPU, threads in turn: slow, and the same to the last sum.
"""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

import data
import kernels
import model as nequix
from calc import NequixCalculator
from kernels import Padded, Replay, layer_kernels
from model import Nequix, energy_forces_stress, torch_conv
from test_data import batch_of, odd_structures
from test_model import released, to
from train import Trainer, loss_and_gradient

CUDA = torch.device("cuda")


def distance(a, b):
    """Relative, in the Frobenius norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


HOST = r"""
// A GPU for the CPU, one block at a time: threads are coroutines, which go on in turn; what a warp does together waits for all.
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <utility>
#include <vector>
using std::max;
using std::min;
typedef long long i64;
#define DEV inline
#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x, y; };
static Index threadIdx, blockIdx, blockDim, gridDim;
alignas(16) char memory[1 << 18];

static ucontext_t beginning;
static jmp_buf main_place, places[128];  // swapcontext would ask the kernel for the signals' mask every time
static enum { NEW, BEGUN, DONE } state[128];
static std::function<void()> body;
static std::vector<std::function<void()>> copies[128];
static void yield() {
  const int me = threadIdx.x;
  if (!_setjmp(places[me])) _longjmp(main_place, 1);
  threadIdx.x = me;
}
static void start() {
  state[threadIdx.x] = BEGUN;
  body();
  state[threadIdx.x] = DONE;
  _longjmp(main_place, 1);
}
static void go_on(int i) {
  threadIdx.x = i;
  if (_setjmp(main_place)) return;
  if (state[i] == BEGUN) _longjmp(places[i], 1);
  static std::vector<char> stacks(128 << 17);
  getcontext(&beginning);
  beginning.uc_stack.ss_sp = &stacks[i << 17];
  beginning.uc_stack.ss_size = 1 << 17;
  makecontext(&beginning, start, 0);
  setcontext(&beginning);
}
static void run_block() {
  std::fill(state, state + blockDim.x, NEW);
  for (bool busy = true; busy;) {
    busy = false;
    for (int i = 0; i < blockDim.x; i++)
      if (state[i] != DONE) {
        busy = true;
        go_on(i);
      }
  }
}
template <class T>
static void launch(void (*kernel)(T), const T* args, int x, int y, int threads) {
  gridDim = {x, y};
  blockDim = {threads, 1};
  body = [&] { kernel(*args); };
  for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++) run_block();
}

struct Barrier { int arrived = 0, turn = 0; };
static Barrier warps[4], block;
static void wait(Barrier& b, int size) {
  const int turn = b.turn;
  if (++b.arrived == size) { b.arrived = 0; b.turn++; }
  else while (b.turn == turn) yield();
}
static void __syncthreads() { wait(block, blockDim.x); }
static void __syncwarp() { wait(warps[threadIdx.x / 32], 32); }
// f of what each thread of the warp brings
template <class T, class F>
static auto together(const T& mine, F f) {
  static T all[4][32];
  const int warp = threadIdx.x / 32;
  all[warp][threadIdx.x % 32] = mine;
  __syncwarp();
  auto result = f(all[warp]);
  __syncwarp();
  return result;
}
template <class T> static T __ldg(const T* p) {
  if ((size_t)p % sizeof(T)) abort();  // as a GPU would
  return *p;
}
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
template <class T> static T atomicAdd(T* p, T x) { return std::exchange(*p, *p + x); }
static void add2(float* p, float a, float b) { p[0] += a; p[1] += b; }
static void add4(float* p, float a, float b, float c, float d) { p[0] += a; p[1] += b; p[2] += c; p[3] += d; }
static float __shfl_xor_sync(unsigned, float x, int d) { return together(x, [&](float* v) { return v[threadIdx.x % 32 ^ d]; }); }
static unsigned __reduce_max_sync(unsigned, unsigned x) { return together(x, [&](unsigned* v) { return *std::max_element(v, v + 32); }); }

static unsigned half(float x) {
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  x = fabsf(x);
  if (x != x) return 0x7fff;
  const int e = x == 0 ? -14 : max(ilogbf(x), -14);
  return sign | (e > 15 ? 0x7c00 : (unsigned)((e + 14) << 10) + (unsigned)nearbyintf(ldexpf(x, 10 - e)));
}
static float full(unsigned h) {
  const int e = h >> 10 & 31, m = h & 1023;
  const float x = e == 31 ? (m ? NAN : INFINITY) : ldexpf(e ? m + 1024 : m, (e ? e : 1) - 25);
  return h & 0x8000 ? -x : x;
}
static unsigned half2(float a, float b) { return half(a) | half(b) << 16; }
static float first(unsigned h) { return full(h & 0xffff); }
static float second(unsigned h) { return full(h >> 16); }
static unsigned mul2(unsigned a, unsigned b) { return half2(first(a) * first(b), second(a) * second(b)); }
static unsigned fma2(unsigned a, unsigned b, unsigned c) {  // float32 holds the products exactly, and their sums but for rare ties
  return half2(first(a) * first(b) + first(c), second(a) * second(b) + second(c));
}
static float tf32(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000) & 0xffffe000); }

struct Product { float d[4]; };
template <class T, class A, class B>
static void multiply(float (&d)[4], const T& mine, int depth, A a, B b) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const Product p = together(mine, [&](const T* v) {
    Product p = {d[0], d[1], d[2], d[3]};
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < depth; k++) p.d[i] += a(v, g + i / 2 * 8, k) * b(v, k, 2 * q + i % 2);
    return p;
  });
  for (int i = 0; i < 4; i++) d[i] = p.d[i];
}
struct Tf32 { float a[4], b[2]; };
static void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  multiply(d, Tf32{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, 8,
      [](const Tf32* v, int r, int k) { return v[r % 8 * 4 + k % 4].a[r / 8 + k / 4 * 2]; },
      [](const Tf32* v, int k, int n) { return v[n * 4 + k % 4].b[k / 4]; });
}
struct Half { unsigned a[4], b[2]; };
static void multiply_half(float (&d)[4], const Half& mine, int depth) {
  multiply(d, mine, depth,
      [](const Half* v, int r, int k) { return (k % 2 ? second : first)(v[r % 8 * 4 + k % 8 / 2].a[r / 8 + k / 8 * 2]); },
      [](const Half* v, int k, int n) { return (k % 2 ? second : first)(v[n * 4 + k % 8 / 2].b[k / 8]); });
}
static void mma_half(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) { multiply_half(d, {{a0, a1}, {b0}}, 8); }
static void mma_half(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply_half(d, {{a0, a1, a2, a3}, {b0, b1}}, 16);
}
struct Matrices { unsigned r[4]; };
static void load_matrices(unsigned (&r)[4], const void* row) {
  const int lane = threadIdx.x % 32;
  const Matrices m = together((const unsigned short*)row, [&](const unsigned short** v) {
    Matrices m;
    for (int i = 0; i < 4; i++) memcpy(&m.r[i], v[8 * i + lane / 4] + lane % 4 * 2, 4);
    return m;
  });
  memcpy(r, m.r, 16);
}
static void load_matrices_transposed(unsigned (&r)[4], const void* row) {
  const int lane = threadIdx.x % 32;
  const Matrices m = together((const unsigned short*)row, [&](const unsigned short** v) {
    Matrices m;
    for (int i = 0; i < 4; i++) m.r[i] = v[8 * i + lane % 4 * 2][lane / 4] | v[8 * i + lane % 4 * 2 + 1][lane / 4] << 16;
    return m;
  });
  memcpy(r, m.r, 16);
}
template <int BYTES>
static void copy_async(void* to, const void* from) { copies[threadIdx.x].push_back([=] { memcpy(to, from, BYTES); }); }
static void wait_for_copies() {
  for (auto& copy : copies[threadIdx.x]) copy();
  copies[threadIdx.x].clear();
  __syncwarp();
}
"""


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_device = pytest.mark.skipif(
    not torch.cuda.is_available() and not shutil.which("g++"), reason="needs a CUDA GPU or g++"
)


class OnCPU:
    """The kernels' own source, compiled for the CPU, in place of kernels.Module."""

    n_sm = 1

    def __init__(self, sources, device):
        self.sources = self.functions = sources
        code = "\n".join(dict.fromkeys(sum(sources.values(), ())))  # what kernels share, once
        launches = "\n".join(
            f'extern "C" void launch_{t}(void (*f)(const {t}), const {t}* a, int x, int y, int n) {{ launch<{t}>(f, a, x, y, n); }}'
            for t in ("Args", "Geometry", "Mlp", "Nodes", "Pairs")
            if f"struct {t} {{" in code
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernels.cpp"
            file.write_text(HOST + code.removeprefix(kernels.HARDWARE) + launches)
            # Where distributions fortify by default, a longjmp to another stack would abort.
            options = ["-O1", "-w", "-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"]
            subprocess.run(["g++", *options, "-o", f"{file}.so", file], check=True)
            self.compiled = ctypes.CDLL(f"{file}.so")

    def resident(self, name, threads, shared):
        return 2

    def launch(self, name, grid, args, threads, shared=0):
        run = getattr(self.compiled, f"launch_{type(args).__name__}")
        run(getattr(self.compiled, name), ctypes.byref(args), *grid, threads)


@functools.lru_cache
def fused_on_cpu(*shape, shared_memory=1 << 18):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "Module", OnCPU)
        patch.setattr(kernels, "shared_memory", lambda device: shared_memory)
        return layer_kernels.__wrapped__(*shape)


@needs_device
def test_pairs_equal_those_of_the_cpu(monkeypatch):
    structures = odd_structures()
    numbers, positions, cell, pbc = (
        np.concatenate([getattr(a, k) for a in structures]) for k in ("numbers", "positions", "cell", "pbc")
    )
    structure = torch.repeat_interleave(torch.arange(len(structures)), torch.tensor([len(a) for a in structures]))
    arrays = (
        torch.from_numpy(positions),
        torch.from_numpy(cell).view(-1, 3, 3),
        torch.from_numpy(pbc).view(-1, 3),
        structure,
    )
    bins = data.linked_cells(*arrays, 6.0)
    expected = data.neighbor_list(bins, 6.0)
    if torch.cuda.is_available():
        there = data.moved(bins, CUDA)
        assert all(torch.equal(there[k].cpu(), bins[k]) for k in bins)
        got = [t.cpu() for t in data.neighbor_list(there, 6.0)]
    else:
        monkeypatch.setattr(
            kernels,
            "pairs_module",
            functools.lru_cache(lambda device: OnCPU(dict(find_pairs=(kernels.PAIRS,)), device)),
        )
        got = kernels.find_pairs(6.0, **bins)
    assert len(got[0]) > 10_000
    for a, b in zip(got[:4], expected):
        assert torch.equal(a, b)
    assert (got[4] - expected[4]).abs().max() < 1e-12


def test_convolution_refuses_other_tensors():
    k = SimpleNamespace(shape=SimpleNamespace(x_dim=4, lmax=0, width=64, w_dim=4), device=CUDA)
    row_ptr, senders = torch.tensor([0, 1, 2]), torch.tensor([1, 0])
    with pytest.raises(ValueError, match="x should be .2, 4. torch.float32 on cuda"):
        kernels.Conv.apply(
            k, torch.zeros(2, 4), torch.zeros(2, 1), torch.zeros(2, 64), torch.zeros(64, 4), senders, row_ptr
        )
    k.device = torch.device("cpu")
    tensors = torch.zeros(2, 4), torch.zeros(2, 1), torch.zeros(2, 64), torch.zeros(64, 4)
    with pytest.raises(ValueError, match="senders should be .2,. torch.int64 on cpu, not .2,. torch.int32"):
        kernels.Conv.apply(k, *tensors, senders.int(), row_ptr)
    with pytest.raises(ValueError, match="edge vectors should be float64"):
        kernels.Edges.apply(k, torch.zeros(2, 3), 6.0, 6.0)


SHAPES = [  # channels of x, lmax, channels of the result: the three of the paper's model, then others
    ((128, 64, 32, 32), 3, (128, 64, 32, 32)),
    ((89,), 3, (128, 64, 32, 32)),
    ((128, 64, 32, 32), 3, (128,)),
    ((64, 32), 1, (64, 32)),
    ((16, 8, 24), 2, (16, 8, 24)),
    ((5, 3, 2, 1), 3, (4, 6, 2, 1)),
    ((12,), 0, (7,)),
]


def numbers(stored):
    """What `LayerKernels.stored` made of them"""
    if stored.dtype == torch.float16:
        return stored
    high, low = stored.view(torch.float16).double().chunk(2, -1)
    return high + low / 2048


@needs_device
@pytest.mark.parametrize("exact", [True, False], ids=["float32", "tf32"])
@pytest.mark.parametrize("muls, lmax, muls_out", SHAPES)
def test_kernels(muls, lmax, muls_out, exact):
    on_gpu = torch.cuda.is_available()
    if not on_gpu and sum(muls) > 128 and (exact or muls_out == (128,)):
        pytest.skip("slow on the CPU, and the other shapes have it all")
    device, n = (CUDA, 50) if on_gpu else (torch.device("cpu"), 8)
    k = (layer_kernels if on_gpu else fused_on_cpu)(muls, muls_out, lmax, 64, 8, exact, True, device)
    check_kernels(k, muls, muls_out, n)


def test_no_loop_is_the_branch_of_an_if_with_else():
    assert "EACH(i, n) _Pragma" in kernels.PRELUDE
    texts = kernels.PRELUDE, kernels.DEGREE, kernels.MLP, kernels.RADIAL_MLP, kernels.RADIAL_MLP_BACK, kernels.NODES
    assert not re.search(r"[^#]else\s+EACH", "".join(texts) + kernels.GEOMETRY)


KEEPER = """
import os, threading
import kernels
def compile_cuda(source, options):
    both.wait()  # until two are at it: else BrokenBarrierError
    os.write(1, source.encode())  # at once; a line that is printed may be torn by that of the other thread
    return source.encode() * 1000
both, kernels.compile_cuda = threading.Barrier(2, timeout=100), compile_cuda
kernels.os.sched_getaffinity = lambda _: {0, 1}
assert kernels.machine_code([*"abcdab"], (9, 0)) == [x * 1000 for x in (b"a", b"b", b"c", b"d", b"a", b"b")]
"""


def test_kernels_are_compiled_side_by_side_and_once(tmp_path):
    """By one of two processes, two threads at a time; the other one waits and finds them."""
    how = dict(cwd=Path(kernels.__file__).parent, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    run = lambda: subprocess.Popen([sys.executable, "-c", KEEPER], text=True, stdout=-1, stderr=-1, **how)
    out = [p.communicate(timeout=120) for p in (run(), run())]
    assert sorted("".join(o for o, _ in out)) == [*"abcd"], out
    said = f"compiling 4 CUDA kernels (or waiting for a process that does), once: they are kept in {tmp_path}"
    assert any(said in e for _, e in out) and run().communicate(timeout=120) == ("", "")


class Driver:
    """Of CUDA: kernels do nothing, and are refused more shared memory than was asked for."""

    def __init__(self):
        self.loaded, self.shared = [], {}

    def __getattr__(self, name):
        return lambda *_: 0

    def cuModuleGetFunction(self, function, module, name):
        self.loaded.append(name)
        function._obj.value = len(self.loaded)

    def cuFuncSetAttribute(self, function, which, size):
        self.shared[function.value] = size

    def cuLaunchKernel(self, function, *sizes):
        return int(sizes[6] > self.shared.get(function.value, 0))


def test_two_threads_begin_at_once(monkeypatch):
    model, batch = random_model(hidden="12x0e+6x1o", layers=3).to("cpu"), batch_on("cpu", structures()[-1:])
    both, compiled, driver = threading.Barrier(2), [], Driver()

    def machine_code(sources, capability):
        compiled.append(sources)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)  # for another thread, which should not come
        return sources

    about = SimpleNamespace(multi_processor_count=1, shared_memory_per_block_optin=1 << 18)
    cuda = dict(device=contextlib.nullcontext, current_device=lambda: None, synchronize=lambda: None)
    cuda |= dict(get_device_capability=lambda _: (9, 0), get_device_properties=lambda _: about)
    for name, stub in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    monkeypatch.setattr(kernels, "machine_code", machine_code)
    monkeypatch.setattr(kernels, "layer_kernels", functools.lru_cache(layer_kernels.__wrapped__))
    run = lambda _: kernels.atom_energies(model, batch.numbers, batch.vectors, batch.senders, batch.row_ptr)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert kernels.layer_kernels.cache_info().misses == 3
    assert len(compiled) == 1 and len(driver.loaded) == len(compiled[0])


def test_the_cache_of_kernels(tmp_path, monkeypatch, capsys):
    calls, code = [], lambda **how: kernels.machine_code(["a", "b"], (9, 0), **how)
    monkeypatch.setattr(kernels, "compile_cuda", lambda source, options: calls.append(source) or source.encode() * 9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert code() == code() == [b"a" * 9, b"b" * 9] and sorted(calls) == ["a", "b"]
    assert sorted(f.suffix for f in (tmp_path / "modded-nequix").iterdir()) == ["", ".cubin", ".cubin"]
    assert code(anew=True) == code() and len(calls) == 4  # files that the driver refused
    kernels.machine_code(["a"], (8, 0))
    assert len(calls) == 5  # for another GPU
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be kept there
    monkeypatch.setenv("LOCAL_RANK", "1")
    capsys.readouterr()
    assert code() == code() and len(calls) == 9 and capsys.readouterr().err == ""  # rank 0 has said it


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_all_that_is_launched_is_compiled_at_once_and_nothing_else(monkeypatch):
    loads, launched, launch = [], set(), OnCPU.launch
    record = lambda self, name, *args, **more: launched.add((self, name)) or launch(self, name, *args, **more)
    monkeypatch.setattr(OnCPU, "launch", record)
    monkeypatch.setattr(kernels, "load", lambda kernels: loads.append(set(kernels)))
    monkeypatch.setattr(kernels, "layer_kernels", functools.lru_cache(lambda *shape: fused_on_cpu.__wrapped__(*shape)))
    monkeypatch.setattr(nequix, "choose_conv", lambda *_: "fused")
    model, batch = random_model(hidden="12x0e+6x1o", layers=3).to("cpu"), batch_on("cpu", structures()[-1:])
    first = kernels.kernels_of(model.layers[0], model).module
    edges = {(first, "geometry"), (first, "geometry_back")}  # the other layers have them too, but the same
    for run in energy_forces_stress, lambda *args: loss_and_gradient(*args, (20.0, 20.0, 500.0), (1, 3, 9)):
        loads.clear(), launched.clear()
        run(model, batch)
        assert {x for x in loads[0] if "geometry" not in x[1]} | edges == launched
        assert loads[0] == set().union(*loads)
    assert len({self for self, _ in launched}) == 3 and len(launched) > 30


@needs_device
def test_the_file_alone(monkeypatch, capsys):
    """`python kernels.py`: a convolution without a layer."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(kernels, "Module", OnCPU)
        monkeypatch.setattr(kernels, "shared_memory", lambda device: 1 << 18)
    kernels.main("cuda" if torch.cuda.is_available() else "cpu", n=5)
    said = capsys.readouterr()
    assert said.out.count("__global__") == 1
    errors = [float(e) for e in re.findall(r"\d\.\de[+-]\d+", said.err)]
    assert len(errors) == 10 and max(errors[:5]) < 1e-6 and max(errors[5:]) < 1e-3


@needs_device
def test_room_for_edges_but_none():
    """As in the CUDA graph of an atom alone: nothing is read before the first edge, and the sums are zero."""
    on_gpu, n = torch.cuda.is_available(), 3
    device = CUDA if on_gpu else torch.device("cpu")
    k = (layer_kernels if on_gpu else fused_on_cpu)((12,), (7,), 0, 64, 8, False, True, device)
    senders = torch.tensor([10**8, *[0] * 8], device=device)[1:]  # what is before them leads far away
    sh, hidden, row_ptr = (
        k.empty(8, 8).zero_(),
        k.empty(2, 8, 64).zero_(),
        torch.zeros(n + 1, dtype=torch.int64, device=device),
    )
    x, w3 = torch.ones(n, k.shape.x_dim, device=device), torch.ones(64, k.shape.w_dim, device=device)
    y = k.forward("forward_false", x.new_full((n, k.shape.y_dim), torch.nan), x, sh, hidden[0], w3, senders, row_ptr)
    gx, gsh, gr = torch.zeros_like(x), x.new_zeros(8, 8), x.new_zeros(8)
    k.backward(0, x, sh, hidden[0], w3, senders, row_ptr, torch.ones_like(y), slope=hidden[1], gx=gx, gsh=gsh, gr=gr)
    gw3 = k.weight_grad(x, sh, hidden[0], senders, row_ptr, torch.ones_like(y))
    assert all((t == 0).all() for t in (y, gx, gsh, gr, gw3))
    inputs = [t.requires_grad_() for t in (x, x.new_ones(0, 1), x.new_ones(0, 64), w3)]  # and no room
    grads = torch.autograd.grad(kernels.Conv.apply(k, *inputs, senders[:0], row_ptr).sum(), inputs)
    assert all(g.shape == t.shape and (g == 0).all() for g, t in zip(grads, inputs))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("limit, warps", [(45_000, 2), (1, 1)])
def test_a_gpu_with_less_shared_memory(limit, warps):
    k = fused_on_cpu((24, 12), (24, 12), 1, 64, 8, False, True, torch.device("cpu"), shared_memory=limit)
    assert k.shape.warps == warps
    check_kernels(k, (24, 12), (24, 12), 8)


def check_kernels(k, muls, muls_out, n):
    """Of n atoms: every output and gradient."""
    torch.manual_seed(0)
    exact, lmax, device = k.shape.exact, k.shape.lmax, k.device
    counts = torch.randint(0, n, (n,))
    counts[:3] = torch.tensor([0, 1, 6 * n])
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(device)
    e, c = int(counts.sum()), k.shape
    senders = torch.randint(0, n, (e,)).to(device)
    randn = lambda *shape: torch.randn(*shape).to(device)
    x, sh, rd, w3 = randn(2, n, c.x_dim), randn(2, e, (lmax + 1) ** 2), randn(e), randn(64, c.w_dim) / 8
    hidden, gy = randn(2, e, 64), 1e-5 * randn(2, n, c.y_dim)  # gradients are small

    # Reference: values and tangents, the tangent as what it is, a sum of three convolutions
    conv = torch_conv(muls, lmax, len(muls_out) - 1, torch.float64, device)
    X, S, H, W = (t.double().requires_grad_() for t in (x, sh, hidden, w3))
    y = conv(X[0], S[0], H[0], W, senders, row_ptr)
    yd = conv(X[1], S[0], H[0], W, senders, row_ptr) + conv(X[0], S[1], H[0], W, senders, row_ptr)
    yd = yd + conv(X[0], S[0], H[1] * rd.double()[:, None], W, senders, row_ptr)
    first = torch.autograd.grad(y, (X, S, H, W), gy[0].double(), retain_graph=True)
    both = torch.autograd.grad((y * gy[0].double()).sum() + (yd * gy[1].double()).sum(), (X, H, W))

    stored, harmonics = k.stored(hidden), [k.harmonics(s) for s in sh]
    edges = harmonics[0], stored[0], w3, senders, row_ptr
    tangents = dict(xd=x[1], shd=harmonics[1], slope=stored[1], rd=rd)
    error = {}
    error["y"] = distance(k.forward("forward_false", torch.full_like(gy[0], torch.nan), x[0], *edges), y)
    small = edges[0], k.stored(1e-3 * hidden[0]), *edges[2:]  # as of distant edges
    error["small y"] = distance(1e3 * k.forward("forward_false", torch.empty_like(gy[0]), x[0], *small), y)
    error["yd"] = distance(k.forward("forward_true", torch.full_like(gy[0], torch.nan), x[0], *edges, **tangents), yd)
    gx, gsh, gr = torch.zeros_like(x[0]), torch.zeros(harmonics[0].shape, device=device), torch.zeros_like(rd)
    k.backward(0, x[0], *edges, gy[0], slope=stored[1], gx=gx, gsh=gsh, gr=gr)
    error["0 x"], error["0 sh"] = distance(gx, first[0][0]), distance(gsh[:, k.components], first[1][0])
    error["0 r"] = distance(gr, (first[2][0] * H[1]).sum(1).detach())
    leaves = [v.clone().requires_grad_() for v in (x[0], sh[0], hidden[0], w3)]
    grads = torch.autograd.grad(kernels.Conv.apply(k, *leaves, senders, row_ptr), leaves, gy[0])
    for name, a, b in zip(("1 x", "1 sh", "1 h", "1 w"), grads, (first[0][0], first[1][0], first[2][0], first[3])):
        error[name] = distance(a, b)
    gx, gh = torch.zeros_like(x[0]), torch.zeros_like(hidden)
    k.backward(2, x[0], *edges, gy[0], gyd=gy[1], gx=gx, gh=gh, gslope=gh[1], **tangents)
    error["2 x"] = distance(gx, both[0][0])
    error["2 h"] = distance(kernels.in_order(gh), both[1])
    gw = k.weight_grad(x[0], harmonics[0], stored[0], senders, row_ptr, gy[0], gyd=gy[1], **tangents)
    error["2 w"] = distance(gw, both[2])

    # The radial MLP, with tangents
    basis, w1, w2 = randn(2, e, 8), randn(8, 64) / 3, randn(64, 64) / 4
    W1, W2 = (w.double().requires_grad_() for w in (w1, w2))
    silu = torch.nn.functional.silu
    b, bd = basis.double()
    h, hd = torch.func.jvp(lambda b: silu(silu(b @ W1) @ W2), (b,), (bd,))
    padded = k.stored(torch.nn.functional.pad(basis, (0, 8)))
    error["mlp"] = distance(numbers(k.radial(padded, [w1, w2])), torch.stack([h, hd]))
    ghs = 1e-5 * randn(2, e, 64)
    expected = torch.autograd.grad((h * ghs[0]).sum() + (hd * ghs[1]).sum(), (W1, W2))
    shuffled = ghs.view(2, e, 4, 2, 4, 2).transpose(3, 4).reshape(2, e, 64)
    assert torch.equal(kernels.in_order(shuffled), ghs)
    for name, a, b in zip(("mlp w1", "mlp w2"), k.radial_back(shuffled, padded, [w1, w2]), expected):
        error[name] = distance(a, b)

    # Edge vectors
    v, d = (randn(e, 3).double() for _ in range(2))
    leaf = v.clone().requires_grad_()
    got = kernels.Edges.apply(k, leaf, 2.0, 6.0)
    r = torch.linalg.vector_norm(v, dim=1)
    embed = lambda v: nequix.harmonics(v / torch.linalg.vector_norm(v, dim=1)[:, None])[:, : (lmax + 1) ** 2]
    basis = torch.func.jvp(lambda r: nequix.radial_basis(r, 2.0, 8, 6.0), (r,), (torch.ones_like(r),))
    error["sh"] = distance(numbers(got[0])[:, k.components], embed(v))
    error["basis"] = distance(numbers(got[1])[..., :8], torch.stack(basis))
    shd, rdot = kernels.edge_tangents(k, v, d)
    expected = torch.func.jvp(lambda v: (embed(v), torch.linalg.vector_norm(v, dim=1)), (v,), (d,))[1]
    error["shd"], error["rd"] = (
        distance(numbers(shd)[:, k.components], expected[0]) if lmax else 0,
        distance(rdot, expected[1]),
    )
    gs, gr = randn(e, (lmax + 1) ** 2), randn(e)
    by_sh = torch.zeros(e, 8 * (lmax + 1), device=device).index_copy(1, k.components, gs)
    expected = torch.func.vjp(lambda v: (embed(v), torch.linalg.vector_norm(v, dim=1)), v)[1](
        (gs.double(), gr.double())
    )[0]
    error["g"] = distance(torch.autograd.grad(got[2:], leaf, (by_sh, gr))[0], expected)
    print({name: f"{v:.1e}" for name, v in error.items()})
    assert all(e < (1e-6 if exact else 1e-3) for e in error.values())


def batch_on(device, structures):
    """With random labels; no stress where there is none."""
    b = to(batch_of(structures, 6.0), device)
    g = torch.Generator().manual_seed(1)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(device)
    b.energy, b.forces, b.stress = rand(len(b.cell)), rand(len(b.numbers), 3), rand(len(b.cell), 3, 3)
    b.stress[~b.pbc.all(1)] = torch.nan
    return b


def structures():
    rng, out = np.random.default_rng(0), [bulk("Si"), bulk("NaCl", "rocksalt", 5.6) * (2, 1, 1), bulk("Fe") * (2, 2, 2)]
    out += [molecule("C2H6"), molecule("H2O")]
    for a in out:
        a.rattle(0.1, rng=rng)
    return out


def test_pieces_of_many_edges(monkeypatch):
    monkeypatch.setattr(kernels, "PIECE", 10)
    row_ptr = torch.tensor([0, 0, 0, 4, 4, 9, 12, 45, 45, 50, 50])
    got = list(kernels.pieces(row_ptr, lambda edges: torch.arange(100)[edges], None))
    assert [(n.start, n.stop) for n, *_ in got] == [(0, 5), (5, 6), (6, 10)]  # cut before the nodes of edges 10, 20, ..
    for nodes, edges, part, hidden in got:
        assert torch.equal(part + edges.start, row_ptr[nodes.start : nodes.stop + 1])
        assert part[0] == 0 and hidden.tolist() == list(range(edges.start, edges.stop))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("norm", [True, False])
def test_a_step_without_double_backward(norm, monkeypatch):
    """The gradient of the loss by tangents, on the CPU, against autograd's double backward."""
    model, batch = random_model(norm, "12x0e+6x1o+4x2e", layers=3).to("cpu"), batch_on("cpu", structures()[::4])
    reference = gradients(model, batch, "torch", torch.float64)
    monkeypatch.setattr(kernels, "layer_kernels", fused_on_cpu)
    monkeypatch.setattr(nequix, "choose_conv", lambda kind, *_: kind)
    loss, efs, grads = gradients(model, batch, "fused", torch.float32)
    assert abs(loss / reference[0] - 1) < 1e-5
    assert (efs[0] - reference[1][0]).abs().max() < 2e-6 and distance(efs[1], reference[1][1]) < 1e-5  # eV
    monkeypatch.setattr(kernels, "PIECE", 150)
    again = [t.detach() for t in energy_forces_stress(model, batch)]
    assert torch.equal(again[0], efs[0]) and distance(again[1], efs[1]) < 1e-6
    assert distance(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in reference[2]])) < 1e-5
    with pytest.raises(ValueError, match="no second derivative"):
        energy_forces_stress(model, batch, create_graph=True)


def random_model(norm=True, hidden="128x0e+64x1o+32x2e+32x3o", layers=4):
    torch.manual_seed(2)
    stats = dict(
        avg_n_neighbors=40.0, scale=0.8, shift=0.1, atomic_numbers=[1, 6, 8, 11, 14, 17, 26], atom_energies=[0.0] * 7
    )
    model = Nequix({**stats, "norm": norm, "hidden": hidden, "lmax": hidden.count("+"), "layers": layers})
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model.to(CUDA if torch.cuda.is_available() else "cpu")


def gradients(model, batch, conv, dtype):
    model.conv = conv
    model = model.to(dtype).requires_grad_()
    counts = len(batch.cell), len(batch.numbers), 27
    loss, grads = loss_and_gradient(model, batch, (20.0, 20.0, 500.0), counts)
    return loss, [t.detach() for t in energy_forces_stress(model, batch)], grads


def compare_gradients(model, exact):
    batch = batch_on(CUDA, structures())
    model.tf32 = not exact
    loss, efs, grads = gradients(model, batch, "fused", torch.float32)
    ref_loss, ref_efs, ref = gradients(model, batch, "torch", torch.float64)
    names = [n for n, _ in model.named_parameters()]
    errors = {n: distance(a, b) for n, a, b in zip(names, grads, ref)}
    total = distance(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in ref]))
    worst = max(errors, key=errors.get)
    force = distance(efs[1], ref_efs[1])
    print(
        f"gradient {total:.1e}, worst {worst} {errors[worst]:.1e}, loss {abs(loss / ref_loss - 1):.1e}, forces {force:.1e}"
    )
    assert total < (1e-5 if exact else 1e-2) and abs(loss / ref_loss - 1) < (1e-5 if exact else 1e-2)
    assert force < (1e-5 if exact else 1e-2) and all(e < (3e-5 if exact else 3e-2) for e in errors.values())
    assert torch.allclose(efs[0], ref_efs[0], rtol=0, atol=1e-4 if exact else 1e-1)


@needs_device
def test_a_structure_without_an_energy_spoils_no_other(monkeypatch):
    """Two atoms at one place. And a second backward gives what the first one gave."""
    model = random_model(hidden="12x0e+6x1o", layers=2)
    if not torch.cuda.is_available():
        monkeypatch.setattr(kernels, "layer_kernels", fused_on_cpu)
        monkeypatch.setattr(nequix, "choose_conv", lambda *_: "fused")
    si, nacl, fe, ethane, water = structures()
    good, device = [ethane, Atoms("Na"), water, si], model.e0.device
    expected = energy_forces_stress(model, batch_on(device, good))
    two = Atoms("Na2", np.zeros((2, 3)), cell=np.eye(3) * 8.0, pbc=True)
    batch = batch_on(device, [good[0], two, good[1], two, good[2], good[3]])
    energy, forces, _ = energy_forces_stress(model, batch)
    fine = torch.tensor([0, 2, 4, 5], device=device)
    assert energy[[1, 3]].isnan().all() and (energy[fine] - expected[0]).abs().max() < 1e-5
    assert distance(forces[torch.isin(batch.structure, fine)], expected[1]) < 1e-5

    batch = batch_on(device, good)
    vectors = batch.vectors.requires_grad_()
    energy = model(batch.numbers, vectors, batch.senders, batch.row_ptr)
    first, second = (torch.autograd.grad(energy[:8].sum(), vectors, retain_graph=True)[0] for _ in range(2))
    assert first.abs().max() > 1e-3 and distance(first, second) < 1e-6


@needs_device
def test_padded_batches_and_their_cuda_graph(monkeypatch):
    """One batch after another in the room of the first, the last one beyond it: gradients as without padding."""
    model, weights = random_model(hidden="12x0e+6x1o", layers=2), (20.0, 20.0, 500.0)
    if not torch.cuda.is_available():
        monkeypatch.setattr(kernels, "layer_kernels", fused_on_cpu)
        monkeypatch.setattr(nequix, "choose_conv", lambda *_: "fused")
    si, nacl, fe, ethane, water = structures()
    device, counts, padded = model.e0.device, np.array([2.0, 9.0, 9.0]), None
    trainer = Trainer(model, None, weights)

    def gradient(accumulate, *args):
        trainer.flat.zero_()
        accumulate(*args)
        return trainer.flat.clone()

    for some in ([si, nacl, water], [water, nacl], [water] * 3 + [nacl, si]):  # 9 atoms first, so room for 10
        batch = batch_on(device, some)
        expected = gradient(trainer.add_gradient, batch, counts)
        assert isinstance(trainer.accumulate, Replay)
        for used in filter(None, (padded, getattr(trainer.accumulate, "padded", None))):
            used.batch.vectors.zero_()  # as of two atoms at one place: the next batch may leave this edge as padding
        if torch.cuda.is_available():
            before, got = trainer.accumulate.padded, gradient(trainer.accumulate, batch, counts)
            assert (trainer.accumulate.padded is before) == (before is not None and len(some) < 5)
        else:
            room = [len(t) + len(t) // 10 + 1 for t in (batch.numbers, batch.senders, batch.cell)]
            padded = padded or Padded(batch, room)
            assert padded.fill(batch) == (len(some) < 5)
            if len(some) == 5:
                break
            assert len(padded.batch.row_ptr) == len(padded.batch.numbers) + 1
            got = gradient(trainer.add_gradient, padded.batch, torch.from_numpy(counts))
        assert got[-1].item() == pytest.approx(expected[-1].item(), rel=1e-6) and distance(got, expected) < 1e-5


@needs_cuda
@pytest.mark.parametrize("exact", [True, False], ids=["float32", "tf32"])
@pytest.mark.parametrize("options", [{}, dict(norm=False), dict(hidden="24x0e+12x1o")], ids=str)
def test_loss_gradient_of_random_weights(options, exact):
    compare_gradients(random_model(**options), exact)


@needs_cuda
@pytest.mark.parametrize("exact", [True, False], ids=["float32", "tf32"])
def test_loss_gradient_of_released_weights(exact):
    compare_gradients(nequix.load(released(), CUDA), exact)


@needs_cuda
def test_cuda_graph_of_the_calculator(tmp_path):
    """Molecular dynamics far enough to renew the list: every step as a calculator that has seen nothing before gives it."""
    model = random_model()
    model.config["scale"] = 0.05
    nequix.save(tmp_path / "model.pt", model)
    calc = NequixCalculator(tmp_path / "model.pt")
    atoms, rng, lists = bulk("Si", cubic=True) * 2, np.random.default_rng(0), set()
    for step in range(12):
        atoms.positions += rng.normal(size=(len(atoms), 3)) * 0.04
        atoms.set_cell(atoms.cell.array * (1 + 1e-4 * step), scale_atoms=True)
        atoms.calc = NequixCalculator(tmp_path / "model.pt")
        expected = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        atoms.calc = calc
        assert abs(atoms.get_potential_energy() - expected[0]) < 1e-5 * len(atoms)
        assert np.abs(atoms.get_forces() - expected[1]).max() < 1e-5 * np.abs(expected[1]).max()
        assert np.abs(atoms.get_stress() - expected[2]).max() < 1e-5 * np.abs(expected[2]).max()
        lists.add(id(calc.listed[0]))
    assert calc.step_graph is not None and len(lists) > 1


@needs_cuda
def test_forces_and_stress_by_finite_differences():
    """Of float32 energies, along random displacements and strains."""
    model, atoms, rng, h = random_model(), bulk("NaCl", "rocksalt", 5.6) * (2, 2, 1), np.random.default_rng(0), 0.003
    model.conv = "fused"
    atoms.rattle(0.1, rng=rng)
    values = lambda a: energy_forces_stress(model, to(batch_of([a], 6.0), CUDA))
    _, forces, stress = (x.cpu().numpy() for x in values(atoms))
    for _ in range(4):
        u, strain, energies, strained = rng.normal(size=forces.shape), rng.normal(size=(3, 3)), [], []
        strain = (strain + strain.T) / 4
        for sign in (1, -1):
            moved, deformed = atoms.copy(), atoms.copy()
            moved.positions += sign * h * u
            deformed.set_cell(atoms.cell.array @ (np.eye(3) + sign * h * strain), scale_atoms=True)
            energies.append(values(moved)[0].item())
            strained.append(values(deformed)[0].item())
        slopes = (energies[0] - energies[1]) / (2 * h), (strained[0] - strained[1]) / (2 * h)
        expected = -(forces * u).sum(), atoms.get_volume() * (stress[0] * strain).sum()
        print("dE/dr", slopes[0], expected[0], "dE/dstrain", slopes[1], expected[1])
        assert slopes == pytest.approx(expected, rel=3e-3, abs=3e-5)


@needs_cuda
def test_the_hessian_is_symmetric():
    """Central differences of forces, float32: |J - J^T| / |J + J^T|, which kernels with a wrong l = 3 would show."""
    model, atoms, h = random_model(), bulk("NaCl", "rocksalt", 5.6) * (2, 2, 1), 0.02
    atoms.rattle(0.1, rng=np.random.default_rng(0))
    for conv in ["torch", "fused", *([] if nequix.oeq_error() else ["oeq"])]:
        model.conv, columns = conv, []
        for i in range(3 * len(atoms)):
            forces = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[i // 3, i % 3] += sign * h
                forces.append(energy_forces_stress(model, to(batch_of([moved], 6.0), CUDA))[1].flatten())
            columns.append((forces[0] - forces[1]) / (2 * h))
        j = torch.stack(columns)
        print(f"{conv}: |J - J^T| / |J + J^T| = {(j - j.T).norm() / (j + j.T).norm():.1e}")
        assert (j - j.T).norm() < 1e-3 * (j + j.T).norm()


@needs_cuda
def test_several_streams():
    k = layer_kernels((12,), (7,), 0, 64, 8, True, True, CUDA)
    row_ptr, senders = torch.arange(0, 40001, 20, device=CUDA), torch.randint(0, 2000, (40000,), device=CUDA)
    randn = lambda *shape: torch.randn(*shape, device=CUDA)
    inputs = [(randn(2000, 12), randn(40000, 1), randn(40000, 64), randn(64, 12), senders, row_ptr) for _ in range(6)]
    expected = [kernels.Conv.apply(k, *x) for x in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in inputs], []
    for stream, x in zip(streams, inputs):
        with torch.cuda.stream(stream):
            results.append(kernels.Conv.apply(k, *x))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_what_the_fused_kernels_can_not_do(monkeypatch):
    """Deterministic sums and float64: "auto" takes plain torch, and who asks for the kernels is told."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(nequix, "oeq_error", lambda: "not installed")
    assert (
        nequix.choose_conv("auto", "cuda") == "fused" and nequix.choose_conv("auto", "cuda", torch.float64) == "torch"
    )
    with pytest.raises(ValueError, match="needs float32 or TF32"):
        nequix.choose_conv("fused", "cuda", torch.float64)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert nequix.choose_conv("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match="no fixed order"):
        nequix.choose_conv("fused", "cuda")
