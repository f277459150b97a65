"""The convolution of NequIP-class networks as fused CUDA kernels, compiled at run time by the NVRTC that comes with torch.

    out[i] = sum over edges e with receiver i of  (hidden_e w3) * CG(x[sender_e], Y_e)

    k = Convolution(muls, paths, lmax, width, exact, device)                # of one shape
    out = Conv.apply(k, x, sh, hidden, w3, senders, row_ptr)                # differentiable once
    python kernels.py > forward.cu                                          # checks it, and prints one kernel to read

The idea. A path (l1, l2 -> l3) couples the sender's features x[u, m1] (channel u) with the edge's harmonics Y[m2], by
coefficients C that are the same for all edges, and weighs the result by W_u = sum_k hidden_k w3_ku. So C can be taken out
of the sum over the edges of a node, and what remains are products of small matrices, which the tensor cores do:

    Z[u, m1, m2] = sum_e (W_u x[u, m1])_e Y_e[m2]          out[u, m3] = sum_{m1, m2} C[m1, m2, m3] Z[u, m1, m2]

Backward, g being the gradient at the node's output:

    G[u, m1, m2] = sum_m3 C[m1, m2, m3] g[u, m3]           T_e[u, m1] = sum_m2 G[u, m1, m2] Y_e[m2]
    by x:  W T        by W:  sum_m1 x T        by Y:  sum_{u, m1} W x G

Take (1, 1 -> 2) and one channel: Z is the 3 x 3 sum of W x Y^T over the node's edges, and the 5 outputs are the inner products
of Z with the five 3 x 3 matrices C[:, :, m3], which are symmetric and have no trace.

What happens to an edge from atom j to atom i:

1.  `find_pairs` finds it and writes its vector, beside the other edges of i.
2.  `geometry` makes of the vector its harmonics Y, 8 numbers for each degree, the last ones zero, and its radial basis;
    `radial_mlp` makes of the basis the layer's `hidden`, 64 numbers. Convolutions read Y and hidden only, as float16.
3.  `forward`, a kernel for each degree l1 of x. A block takes node i, 16 of its edges at a time; Y and hidden of the next 16
    are on their way to shared memory meanwhile. A warp has 16 channels of x. On the tensor cores it makes W of its channels, the
    16 edges and a path from hidden and w3. A thread finds in its registers W of some channels and edges: it loads
    x[j] of just these from memory and multiplies. The result, again an operand of the tensor cores, times Y is
    added to Z: 16 channels by 8 components m2, for each m1, in registers.
4.  After the last edge of i, Z times C is out[i], which is written once. Neither W nor the messages are ever in memory.
5.  `norm_gate` and the matrix products of `Linear` turn out[i] into the next layer's x[i].
6.  `backward` forms G of node i once, takes the same 16 edges, makes their W again and T = G Y, adds W T to the gradient of
    x[j], in memory, and sums over all channels what goes to Y and r (to hidden, when weights are trained).
7.  `weight_grad`: a warp keeps the gradient of w3, of 16 channels and some paths, in registers for many nodes.
8.  `geometry_back`: gradients by Y and r become that by the vector, of which forces and stress are sums.

Training on forces needs no double backward. With tangents (xd, Yd, hiddend) along a displacement of the atoms, the tangent
of the output is a first-order quantity (`forward<true>`), and one backward of (out, tangent) gives the gradient of the
weights. At the end of the file the network of model.py is made of all this (`atom_energies`, `energy_tangent`), and a training
step is a CUDA graph (`Replay`).

Modes. exact=False takes float16 for the operands of matrix products: its significand is TF32's. exact=True takes pairs of
them, 22 bits, and three products: float32 accuracy. Gradients are brought to about 1 before, so that their size does not
matter; but products of a weight and a feature, or of a feature and a harmonic, beyond 65504 overflow, and below 6e-5 they
lose digits.
"""

import contextlib
import ctypes
import fcntl
import functools
import gc
import hashlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock, get_ident
from types import SimpleNamespace

import numpy as np
import torch
from torch.autograd.function import once_differentiable

# Blocks a multiprocessor, by degree of the input: what the compiler fits the registers to, if the shared memory suffices
BOUNDS = {
    "forward<false>": (4, 4, 4, 5),
    "forward<true>": (3, 3, 4, 4),
    "backward<0>": (4, 3, 2, 2),
    "backward<1>": (4, 3, 2, 2),
    "backward<2>": (3, 3, 2, 2),
    "weight_grad<false>": (2, 2, 2, 2),
    "weight_grad<true>": (2, 2, 2, 2),
}
MULTIPROCESSOR = 228 * 1024  # bytes of shared memory, of an H100

# How a matrix lies in the registers of a warp, whose threads are (g, q) = (lane / 4, lane % 4). The thread g.q holds, of
#
#     the result (16 x 8) and, as float16, the left operand:           the right operand (8 x 8), as float16:
#
#     columns  0 1   2 3   4 5   6 7                                   columns   0     1     2         7
#     row 0    0.0   0.1   0.2   0.3    in its first two registers     row 0    0.0   1.0   2.0  ...  7.0
#     row 1    1.0   1.1   1.2   1.3                                   row 1    0.0   1.0   2.0  ...  7.0
#      ..                                                              row 2    0.1   1.1   2.1  ...  7.1
#     row 7    7.0   7.1   7.2   7.3                                   row 3    0.1   1.1   2.1  ...  7.1
#     row 8    0.0   0.1   0.2   0.3    in the other two                ..
#      ..                                                              row 7    0.3   1.3   2.3  ...  7.3
#     row 15   7.0   7.1   7.2   7.3
#
# So a result, rounded, is the left operand of the next product as it is, and 8 of its rows, taken as columns, the right one.
# Products over 16 have two such operands side by side. A thread has rows g and g+8: `forward` and `weight_grad`, whose rows
# are channels, give it channels 2g and 2g+1, which are 8 bytes in memory: rows 0 to 7 are the even channels, 8 to 15 the odd.

# What the kernels ask of the GPU, in PTX. test_kernels.py has the same in C++, and so runs all else on a CPU.
HARDWARE = r"""
typedef long long i64;
#define DEV __device__ __forceinline__

// Two floats as float16, the first in the low half
DEV unsigned half2(float a, float b) { unsigned h; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(b), "f"(a)); return h; }
DEV float first(unsigned h) { float x; asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(x) : "r"(h)); return x; }
DEV float second(unsigned h) { float x; asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(x) : "r"(h)); return x; }
DEV unsigned mul2(unsigned a, unsigned b) { unsigned d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEV unsigned fma2(unsigned a, unsigned b, unsigned c) { unsigned d; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }
// Rounded to TF32, whose 10 explicit bits are also those of float16; its other 13 may be anything
DEV float tf32(float x) {
  unsigned t;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(t) : "f"(x));
  return __uint_as_float(t & 0xffffe000);
}

// d (16 x 8) += a (16 x 8) b (8 x 8). Thread (g, q) = (lane / 4, lane % 4) has of d: columns 2q, 2q+1 of row g, then of row
// g+8. Of a: column q of rows g and g+8, then column q+4; of b: rows q, q+4 of column g.
DEV void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
// In float16, of a: columns 2q, 2q+1 of rows g and g+8; of b: rows 2q, 2q+1 of column g; then the same of the next 8.
DEV void mma_half(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
}
DEV void mma_half(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Four 8 x 8 matrices of float16 in shared memory, thread 8 i + r pointing at row r of matrix i: of each, columns 2q, 2q+1
// of row g; transposed: rows 2q, 2q+1 of column g.
DEV void load_matrices(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((unsigned)__cvta_generic_to_shared(row)));
}
DEV void load_matrices_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((unsigned)__cvta_generic_to_shared(row)));
}

// Sums in global memory
DEV void add2(float* p, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" :: "l"(p), "f"(a), "f"(b));
#else
  atomicAdd(p, a); atomicAdd(p + 1, b);
#endif
}
DEV void add4(float* p, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" :: "l"(p), "f"(a), "f"(b), "f"(c), "f"(d));
#else
  atomicAdd(p, a); atomicAdd(p + 1, b); atomicAdd(p + 2, c); atomicAdd(p + 3, d);
#endif
}

// Copies to shared memory that go on while the thread does
template <int BYTES>
DEV void copy_async(void* to, const void* from) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(address), "l"(from), "n"(BYTES) : "memory");
}
DEV void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}
"""

PRELUDE = r"""
// An unrolled loop. Never as the branch of an if that has an else: nvcc drops statements there. Braces help.
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)
const int HARMONICS = 8 * (LMAX + 1);  // of an edge: 8 for each degree, the last ones zero

// Operands of products of 8 x 8 matrices, in float16. `A8`: 16 rows, a thread has columns 2q, 2q+1 of rows g and g+8; `B8`:
// rows 2q, 2q+1 of column g. So an accumulator is the next operand. EXACT: two float16 a number, the second what the first
// one leaves times 2^11, 22 bits together; stored one after the other, a row or a matrix each.
typedef unsigned short Stored;
#if EXACT
struct A8 { unsigned v[2], low[2]; };
struct B8 { unsigned v, low; };
#else
struct A8 { unsigned v[2]; };
struct B8 { unsigned v; };
#endif
const int TILE = EXACT ? 128 : 64, PLANE = K / 8 * TILE;  // of a matrix; of K/8 in a row
const int SH_SIZE = HARMONICS * (1 + EXACT), HIDDEN_SIZE = K * (1 + EXACT);  // of a row
DEV unsigned rest(unsigned h, float a, float b) { return half2(2048 * (a - first(h)), 2048 * (b - second(h))); }

// float32, by a high and a low part of each operand; the sum is rounded as float32 sums are. Columns of a are 2q, 2q+1.
DEV void product(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  float ah[4], bh[2], al[4], bl[2], t[4] = {0, 0, 0, 0};
  EACH(i, 4) { ah[i] = tf32(a[i]); al[i] = tf32(a[i] - ah[i]); }
  EACH(i, 2) { bh[i] = tf32(b[i]); bl[i] = tf32(b[i] - bh[i]); }
  mma_tf32(t, al, bh);
  mma_tf32(t, ah, bl);
  mma_tf32(t, ah, bh);
  EACH(i, 4) d[i] += t[i];
}

// The same for the sums over a node, whose coupling coefficients b are exact in TF32 mode too
DEV void couple(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if EXACT
  product(d, a, b);
#else
  float ah[4], bh[2], bl[2];
  EACH(i, 4) ah[i] = tf32(a[i]);
  EACH(i, 2) { bh[i] = tf32(b[i]); bl[i] = tf32(b[i] - bh[i]); }
  mma_tf32(d, ah, bl);
  mma_tf32(d, ah, bh);
#endif
}

DEV void mma8(float (&d)[4], const A8& a, const B8& b) {
#if EXACT
  float t[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
  mma_half(low, a.low[0], a.low[1], b.v);
  mma_half(low, a.v[0], a.v[1], b.low);
  mma_half(t, a.v[0], a.v[1], b.v);
  EACH(i, 4) d[i] += t[i] + low[i] / 2048;
#else
  mma_half(d, a.v[0], a.v[1], b.v);
#endif
}
DEV void mma16(float (&d)[4], const A8& a, const A8& a1, const B8& b, const B8& b1) {
#if EXACT
  float t[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
  mma_half(low, a.low[0], a.low[1], a1.low[0], a1.low[1], b.v, b1.v);
  mma_half(low, a.v[0], a.v[1], a1.v[0], a1.v[1], b.low, b1.low);
  mma_half(t, a.v[0], a.v[1], a1.v[0], a1.v[1], b.v, b1.v);
  EACH(i, 4) d[i] += t[i] + low[i] / 2048;
#else
  mma_half(d, a.v[0], a.v[1], a1.v[0], a1.v[1], b.v, b1.v);
#endif
}
DEV A8 rows(const float (&d)[4]) {
  A8 a;
  EACH(i, 2) {
    a.v[i] = half2(d[2 * i], d[2 * i + 1]);
#if EXACT
    a.low[i] = rest(a.v[i], d[2 * i], d[2 * i + 1]);
#endif
  }
  return a;
}
#if EXACT
DEV A8 stack(const B8& top, const B8& bottom) { return {{top.v, bottom.v}, {top.low, bottom.low}}; }
DEV B8 part(const A8& a, int bottom) { return {a.v[bottom], a.low[bottom]}; }
DEV B8 load_pair(const Stored* p, int low) { return {*(const unsigned*)p, *(const unsigned*)(p + low)}; }
#else
DEV A8 stack(const B8& top, const B8& bottom) { return {top.v, bottom.v}; }
DEV B8 part(const A8& a, int bottom) { return {a.v[bottom]}; }
DEV B8 load_pair(const Stored* p, int low) { return {*(const unsigned*)p}; }
#endif
DEV void store_pair(Stored* p, float a, float b, int low) {
  const unsigned h = half2(a, b);
  *(unsigned*)p = h;
#if EXACT
  *(unsigned*)(p + low) = rest(h, a, b);
#endif
}

// A row of a matrix in shared memory: 8 weights, of which there are n, `stride` apart; their loads are on their way together
DEV void stage_row(Stored* to, const float* from, int stride, int n) {
  float w[8];
  EACH(j, 8) w[j] = j < n ? __ldg(from + j * stride) : 0;
  EACH(j, 4) store_pair(to + 2 * j, w[2 * j], w[2 * j + 1], 64);
}

// N <= 4 matrices in shared memory, `row` being where a thread's row of them is, as `load_matrices` has it
template <bool TRANSPOSED, int N>
DEV void load(B8 (&b)[N], const Stored* row, int low) {
  unsigned r[4];
  TRANSPOSED ? load_matrices_transposed(r, row) : load_matrices(r, row);
  EACH(i, N) b[i].v = r[i];
#if EXACT
  TRANSPOSED ? load_matrices_transposed(r, row + low) : load_matrices(r, row + low);
  EACH(i, N) b[i].low = r[i];
#endif
}
// Four matrices in a row: column g of an operand is row g of the matrix, or column g
DEV void load4(B8 (&b)[4], const Stored* m, int lane) { load<false>(b, m + lane / 8 * TILE + lane % 8 * 8, 64); }
DEV void load4_transposed(B8 (&b)[4], const Stored* m, int lane) { load<true>(b, m + lane / 8 * TILE + lane % 8 * 8, 64); }
// Two matrices in a row, and two a plane further on
DEV const Stored* two_by_two(const Stored* m, int lane) { return m + lane / 8 % 2 * PLANE + lane / 16 * TILE + lane % 8 * 8; }
DEV void load2x2(B8 (&b)[4], const Stored* m, int lane) { load<false>(b, two_by_two(m, lane), 64); }
DEV void load2x2_transposed(B8 (&b)[4], const Stored* m, int lane) { load<true>(b, two_by_two(m, lane), 64); }

// Power of two of the largest number of a warp, and powers: gradients are brought to about 1 before they become float16.
DEV float power(int e) { return __uint_as_float((unsigned)(127 + e) << 23); }
DEV int magnitude(float largest) {
  const int e = (int)(__reduce_max_sync(~0u, __float_as_uint(largest)) >> 23) - 127;
  return max(-100, min(e, 100));
}

// A thread's two channels: one 8-byte access where rows are even, else two, the second clamped to the row.
struct Pair { float v[2]; };
DEV Pair load2(const float* p, int second) {
#if EVEN
  float2 f = __ldg((const float2*)p);
  return {f.x, f.y};
#else
  return {__ldg(p), __ldg(p + second)};
#endif
}
DEV void store2(float* p, float a, float b, int second) {
#if EVEN
  *(float2*)p = make_float2(a, b);
#else
  p[0] = a;
  if (second) p[1] = b;
#endif
}
DEV void add_pair(float* p, float a, float b, int second) {
#if EVEN
  add2(p, a, b);
#else
  atomicAdd(p, a);
  if (second) atomicAdd(p + 1, b);
#endif
}

// Rows in shared memory are 16 bytes longer than they need be: 8 of them then meet all banks.
#define ROW(size) ((size) + 8)
template <int SIZE, int N>
DEV void copy_rows(Stored* to, const Stored* from, int first, int n_rows, int thread, int threads) {
  const int UNITS = SIZE / 8;
  for (int i = thread; i < N * UNITS; i += threads)
    copy_async<16>(to + i / UNITS * ROW(SIZE) + i % UNITS * 8, from + (i64)min(first + i / UNITS, n_rows - 1) * SIZE + i % UNITS * 8);
}
DEV void as_rows(A8 (&a)[2], const B8 (&b)[4]) { EACH(i, 2) a[i] = stack(b[2 * i], b[2 * i + 1]); }
// Matrices 2 s and 2 s + 1 (columns) of 16 rows
template <int SIZE>
DEV void load_rows(A8 (&a)[2], const Stored* rows, int s, int lane) {
  B8 b[4];
  load<false>(b, rows + lane % 16 * ROW(SIZE) + (2 * s + lane / 16) * 8, SIZE / 2);
  as_rows(a, b);
}
// 16 columns from 16 s on, as rows of the operand
template <int SIZE>
DEV void load_rows_transposed(A8 (&a)[2], const Stored* rows, int s, int lane) {
  B8 b[4];
  load<true>(b, rows + (lane / 16 * 8 + lane % 8) * ROW(SIZE) + (2 * s + lane / 8 % 2) * 8, SIZE / 2);
  as_rows(a, b);
}
// Matrices at, at + 1, .. of 8 rows, which are rows of the operand
template <int SIZE, int N>
DEV void load_columns(B8 (&b)[N], const Stored* rows, int at, int lane) {
  load<true>(b, rows + lane % 8 * ROW(SIZE) + (at + min(lane / 8, N - 1)) * 8, SIZE / 2);
}

// As B of products over 16 columns: for rows 0-7 and 8-15 in turn, matrices 2 s and 2 s + 1
template <int SIZE>
DEV void load_b_pairs(B8 (&b)[4], const Stored* rows, int s, int lane) {
  load<false>(b, rows + (lane / 16 * 8 + lane % 8) * ROW(SIZE) + (2 * s + lane / 8 % 2) * 8, SIZE / 2);
}
// As B of products over 16 rows: matrix 2 s of rows 0-7 and of rows 8-15, then matrix 2 s + 1 of both; transposed
template <int SIZE>
DEV void load_k_pairs(B8 (&b)[4], const Stored* rows, int s, int lane) {
  load<true>(b, rows + (lane / 8 % 2 * 8 + lane % 8) * ROW(SIZE) + (2 * s + lane / 16) * 8, SIZE / 2);
}

// Harmonics and hidden layer, or their tangents, of N edges in shared memory
template <int N>
struct __align__(16) Edges { Stored sh[N * ROW(SH_SIZE)], hidden[N * ROW(HIDDEN_SIZE)]; };
template <int N>
DEV void fetch(Edges<N>& to, const Stored* sh, const Stored* hidden, int e0, int n_edges, int thread, int threads) {
  copy_rows<SH_SIZE, N>(to.sh, sh, e0, n_edges, thread, threads);
  copy_rows<HIDDEN_SIZE, N>(to.hidden, hidden, e0, n_edges, thread, threads);
}

// W of 16 edges (rows), 8 channels and one path, from the K/8 matrices (8 channels x 8 rows of w3) of this octet and path;
// DUAL: also from the tangent of the hidden layer.
template <bool DUAL>
DEV void radial(float (&w)[4], float (&wd)[4], const A8 (&h)[K / 8], const A8 (&hd)[K / 8], const Stored* w3, int lane) {
  EACH(i, 4) w[i] = wd[i] = 0;
  EACH(j, K / 32) {
    B8 b[4];
    load4(b, w3 + 4 * TILE * j, lane);
    EACH(s, 2) {
      mma16(w, h[4 * j + 2 * s], h[4 * j + 2 * s + 1], b[2 * s], b[2 * s + 1]);
      if (DUAL) mma16(wd, hd[4 * j + 2 * s], hd[4 * j + 2 * s + 1], b[2 * s], b[2 * s + 1]);
    }
  }
}
// W of 16 channels (rows; the even ones, then the odd ones in w3), two times 8 edges, and N paths
template <int N, bool DUAL>
DEV void radial16(float (*w)[2][4], float (*wd)[2][4], const Edges<16>* edges, const Stored* w3, int lane) {
  EACH(p, N) EACH(t, 2) EACH(i, 4) { w[p][t][i] = 0; if (DUAL) wd[p][t][i] = 0; }
  EACH(j, K / 16) {
    B8 h[4], hd[4];
    load_b_pairs<HIDDEN_SIZE>(h, edges[0].hidden, j, lane);
    if (DUAL) load_b_pairs<HIDDEN_SIZE>(hd, edges[1].hidden, j, lane);
    EACH(p, N) {
      B8 b[4];  // even and odd channels in turn
      load2x2(b, w3 + 2 * p * PLANE + 2 * TILE * j, lane);
      const A8 a = stack(b[0], b[1]), a1 = stack(b[2], b[3]);
      EACH(t, 2) {
        mma16(w[p][t], a, a1, h[2 * t], h[2 * t + 1]);
        if (DUAL) mma16(wd[p][t], a, a1, hd[2 * t], hd[2 * t + 1]);
      }
    }
  }
}

struct Args {
  const float *x, *xd, *rd, *w3, *cg, *gy, *gyd;
  const Stored *sh, *shd, *hidden, *slope;
  const i64 *senders, *row_ptr;
  float *out, *gx, *gsh, *gr, *gh, *gslope, *gw3;
  int *taken, n_atoms;
};

// A block's nodes. The first three are fixed, further ones go to the block that asks first, while it is at work: nodes have
// more or fewer edges, and blocks may begin late.
struct Turns {
  int node, begin, end, next_begin, next_end;  // edges of the node, and of the next one
  DEV Turns(const Args& A, int* slots) : node(blockIdx.x), A(A), slots(slots), next(node + gridDim.x), ahead(next + gridDim.x), slot(0) {
    range(node, begin, end);
    range(next, next_begin, next_end);
  }
  // Before a barrier ..
  DEV void ask() {
    slot ^= 1;
    if (threadIdx.x) return;
    slots[slot] = ahead;
    ahead = 3 * gridDim.x + atomicAdd(A.taken + blockIdx.y, 1);
  }
  // .. and after it
  DEV void listen() {
    after = slots[slot];
    range(after, after_begin, after_end);
  }
  DEV void advance() {
    node = next; begin = next_begin; end = next_end;
    next = after; next_begin = after_begin; next_end = after_end;
  }
private:
  DEV void range(int i, int& begin, int& end) {
    i = min(i, A.n_atoms - 1);
    begin = (int)A.row_ptr[i];
    end = (int)A.row_ptr[i + 1];
  }
  const Args& A;
  int* slots;  // two, in shared memory
  int next, after, after_begin, after_end, ahead, slot;
};
"""

# One degree of the input. {L}: its number; D1 = 2l+1; NP paths; MUL channels.
DEGREE = r"""
namespace L{L} {{
const int D1 = {D1}, NP = {NP}, MUL = {MUL}, XOFF = {XOFF}, CG = {CG};
{tables}

// Coupling coefficients of path p and component m of x: row m3 of 8, column m2 of 8
DEV const float* coupling(const Args& A, int p, int m) {{ return A.cg + (CG + p * D1 + m) * 64; }}

// Matrices of w3 (8 channels x 8 rows) of N paths from FIRST on, of n channels from u0 on: for each octet those of its paths;
// PAIRS: for each path those of the even and of the odd of 16 channels.
template <bool PAIRS, int FIRST, int N>
DEV void stage(Stored* to, const float* w3, int u0, int n, int thread, int threads) {{
  for (int i = thread; i < n * K / 8; i += threads) {{
    const int c = i % n, k = i / n;
    const float* from = w3 + (i64)8 * k * WDIM + u0 + c;
    EACH(p, N) {{
      const int matrix = PAIRS ? 2 * p + c % 2 : c / 8 * N + p, row = PAIRS ? c / 2 : c % 8;
      stage_row(to + matrix * PLANE + k * TILE + row * 8, from + COLUMN(FIRST + p), WDIM, u0 + c < MUL ? 8 : 0);
    }}
  }}
}}

// forward and tangent. A warp takes a node, 16 channels and N paths from FIRST on, 16 edges at a time, and sums
//     Z[u, m1, m2] = sum over edges of  W_u x_u,m1 Y_m2
// on the tensor cores: channels are rows, edges what is summed over. Then out[u, m3] = sum of CG[m1, m2, m3] Z[u, m1, m2].
template <bool TANGENT, int FIRST, int N>
DEV void forward(const Args& A, int task, char* memory) {{
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int u0 = 16 * (task + warp), first = u0 + 2 * g, u = min(first, MUL - 1 - EVEN), second = first + 1 < MUL;  // rows g, g+8
  typedef Edges<16> Buffer[1 + TANGENT];
  Buffer* buffers = (Buffer*)(memory + 16);
  Stored* w3 = (Stored*)(buffers + 2) + warp * N * 2 * PLANE;
  int turn = 0, j[2][2];
  float rd[2][2];
  // What comes next: on its way while the present is at work. The edges are summed over, so those beyond the node's are its last
  // one again, times zero: those of another structure may not be finite.
  auto prepare = [&](int e0, int end) {{
    const int n_edges = max(end, 1);  // there is room for one, if only that
    fetch(buffers[turn][0], A.sh, A.hidden, e0, n_edges, threadIdx.x, blockDim.x);
    if constexpr (TANGENT) fetch(buffers[turn][1], A.shd, A.slope, e0, n_edges, threadIdx.x, blockDim.x);
    EACH(t, 2) EACH(i, 2) {{
      const int e = min(e0 + 8 * t + 2 * q + i, n_edges - 1);
      j[t][i] = (int)A.senders[e];
      rd[t][i] = TANGENT ? A.rd[e] : 0;
    }}
  }};
  Turns turns(A, (int*)memory);
  prepare(turns.begin, turns.end);
  stage<true, FIRST, N>(w3, A.w3, u0, 16, lane, 32);
  for (; turns.node < A.n_atoms; turns.advance()) {{
    const int node = turns.node, begin = turns.begin, end = turns.end;
    turns.ask();
    if (begin == end) {{
      wait_for_copies();
      __syncthreads();
      prepare(turns.next_begin, turns.next_end);
    }}
    float z[N][D1][4];
    EACH(p, N) EACH(m, D1) EACH(i, 4) z[p][m][i] = 0;
    for (int e0 = begin; e0 < end; e0 += 16) {{
      int from[2][2];
      float valid[2][2], rate[2][2];
      EACH(t, 2) EACH(i, 2) {{
        from[t][i] = j[t][i] * XDIM + XOFF + u;
        valid[t][i] = e0 + 8 * t + 2 * q + i < end;
        rate[t][i] = valid[t][i] * rd[t][i];
      }}
      const Buffer& edges = buffers[turn];
      wait_for_copies();
      __syncthreads();
      turn ^= 1;
      const bool last = e0 + 16 >= end;
      prepare(last ? turns.next_begin : e0 + 16, last ? turns.next_end : end);
      if (u0 >= MUL) continue;
      float w[N][2][4], wd[TANGENT ? N : 1][2][4];
      radial16<N, TANGENT>(w, wd, edges, w3, lane);
      EACH(p, N) EACH(t, 2) EACH(c, 2) EACH(i, 2) {{
        w[p][t][2 * c + i] *= valid[t][i];
        if constexpr (TANGENT) wd[p][t][2 * c + i] *= rate[t][i];
      }}
      B8 y[LMAX / 2 + 1][4], yd[LMAX / 2 + 1][4];
      EACH(s, LMAX / 2 + 1) load_k_pairs<SH_SIZE>(y[s], edges[0].sh, s, lane);
      if constexpr (TANGENT) EACH(s, LMAX / 2 + 1) load_k_pairs<SH_SIZE>(yd[s], edges[1].sh, s, lane);
#if !EXACT
      A8 W[N][2], Wd[TANGENT ? N : 1][2];
      EACH(p, N) EACH(t, 2) {{ W[p][t] = rows(w[p][t]); if constexpr (TANGENT) Wd[p][t] = rows(wd[p][t]); }}
#endif
      EACH(m, D1) {{
        float x[2][4], xd[2][4];
        EACH(t, 2) EACH(i, 2) {{
          const Pair v = load2(A.x + from[t][i] + m * MUL, second);
          x[t][i] = v.v[0]; x[t][2 + i] = v.v[1];
          if constexpr (TANGENT) {{
            const Pair vd = load2(A.xd + from[t][i] + m * MUL, second);
            xd[t][i] = vd.v[0]; xd[t][2 + i] = vd.v[1];
          }}
        }}
#if !EXACT
        A8 X[2], Xd[2];
        EACH(t, 2) {{ X[t] = rows(x[t]); if constexpr (TANGENT) Xd[t] = rows(xd[t]); }}
#endif
        EACH(p, N) {{
          A8 ra[2], rb[2];
#if EXACT
          float a[2][4], b[2][4];
          EACH(t, 2) EACH(i, 4) {{
            a[t][i] = w[p][t][i] * x[t][i];
            if constexpr (TANGENT) b[t][i] = w[p][t][i] * xd[t][i] + wd[p][t][i] * x[t][i];
          }}
          EACH(t, 2) {{ ra[t] = rows(a[t]); if constexpr (TANGENT) rb[t] = rows(b[t]); }}
#else
          EACH(t, 2) EACH(c, 2) {{
            ra[t].v[c] = mul2(W[p][t].v[c], X[t].v[c]);
            if constexpr (TANGENT) rb[t].v[c] = fma2(Wd[p][t].v[c], X[t].v[c], mul2(W[p][t].v[c], Xd[t].v[c]));
          }}
#endif
          const int l2 = L2(FIRST + p);
          if constexpr (TANGENT) {{
            mma16(z[p][m], ra[0], ra[1], yd[l2 / 2][l2 % 2 * 2], yd[l2 / 2][l2 % 2 * 2 + 1]);
            mma16(z[p][m], rb[0], rb[1], y[l2 / 2][l2 % 2 * 2], y[l2 / 2][l2 % 2 * 2 + 1]);
          }} else
            mma16(z[p][m], ra[0], ra[1], y[l2 / 2][l2 % 2 * 2], y[l2 / 2][l2 % 2 * 2 + 1]);
        }}
      }}
    }}
    turns.listen();
    EACH(p, N) {{
      float out[4] = {{0, 0, 0, 0}};
      EACH(m, D1) {{
        const float2 c = __ldg((const float2*)(coupling(A, FIRST + p, m) + 8 * g + 2 * q));
        const float a[4] = {{z[p][m][0], z[p][m][2], z[p][m][1], z[p][m][3]}}, b[2] = {{c.x, c.y}};
        couple(out, a, b);
      }}
      if (first < MUL)
        EACH(i, 2)
          if (2 * q + i < D3(FIRST + p)) store2(A.out + (i64)node * YDIM + Y(FIRST + p) + (2 * q + i) * STRIDE(FIRST + p) + u, out[i], out[2 + i], second);
    }}
  }}
  wait_for_copies();
}}

// backward. A warp takes {O} times 8 channels; the block's, of the same node and 16 edges (rows), together `octets` of them. With
// G[u, m1, m2] = sum of CG[m1, m2, m3] g[u, m3], once a node, and T = Y G, the gradient of W x Y G is  W T for x,  x T for W,
// (W x) G for Y. MODE 0: gradients of x, sh and r (slope = d hidden / dr); 1: of x, sh and hidden; 2: of forward and
// tangent together, by x, hidden and slope.
template <int MODE>
DEV void backward(const Args& A, int u0, char* memory) {{
  const int DUAL = MODE == 2 ? 2 : 1, O = {O}, MOST = {WARPS} * O;
  const int octets = min(MOST, (MUL - u0 + 7) / 8), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  typedef Edges<16> Buffer[MODE == 1 ? 1 : 2];
  Buffer* buffers = (Buffer*)(memory + 16);
  Stored* w3 = (Stored*)(buffers + 2);
  Stored* G = w3 + (MOST * NP + MOST * NP % 2) * PLANE;  // of each octet and path
  A8* gw_all = (A8*)(G + MOST * NP * D1 * DUAL * TILE);  // gradients of W: of each octet, path, value and tangent
  float4* gs_all = (float4*)(gw_all + (MODE ? (MOST * NP + 1) * DUAL * 32 : 0));  // of Y: of each warp and degree
  float* gr_all = (float*)(gs_all + (MODE < 2 ? {WARPS} * (LMAX + 1) * 32 : 0));  // of r: of each warp
  float* largest = gr_all + {WARPS} * 16;
  if (MODE) {{  // an odd number of octets and paths is made even by zeros
    EACH(d, DUAL) gw_all[(octets * NP * DUAL + d) * 32 + lane] = {{}};
    if (octets * NP % 2)
      for (int i = threadIdx.x; i < PLANE; i += blockDim.x) w3[octets * NP * PLANE + i] = 0;
  }}
  int first[O], u[O];
  EACH(o, O) {{
    first[o] = u0 + 8 * (warp + o * {WARPS}) + 2 * q;
    u[o] = min(first[o], MUL - 1 - EVEN);
  }}
  auto mine = [&](int o) {{ return warp + o * {WARPS} < octets; }};
  const int n_edges = max((int)A.row_ptr[A.n_atoms], 1);  // there is room for one, if only that
  int turn = 0, j[2];
  float rd[2];
  auto prepare = [&](int e0) {{  // what comes next: on its way while the present is at work
    fetch(buffers[turn][0], A.sh, A.hidden, e0, n_edges, threadIdx.x, blockDim.x);
    if (MODE == 2) fetch(buffers[turn][1], A.shd, A.slope, e0, n_edges, threadIdx.x, blockDim.x);
    if (MODE == 0) copy_rows<HIDDEN_SIZE, 16>(buffers[turn][1].hidden, A.slope, e0, n_edges, threadIdx.x, blockDim.x);
    EACH(t, 2) {{
      const int e = min(e0 + 8 * t + g, n_edges - 1);
      j[t] = (int)A.senders[e];
      rd[t] = MODE == 2 ? A.rd[e] : 0;
    }}
  }};
  float x[O][D1][4], xd[O][D1][4];
  auto gather = [&] {{  // features at the senders of what was prepared, before they are needed
    EACH(o, O)
      if (mine(o))
        EACH(m, D1) EACH(t, 2) {{
          const int at = j[t] * XDIM + XOFF + m * MUL + u[o];
          const Pair v = load2(A.x + at, first[o] + 1 < MUL);
          x[o][m][2 * t] = v.v[0]; x[o][m][2 * t + 1] = v.v[1];
          if (MODE == 2) {{
            const Pair v = load2(A.xd + at, first[o] + 1 < MUL);
            xd[o][m][2 * t] = v.v[0]; xd[o][m][2 * t + 1] = v.v[1];
          }}
        }}
  }};
  Turns turns(A, (int*)memory);
  prepare(turns.begin);
  gather();
  stage<false, 0, NP>(w3, A.w3, u0, 8 * octets, threadIdx.x, blockDim.x);
  for (; turns.node < A.n_atoms; turns.advance()) {{
    const int node = turns.node, begin = turns.begin, end = turns.end;
    turns.ask();
    if (begin == end) {{
      wait_for_copies();
      __syncthreads();
      turns.listen();
      prepare(turns.next_begin);
      gather();
      continue;
    }}
    float unscale;
    {{
      // rows g: gradient of the value; g+8: of the tangent
      float a[O][NP][4], top = 0;
      EACH(o, O) {{
        const int c = min(u0 + 8 * (warp + o * {WARPS}) + g, MUL - 1);
        EACH(p, NP) EACH(i, 2) {{
          const i64 at = (i64)node * YDIM + Y(p) + (q + 4 * i) * STRIDE(p) + c;
          const bool there = mine(o) && q + 4 * i < D3(p);
          a[o][p][2 * i] = there ? __ldg(A.gy + at) : 0;
          a[o][p][2 * i + 1] = MODE == 2 && there ? __ldg(A.gyd + at) : 0;
        }}
        EACH(p, NP) EACH(i, 4) top = fmaxf(top, fabsf(a[o][p][i]));
      }}
      const int e = magnitude(top);
      if (lane == 0) largest[warp] = e;
      __syncthreads();
      turns.listen();
      float most = largest[0];
      EACH(i, {WARPS}) most = fmaxf(most, largest[i]);
      unscale = power((int)most);
      EACH(o, O) {{
        if (!mine(o)) break;
        EACH(p, NP) EACH(i, 4) a[o][p][i] *= power(-(int)most);
        EACH(p, NP) EACH(m, D1) {{
          const float* cg = coupling(A, p, m);
          const float b[2] = {{__ldg(cg + 8 * q + g), __ldg(cg + 8 * (q + 4) + g)}};
          float d[4] = {{0, 0, 0, 0}};
          couple(d, a[o][p], b);
          Stored* to = G + (((warp + o * {WARPS}) * NP + p) * D1 + m) * DUAL * TILE + 2 * lane;
          store_pair(to, d[0], d[1], 64);
          if (MODE == 2) store_pair(to + TILE, d[2], d[3], 64);
        }}
      }}
    }}
    for (int e0 = begin; e0 < end; e0 += 16) {{
      const bool live[2] = {{e0 + g < end, e0 + g + 8 < end}};
      int to[2];
      float rate[2];
      EACH(t, 2) {{ to[t] = j[t] * XDIM + XOFF; rate[t] = rd[t]; }}
      const Buffer& edges = buffers[turn];
      wait_for_copies();
      __syncthreads();
      turn ^= 1;
      prepare(e0 + 16 < end ? e0 + 16 : turns.next_begin);
      if (mine(0)) {{
        float gs[LMAX + 1][4], gr[2] = {{0, 0}};
        A8 y[LMAX / 2 * 2 + 2], yd[LMAX / 2 * 2 + 2], h[K / 8], hd[K / 8];
        EACH(l, LMAX + 1) EACH(i, 4) gs[l][i] = 0;
        EACH(l, LMAX + 1)
          if constexpr (MODE == 2) {{
            B8 b[4];  // of both buffers: y and yd in turn, as `mma16` takes them
            load<false>(b, edges[lane / 16].sh + lane % 16 * ROW(SH_SIZE) + 8 * l, SH_SIZE / 2);
            y[l] = stack(b[0], b[1]); yd[l] = stack(b[2], b[3]);
          }} else {{
            if (l % 2 == 0) {{
              A8 a[2];
              load_rows<SH_SIZE>(a, edges[0].sh, l / 2, lane);
              y[l] = a[0]; y[l + 1] = a[1];
            }}
          }}
        EACH(s, K / 16) {{
          A8 a[2];
          load_rows<HIDDEN_SIZE>(a, edges[0].hidden, s, lane);
          h[2 * s] = a[0]; h[2 * s + 1] = a[1];
          if constexpr (MODE != 1) {{
            load_rows<HIDDEN_SIZE>(a, edges[1].hidden, s, lane);
            hd[2 * s] = a[0]; hd[2 * s + 1] = a[1];
          }}
        }}
        EACH(o, O) {{
          const int octet = warp + o * {WARPS};
          if (octet >= octets) break;
          float gx[D1][4];
          EACH(m, D1) EACH(i, 4) gx[m][i] = 0;
          EACH(p, NP) {{
            float w[4], wd[4], gw[4] = {{0, 0, 0, 0}}, gwd[4] = {{0, 0, 0, 0}};
            const Stored* w3p = w3 + (octet * NP + p) * PLANE;
            radial<MODE != 1>(w, wd, h, hd, w3p, lane);
            if (MODE == 2) EACH(i, 4) wd[i] *= rate[i / 2];
            B8 b[4], bt[4];
            EACH(m, D1) {{
              const Stored* Gpm = G + ((octet * NP + p) * D1 + m) * DUAL * TILE;
              const int l2 = L2(p), at = m * DUAL % 4;
              if (at == 0) load4(b, Gpm, lane);
              if (at == 0 && MODE < 2) load4_transposed(bt, Gpm, lane);
              float t[4] = {{0, 0, 0, 0}};
              if (MODE == 2) {{
                float td[4] = {{0, 0, 0, 0}};
                mma16(t, y[l2], yd[l2], b[at], b[at + 1]);
                mma8(td, y[l2], b[at + 1]);
                EACH(i, 4) {{
                  gx[m][i] += w[i] * t[i]; gx[m][i] += wd[i] * td[i];
                  gw[i] += x[o][m][i] * t[i]; gw[i] += xd[o][m][i] * td[i];
                  gwd[i] += x[o][m][i] * td[i];
                }}
              }} else {{
                float wx[4];
                mma8(t, y[l2], b[at]);
                EACH(i, 4) {{
                  gx[m][i] += w[i] * t[i];
                  gw[i] += x[o][m][i] * t[i];
                  wx[i] = w[i] * x[o][m][i];
                }}
                mma8(gs[l2], rows(wx), bt[at]);
              }}
            }}
            if (MODE == 0) EACH(i, 4) gr[i / 2] += gw[i] * wd[i];
            if (MODE) gw_all[(octet * NP + p) * DUAL * 32 + lane] = rows(gw);
            if (MODE == 2) {{
              EACH(i, 4) gwd[i] *= rate[i / 2];
              gw_all[((octet * NP + p) * DUAL + 1) * 32 + lane] = rows(gwd);
            }}
          }}
          if (A.gx && first[o] < MUL)
            EACH(t, 2)
              if (live[t])
                EACH(m, D1)
                  add_pair(A.gx + to[t] + m * MUL + u[o], unscale * gx[m][2 * t], unscale * gx[m][2 * t + 1], first[o] + 1 < MUL);
        }}
        if (MODE < 2) EACH(l, LMAX + 1) gs_all[(warp * (LMAX + 1) + l) * 32 + lane] = make_float4(gs[l][0], gs[l][1], gs[l][2], gs[l][3]);
        if (MODE == 0)
          EACH(t, 2) {{
            for (int d = 1; d < 4; d *= 2) gr[t] += __shfl_xor_sync(~0u, gr[t], d);
            if (q == 0) gr_all[warp * 16 + 8 * t + g] = gr[t];
          }}
      }}
      gather();
      __syncthreads();
      // The sums over octets: each warp, of a quarter of the columns of gh; or of one degree of Y
      if (MODE)
        for (int c = warp; c < K / 16; c += {WARPS}) {{  // two matrices
          float gh[2][4], gslope[2][4];
          EACH(n, 2) EACH(i, 4) gh[n][i] = gslope[n][i] = 0;
#pragma unroll 4
          for (int i = 0; i < octets * NP; i += 2) {{
            const A8* gw = gw_all + i * DUAL * 32 + lane;
            B8 b[4];
            load2x2_transposed(b, w3 + i * PLANE + c * 2 * TILE, lane);
            EACH(n, 2) mma16(gh[n], gw[0], gw[DUAL * 32], b[2 * n], b[2 * n + 1]);
            if (MODE == 2) EACH(n, 2) mma16(gslope[n], gw[32], gw[96], b[2 * n], b[2 * n + 1]);
          }}
          EACH(t, 2)
            if (live[t]) {{
              const i64 at = (i64)(e0 + 8 * t + g) * K + 16 * c + 4 * q;  // for columns 16 c + 2 q and + 8, and the next ones
              add4(A.gh + at, unscale * gh[0][2 * t], unscale * gh[0][2 * t + 1], unscale * gh[1][2 * t], unscale * gh[1][2 * t + 1]);
              if (MODE == 2) add4(A.gslope + at, unscale * gslope[0][2 * t], unscale * gslope[0][2 * t + 1], unscale * gslope[1][2 * t], unscale * gslope[1][2 * t + 1]);
            }}
        }}
      if (MODE < 2)
        for (int l = warp; l <= LMAX; l += {WARPS}) {{
          float4 sum = make_float4(0, 0, 0, 0);
          for (int o = 0; o < min(octets, {WARPS}); o++) {{
            const float4 f = gs_all[(o * (LMAX + 1) + l) * 32 + lane];
            sum.x += f.x; sum.y += f.y; sum.z += f.z; sum.w += f.w;
          }}
          if (q <= l) {{
            float* to = A.gsh + (i64)(e0 + g) * HARMONICS + 8 * l + 2 * q;
            if (live[0]) add2(to, unscale * sum.x, unscale * sum.y);
            if (live[1]) add2(to + 8 * HARMONICS, unscale * sum.z, unscale * sum.w);
          }}
        }}
      if (MODE == 0 && warp == {WARPS} - 1 && lane < 16 && e0 + lane < end) {{
        float sum = 0;
        for (int o = 0; o < min(octets, {WARPS}); o++) sum += gr_all[16 * o + lane];
        atomicAdd(A.gr + e0 + lane, unscale * sum);
      }}
    }}
  }}
  wait_for_copies();
}}

// Two channels of the gradient of path p at a node, as an operand with components m3 in columns
DEV Pair load_gy(const float* gy, int p, int m3, int second) {{
  if (m3 >= D3(p)) return {{0, 0}};
  return load2(gy + Y(p) + m3 * STRIDE(p), second);
}}

// What `weight_grad` reads of 8 edges
const int X_ROW = 64 * D1 + 16;
struct __align__(16) Rows {{ Edges<8> edges[2]; int senders[16]; char x[8 * X_ROW], xd[8 * X_ROW]; }};

DEV void load_x_row(float (&x)[D1][4], const char* rows, int i, int g) {{
  EACH(m, D1) {{
    const float2 f = *(const float2*)(rows + 64 * m + 8 * g);
    x[m][i] = f.x; x[m][2 + i] = f.y;
  }}
}}
// 16 channels from u0 of the features at 8 senders
DEV void copy_x(char* to, const float* x, const int* senders, int u0, int lane) {{
  const int UNIT = MUL % 4 || XOFF % 4 || XDIM % 4 ? 1 : 4;  // floats
  for (int i = lane; i < 128 / UNIT; i += 32) {{
    const int edge = i / (16 / UNIT), c = i % (16 / UNIT) * UNIT;
    const float* from = x + senders[edge] * XDIM + XOFF + u0 + c;
    if (u0 + c < MUL) EACH(m, D1) copy_async<4 * UNIT>(to + edge * X_ROW + 64 * m + 4 * c, from + m * MUL);
  }}
}}

// Gradient of w3. A warp takes 16 channels (rows), N paths from FIRST on and many nodes, 8 edges at a time: with G as in
// `backward`, gradients of W are x T, T = G Y, and the operand of their product with `hidden`, whose sum over edges stays
// in registers. It is in units of the largest g met so far.
template <bool DUAL, int FIRST, int N>
DEV void weight_grad(const Args& A, int u0, Rows* all_rows) {{
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  u0 += 16 * (warp % {groups});
  Rows* buffer = all_rows + 2 * warp;
  int turn = 0, top = -100;
  const int first = u0 + 2 * g, u = min(first, MUL - 1 - EVEN), second = first + 1 < MUL;  // rows g, g+8
  float acc[N][K / 8][4];
  EACH(p, N) EACH(n, K / 8) EACH(i, 4) acc[p][n][i] = 0;
  const int part = warp / {groups};  // of the block's nodes
  const int n_edges = max((int)A.row_ptr[A.n_atoms], 1);  // there is room for one, if only that
  int soon = 0;  // senders of 16 edges from where the tile at hand begins: those of the next one are among them
  float rd[2];
  auto prepare = [&](int e0, const int* senders) {{
    Rows& to = buffer[turn];
    fetch(to.edges[0], A.sh, A.hidden, e0, n_edges, lane, 32);
    copy_x(to.x, A.x, senders, u0, lane);
    if constexpr (DUAL) {{
      fetch(to.edges[1], A.shd, A.slope, e0, n_edges, lane, 32);
      copy_x(to.xd, A.xd, senders, u0, lane);
      EACH(i, 2) rd[i] = A.rd[min(e0 + 2 * q + i, n_edges - 1)];
    }}
    soon = (int)A.senders[min(e0 + lane % 16, n_edges - 1)];
  }};
  for (int from = blockIdx.x * {WARPS} + part * {groups}; from < A.n_atoms; from += gridDim.x * {WARPS}) {{
    const int last = min(A.n_atoms, from + {groups});
    int end = (int)A.row_ptr[from];
    wait_for_copies();
    buffer[turn ^ 1].senders[lane % 16] = (int)A.senders[min(end + lane % 16, n_edges - 1)];
    __syncwarp();
    prepare(end, buffer[turn ^ 1].senders);
    for (int node = from; node < last; node++) {{
      const int begin = end;
      end = (int)A.row_ptr[node + 1];
      if (begin == end) continue;
      A8 G[N][D1], H[DUAL ? N : 1][D1];
      {{
        float a[N][4], b[N][4], largest = 0;
        EACH(p, N) EACH(i, 2) {{
          const Pair v = load_gy(A.gy + (i64)node * YDIM + u, FIRST + p, q + 4 * i, second);
          a[p][2 * i] = v.v[0]; a[p][2 * i + 1] = v.v[1];
          b[p][2 * i] = b[p][2 * i + 1] = 0;
          if constexpr (DUAL) {{
            const Pair v = load_gy(A.gyd + (i64)node * YDIM + u, FIRST + p, q + 4 * i, second);
            b[p][2 * i] = v.v[0]; b[p][2 * i + 1] = v.v[1];
          }}
        }}
        EACH(p, N) EACH(i, 4) largest = fmaxf(largest, fmaxf(fabsf(a[p][i]), fabsf(b[p][i])));
        const int e = magnitude(largest);
        if (e > top) {{
          const float ratio = power(max(top - e, -126));
          EACH(p, N) EACH(n, K / 8) EACH(i, 4) acc[p][n][i] *= ratio;
          top = e;
        }}
        EACH(p, N) EACH(i, 4) {{ a[p][i] *= power(-top); b[p][i] *= power(-top); }}
        EACH(p, N) EACH(m, D1) {{
          const float* cg = coupling(A, FIRST + p, m);
          const float c[2] = {{__ldg(cg + 8 * q + g), __ldg(cg + 8 * (q + 4) + g)}};
          float d[4] = {{0, 0, 0, 0}}, h[4] = {{0, 0, 0, 0}};
          couple(d, a[p], c);
          G[p][m] = rows(d);
          if constexpr (DUAL) {{
            couple(h, b[p], c);
            H[p][m] = rows(h);
          }}
        }}
      }}
      for (int e0 = begin; e0 < end; e0 += 8) {{
        const int next = min(e0 + 8, end);
        Rows& tile = buffer[turn];
        float x[D1][4], xd[D1][4], valid[2], rate[2];
        EACH(i, 2) {{
          valid[i] = e0 + 2 * q + i < end;
          rate[i] = DUAL ? valid[i] * rd[i] : 0;
        }}
        tile.senders[lane % 16] = soon;
        wait_for_copies();
        turn ^= 1;
        prepare(next, tile.senders + (next - e0));
        B8 y[LMAX + 1], yd[LMAX + 1];
        EACH(i, 2) {{
          load_x_row(x, tile.x + (2 * q + i) * X_ROW, i, g);
          if constexpr (DUAL) load_x_row(xd, tile.xd + (2 * q + i) * X_ROW, i, g);
        }}
        if constexpr (DUAL && LMAX % 2) {{
          EACH(j, (LMAX + 1) / 2) {{
            B8 b[4];
            load<false>(b, tile.edges[lane / 8 % 2].sh + lane % 8 * ROW(SH_SIZE) + (2 * j + lane / 16) * 8, HARMONICS);
            y[2 * j] = b[0]; yd[2 * j] = b[1]; y[2 * j + 1] = b[2]; yd[2 * j + 1] = b[3];
          }}
        }} else {{
          EACH(l, LMAX + 1) {{
            y[l] = load_pair(tile.edges[0].sh + g * ROW(SH_SIZE) + 8 * l + 2 * q, HARMONICS);
            if constexpr (DUAL) yd[l] = load_pair(tile.edges[1].sh + g * ROW(SH_SIZE) + 8 * l + 2 * q, HARMONICS);
          }}
        }}
        A8 a[N], ad[N];
        EACH(p, N) {{
          const int l2 = L2(FIRST + p);
          float gw[4] = {{0, 0, 0, 0}}, gwd[4] = {{0, 0, 0, 0}};
          EACH(m, D1) {{
            float t[4] = {{0, 0, 0, 0}}, td[4] = {{0, 0, 0, 0}};
            if constexpr (DUAL) {{
              mma16(t, G[p][m], H[p][m], y[l2], yd[l2]);
              mma8(td, H[p][m], y[l2]);
              EACH(i, 4) {{ gw[i] += x[m][i] * t[i]; gw[i] += xd[m][i] * td[i]; gwd[i] += x[m][i] * td[i]; }}
            }} else {{
              mma8(t, G[p][m], y[l2]);
              EACH(i, 4) gw[i] += x[m][i] * t[i];
            }}
          }}
          EACH(i, 4) {{ gw[i] *= valid[i % 2]; gwd[i] *= rate[i % 2]; }}
          a[p] = rows(gw);
          ad[p] = rows(gwd);
        }}
        if constexpr (DUAL) {{
          EACH(j, K / 16) {{
            B8 h[4];  // hidden and its tangent in turn
            load<true>(h, tile.edges[lane / 8 % 2].hidden + lane % 8 * ROW(HIDDEN_SIZE) + (2 * j + lane / 16) * 8, HIDDEN_SIZE / 2);
            EACH(n, 2) EACH(p, N) mma16(acc[p][2 * j + n], a[p], ad[p], h[2 * n], h[2 * n + 1]);
          }}
        }} else {{
          EACH(j, K / 32) {{
            B8 h[4];
            load_columns<HIDDEN_SIZE>(h, tile.edges[0].hidden, 4 * j, lane);
            EACH(n, 4) EACH(p, N) mma8(acc[p][4 * j + n], a[p], h[n]);
          }}
        }}
      }}
    }}
  }}
  wait_for_copies();
  float* out = A.gw3 + (i64)(blockIdx.x * {SLOTS} + part) * K * WDIM + u;
  if (first < MUL)
    EACH(p, N) EACH(n, K / 8) EACH(i, 2)
      store2(out + (8 * n + 2 * q + i) * WDIM + COLUMN(FIRST + p), power(top) * acc[p][n][i], power(top) * acc[p][n][2 + i], second);
}}
}}  // namespace
"""


# Edge vectors to harmonics and radial basis, with derivatives by dual numbers; a thread an edge, in float64, which costs nothing
# here and takes most of the rounding error out of float32 forces.
GEOMETRY = r"""
struct Dual { double v, d; };
DEV Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
DEV Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
DEV Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
DEV Dual operator*(double a, Dual b) { return {a * b.v, a * b.d}; }
DEV Dual operator-(Dual a, double b) { return {a.v - b, a.d}; }

// As `harmonics` of model.py: of a unit vector, each degree beginning a row of 8
DEV void harmonics(Dual (&y)[32], Dual a, Dual b, Dual c) {
  const double s3 = 1.7320508075688772, s5 = 2.23606797749979, s7 = 2.6457513110645907, s15 = 3.872983346207417;
  const double f = 2.091650066335189, h = 1.620185174601965;  // sqrt(17.5) / 2, sqrt(10.5) / 2
  const Dual ac = a * c, d = c * c - a * a, bb = b * b, r = 5 * bb - 1;
  y[0] = {1, 0};
  y[8] = s3 * a; y[9] = s3 * b; y[10] = s3 * c;
  y[16] = s15 * ac; y[17] = s15 * (a * b); y[18] = s5 * (1.5 * bb - 0.5); y[19] = s15 * (b * c); y[20] = 0.5 * s15 * d;
  y[24] = f * (2 * (ac * c) + d * a); y[25] = s7 * s15 * (ac * b); y[26] = h * (a * r); y[27] = 0.5 * s7 * (b * (r - 2));
  y[28] = h * (c * r); y[29] = 0.5 * s7 * s15 * (d * b); y[30] = f * (d * c - 2 * (ac * a));
}

struct Geometry {
  const double *vectors, *along;  // along: a direction, whose derivatives are wanted in place of the values
  const float *gsh, *gr;
  double cutoff, p, *g;
  Stored *sh, *basis;
  float* rd;
  int n_edges;
};
struct Polar { double r, u[3]; };
DEV Polar polar(const double* v) {
  const double r = sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
  return {r, {v[0] / r, v[1] / r, v[2] / r}};
}

extern "C" __global__ void geometry(const Geometry A) {
  for (int e = blockIdx.x * blockDim.x + threadIdx.x; e < A.n_edges; e += gridDim.x * blockDim.x) {
    const Polar v = polar(A.vectors + (i64)e * 3);
    double d[3] = {0, 0, 0};
    if (A.along) {
      const double* w = A.along + (i64)e * 3;
      const double rd = v.u[0] * w[0] + v.u[1] * w[1] + v.u[2] * w[2];
      EACH(i, 3) d[i] = (w[i] - rd * v.u[i]) / v.r;
      A.rd[e] = (float)rd;
    }
    Dual y[32];
    EACH(i, 32) y[i] = {0, 0};
    harmonics(y, {v.u[0], d[0]}, {v.u[1], d[1]}, {v.u[2], d[2]});
    EACH(i, HARMONICS / 2) {
      const Dual a = y[2 * i], b = y[2 * i + 1];
      store_pair(A.sh + (i64)e * SH_SIZE + 2 * i, (float)(A.along ? a.d : a.v), (float)(A.along ? b.d : b.v), HARMONICS);
    }
    if (A.basis) {
      // Bessel functions times the polynomial cutoff (Gasteiger et al. 2020), as `radial_basis` of model.py; and d/dr
      const double x = fmin(v.r / A.cutoff, 1.0), k0 = (A.p + 1) * (A.p + 2) / 2, k1 = A.p * (A.p + 2), k2 = A.p * (A.p + 1) / 2;
      const double power = pow(x, A.p), fall = 1 - power * (k0 - x * (k1 - k2 * x));
      const double fall_d = x < 1 ? -power / x * (A.p * k0 - x * ((A.p + 1) * k1 - (A.p + 2) * k2 * x)) / A.cutoff : 0;
      EACH(i, BASIS / 2) {
        float value[2] = {0, 0}, slope[2] = {0, 0};
        EACH(j, 2)
          if (2 * i + j < N_BASIS) {
            const double k = (double)((float)(2 * i + j + 1) * 3.14159265f) / A.cutoff;  // a product in float32: see there
            const double f = 2 / A.cutoff * sin(k * v.r) / v.r, df = 2 / A.cutoff * k * cos(k * v.r) / v.r - f / v.r;
            value[j] = (float)(f * fall);
            slope[j] = (float)(df * fall + f * fall_d);
          }
        store_pair(A.basis + (i64)e * BASIS_SIZE + 2 * i, value[0], value[1], BASIS);
        store_pair(A.basis + ((i64)A.n_edges + e) * BASIS_SIZE + 2 * i, slope[0], slope[1], BASIS);
      }
    }
  }
}

// g = gsh dY/dvector + gr dr/dvector
extern "C" __global__ void geometry_back(const Geometry A) {
  for (int e = blockIdx.x * blockDim.x + threadIdx.x; e < A.n_edges; e += gridDim.x * blockDim.x) {
    const Polar v = polar(A.vectors + (i64)e * 3);
    double g[3] = {0, 0, 0};
    EACH(i, 3) {
      Dual y[32];
      EACH(k, 32) y[k] = {0, 0};
      harmonics(y, {v.u[0], i == 0 ? 1. : 0.}, {v.u[1], i == 1 ? 1. : 0.}, {v.u[2], i == 2 ? 1. : 0.});
      EACH(k, HARMONICS) g[i] += A.gsh[(i64)e * HARMONICS + k] * y[k].d;
    }
    const double along = g[0] * v.u[0] + g[1] * v.u[1] + g[2] * v.u[2];
    EACH(i, 3) A.g[(i64)e * 3 + i] = (g[i] - along * v.u[i]) / v.r + A.gr[e] * v.u[i];
  }
}
"""

# The radial MLP, hidden = silu(silu(basis w1) w2), with tangents: derivatives by r. A warp takes 16 edges, which are rows.
MLP = r"""
DEV float sigmoid(float z) { return 1 / (1 + expf(-z)); }
DEV float silu(float z, float s) { return z * s; }
DEV float silu1(float z, float s) { return s * (1 + z * (1 - s)); }
DEV float silu2(float z, float s) { return s * (1 - s) * (2 + z * (1 - 2 * s)); }

struct Mlp { const Stored* basis; const float *w1, *w2, *grad; Stored* out; float *gw1, *gw2; int n_edges; };
const int BASIS_SIZE = BASIS * (1 + EXACT), TILES = K / 8, EDGES = 16 * WARPS;

// (n, k) matrices of a (k, n) weight
template <int INPUTS>
DEV void stage_weights(Stored* to, const float* w, int rows) {
  for (int i = threadIdx.x; i < INPUTS / 8 * K; i += 32 * WARPS) {
    const int k = i / K, n = i % K;
    stage_row(to + (n / 8 * (INPUTS / 8) + k) * TILE + n % 8 * 8, w + 8 * k * K + n, K, rows - 8 * k);
  }
}
// Column n of 8 before the first SiLU, and its tangent
DEV void first_layer(float (&z)[4], float (&zd)[4], const A8 (&b)[BASIS / 8], const A8 (&bd)[BASIS / 8], const Stored* w1, int n, int lane) {
  EACH(i, 4) z[i] = zd[i] = 0;
  EACH(k, BASIS / 8) {
    const B8 w = load_pair(w1 + (n * (BASIS / 8) + k) * TILE + 2 * lane, 64);
    mma8(z, b[k], w);
    mma8(zd, bd[k], w);
  }
}
// The same before the second
DEV void second_layer(float (&z)[4], float (&zd)[4], const A8 (&a)[TILES], const A8 (&ad)[TILES], const Stored* w2, int n, int lane) {
  EACH(i, 4) z[i] = zd[i] = 0;
  EACH(j, K / 32) {
    B8 w[4];
    load4(w, w2 + n * PLANE + 4 * TILE * j, lane);
    EACH(s, 2) {
      mma16(z, a[4 * j + 2 * s], a[4 * j + 2 * s + 1], w[2 * s], w[2 * s + 1]);
      mma16(zd, ad[4 * j + 2 * s], ad[4 * j + 2 * s + 1], w[2 * s], w[2 * s + 1]);
    }
  }
}
DEV void activate(float (&z)[4], float (&zd)[4]) {
  EACH(i, 4) {
    const float s = sigmoid(z[i]);
    zd[i] *= silu1(z[i], s);
    z[i] = silu(z[i], s);
  }
}
// By way of 16 rows each of shared memory
DEV void load_basis(A8 (&b)[BASIS / 8], A8 (&bd)[BASIS / 8], Stored* rows, Stored* rows_d, const Mlp& A, int e0, int lane) {
  copy_rows<BASIS_SIZE, 16>(rows, A.basis, e0, A.n_edges, lane, 32);
  copy_rows<BASIS_SIZE, 16>(rows_d, A.basis + (i64)A.n_edges * BASIS_SIZE, e0, A.n_edges, lane, 32);
  wait_for_copies();
  EACH(s, BASIS / 16) {
    A8 a[2];
    load_rows<BASIS_SIZE>(a, rows, s, lane);
    b[2 * s] = a[0]; b[2 * s + 1] = a[1];
    load_rows<BASIS_SIZE>(a, rows_d, s, lane);
    bd[2 * s] = a[0]; bd[2 * s + 1] = a[1];
  }
}
"""
RADIAL_MLP = r"""
extern "C" __global__ void __launch_bounds__(32 * WARPS) radial_mlp(const Mlp A) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  Stored *w1 = (Stored*)memory, *w2 = w1 + BASIS / 8 * PLANE, *rows16 = w2 + TILES * PLANE + warp * 32 * ROW(BASIS_SIZE);
  stage_weights<BASIS>(w1, A.w1, N_BASIS);
  stage_weights<K>(w2, A.w2, K);
  __syncthreads();
  for (int e0 = blockIdx.x * EDGES + 16 * warp; e0 < A.n_edges; e0 += gridDim.x * EDGES) {
    A8 b[BASIS / 8], bd[BASIS / 8], a[TILES], ad[TILES];
    load_basis(b, bd, rows16, rows16 + 16 * ROW(BASIS_SIZE), A, e0, lane);
    EACH(n, TILES) {
      float z[4], zd[4];
      first_layer(z, zd, b, bd, w1, n, lane);
      activate(z, zd);
      a[n] = rows(z);
      ad[n] = rows(zd);
    }
    EACH(n, TILES) {
      float z[4], zd[4];
      second_layer(z, zd, a, ad, w2, n, lane);
      activate(z, zd);
      EACH(t, 2) {
        Stored* out = A.out + (i64)(e0 + 8 * t + g) * HIDDEN_SIZE + 8 * n + 2 * q;
        if (e0 + 8 * t + g < A.n_edges) {
          store_pair(out, z[2 * t], z[2 * t + 1], K);
          store_pair(out + (i64)A.n_edges * HIDDEN_SIZE, zd[2 * t], zd[2 * t + 1], K);
        }
      }
    }
  }
}
"""
RADIAL_MLP_BACK = r"""
// acc += the sum over 16 WARPS edges of a row (outputs: M times 16) times b row (outputs: the warp's N times 8 columns)
template <int A_SIZE, int M, int N>
DEV void add_products(float (&acc)[M][N][4], const Stored* a_rows, const Stored* b_rows, int warp, int lane) {
  const int C = N < 4 ? N : 4;
  EACH(e, WARPS) EACH(c, N / C) {
    B8 b[C], b1[C];
    load_columns<HIDDEN_SIZE>(b, b_rows + 16 * e * ROW(HIDDEN_SIZE), N * warp + C * c, lane);
    load_columns<HIDDEN_SIZE>(b1, b_rows + (16 * e + 8) * ROW(HIDDEN_SIZE), N * warp + C * c, lane);
    EACH(m, M) {
      A8 a[2];
      load_rows_transposed<A_SIZE>(a, a_rows + 16 * e * ROW(A_SIZE), m, lane);
      EACH(n, C) mma16(acc[m][C * c + n], a[0], a[1], b[n], b1[n]);
    }
  }
}

// Gradients of w1 and w2, a partial sum for each block; grad: of hidden and of its tangent, as `backward` leaves it. What the
// forward had is computed again. Gradients are in units of the largest met so far, as in `weight_grad`.
extern "C" __global__ void __launch_bounds__(32 * WARPS) radial_mlp_back(const Mlp A) {
  extern __shared__ __align__(16) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int N = TILES / WARPS;  // columns of the gradients / 8, a warp
  const int SIZE = EDGES * ROW(HIDDEN_SIZE);
  Stored *w1 = (Stored*)memory, *w2 = w1 + BASIS / 8 * PLANE;
  Stored *basis = w2 + TILES * PLANE, *basis_d = basis + EDGES * ROW(BASIS_SIZE), *all = basis_d + EDGES * ROW(BASIS_SIZE);
  int* largest = (int*)(all + 6 * SIZE);
  // of the block's edges: activations of the first layer, gradients before the second SiLU and the first; each with tangents
  auto pair = [&](int which, int row, int n) { return all + which * SIZE + (16 * warp + row) * ROW(HIDDEN_SIZE) + 8 * n + 2 * q; };
  stage_weights<BASIS>(w1, A.w1, N_BASIS);
  stage_weights<K>(w2, A.w2, K);
  __syncthreads();
  int top = -100;
  float acc1[BASIS / 16][N][4], acc2[K / 16][N][4];
  EACH(n, N) EACH(i, 4) {
    EACH(m, BASIS / 16) acc1[m][n][i] = 0;
    EACH(m, K / 16) acc2[m][n][i] = 0;
  }
  for (int block0 = blockIdx.x * EDGES; block0 < A.n_edges; block0 += gridDim.x * EDGES) {
    const int e0 = block0 + 16 * warp;
    A8 b[BASIS / 8], bd[BASIS / 8], a[TILES], ad[TILES];
    __syncthreads();  // the sums of the edges before are done
    load_basis(b, bd, basis + 16 * warp * ROW(BASIS_SIZE), basis_d + 16 * warp * ROW(BASIS_SIZE), A, e0, lane);
    EACH(n, TILES) {
      float z[4], zd[4];
      first_layer(z, zd, b, bd, w1, n, lane);
      activate(z, zd);
      a[n] = rows(z);
      ad[n] = rows(zd);
      EACH(t, 2) {
        store_pair(pair(0, 8 * t + g, n), z[2 * t], z[2 * t + 1], K);
        store_pair(pair(1, 8 * t + g, n), zd[2 * t], zd[2 * t + 1], K);
      }
    }
    float gz[TILES][4], gzd[TILES][4], most = 0;
    EACH(c, TILES / 2) {
      float gh[2][4], ghd[2][4];
      EACH(t, 2) {
        const bool live = e0 + 8 * t + g < A.n_edges;
        const i64 at = (i64)min(e0 + 8 * t + g, A.n_edges - 1) * K + 16 * c + 4 * q;
        const float4 f = __ldg((const float4*)(A.grad + at)), fd = __ldg((const float4*)(A.grad + (i64)A.n_edges * K + at));
        gh[0][2 * t] = live * f.x; gh[0][2 * t + 1] = live * f.y; gh[1][2 * t] = live * f.z; gh[1][2 * t + 1] = live * f.w;
        ghd[0][2 * t] = live * fd.x; ghd[0][2 * t + 1] = live * fd.y; ghd[1][2 * t] = live * fd.z; ghd[1][2 * t + 1] = live * fd.w;
      }
      EACH(h, 2) {
        float z[4], zd[4];
        second_layer(z, zd, a, ad, w2, 2 * c + h, lane);
        EACH(i, 4) {
          const float s = sigmoid(z[i]), d = silu1(z[i], s);
          gz[2 * c + h][i] = gh[h][i] * d + ghd[h][i] * silu2(z[i], s) * zd[i];
          gzd[2 * c + h][i] = ghd[h][i] * d;
          most = fmaxf(most, fmaxf(fabsf(gz[2 * c + h][i]), fabsf(gzd[2 * c + h][i])));
        }
      }
    }
    const int mine = magnitude(most);
    if (lane == 0) largest[warp] = mine;
    __syncthreads();
    int e = top;
    EACH(i, WARPS) e = max(e, largest[i]);
    const float ratio = power(max(top - e, -126));
    top = e;
    EACH(n, N) EACH(i, 4) {
      EACH(m, BASIS / 16) acc1[m][n][i] *= ratio;
      EACH(m, K / 16) acc2[m][n][i] *= ratio;
    }
    float ga[TILES][4], gad[TILES][4];
    EACH(n, TILES) EACH(i, 4) ga[n][i] = gad[n][i] = 0;
    EACH(n, TILES) {
      EACH(i, 4) { gz[n][i] *= power(-top); gzd[n][i] *= power(-top); }
      const A8 r = rows(gz[n]), rd = rows(gzd[n]);
      EACH(t, 2) {
        store_pair(pair(2, 8 * t + g, n), gz[n][2 * t], gz[n][2 * t + 1], K);
        store_pair(pair(3, 8 * t + g, n), gzd[n][2 * t], gzd[n][2 * t + 1], K);
      }
      EACH(j, K / 32) {
        B8 w[4];
        load4_transposed(w, w2 + n * PLANE + 4 * TILE * j, lane);
        EACH(k, 4) { mma8(ga[4 * j + k], r, w[k]); mma8(gad[4 * j + k], rd, w[k]); }
      }
    }
    EACH(n, TILES) {
      float z[4], zd[4], gz1[4], gz1d[4];
      first_layer(z, zd, b, bd, w1, n, lane);
      EACH(i, 4) {
        const float s = sigmoid(z[i]), d = silu1(z[i], s);
        gz1[i] = ga[n][i] * d + gad[n][i] * silu2(z[i], s) * zd[i];
        gz1d[i] = gad[n][i] * d;
      }
      EACH(t, 2) {
        store_pair(pair(4, 8 * t + g, n), gz1[2 * t], gz1[2 * t + 1], K);
        store_pair(pair(5, 8 * t + g, n), gz1d[2 * t], gz1d[2 * t + 1], K);
      }
    }
    __syncthreads();
    add_products<HIDDEN_SIZE>(acc2, all, all + 2 * SIZE, warp, lane);
    add_products<HIDDEN_SIZE>(acc2, all + SIZE, all + 3 * SIZE, warp, lane);
    add_products<BASIS_SIZE>(acc1, basis, all + 4 * SIZE, warp, lane);
    add_products<BASIS_SIZE>(acc1, basis_d, all + 5 * SIZE, warp, lane);
  }
  EACH(n, N) EACH(i, 4) {
    const int column = 8 * (N * warp + n) + 2 * q + i % 2;
    EACH(m, BASIS / 16) {
      const int k = 16 * m + g + i / 2 * 8;
      if (k < N_BASIS) A.gw1[((i64)blockIdx.x * N_BASIS + k) * K + column] = power(top) * acc1[m][n][i];
    }
    EACH(m, K / 16) A.gw2[((i64)blockIdx.x * K + 16 * m + g + i / 2 * 8) * K + column] = power(top) * acc2[m][n][i];
  }
}
"""

# Norm and gate of a layer, also with tangents. A warp takes an atom. v: the layer's channels before norm and gate, NS scalars
# and NG gates first; k: 1/(2l+1)^2 / degrees.
NODES = r"""
struct Nodes { const float *v, *vd, *w, *g, *gd; float *out, *outd, *gw; int n_atoms; };
DEV float warp_sum(float x) { for (int d = 1; d < 32; d *= 2) x += __shfl_xor_sync(~0u, x, d); return x; }

// inverse = 1 / sqrt(sum k v^2 + 1e-12) and its tangent
template <bool DUAL>
DEV void inverse_norm(const float* v, const float* vd, int lane, float& inv, float& invd, float& square_d) {
  float square = 0, d = 0;
#if NORM
  for (int i = lane; i < NDIM; i += 32) {
    const float k = weight_of(i), x = v[i];
    square += k * x * x;
    if (DUAL) d += 2 * k * x * vd[i];
  }
  inv = 1 / sqrtf(warp_sum(square) + 1e-12f);
  square_d = DUAL ? warp_sum(d) : 0;
  invd = -0.5f * inv * inv * inv * square_d;
#else
  inv = 1; invd = square_d = 0;
#endif
}

template <bool DUAL>
DEV void norm_gate(const Nodes& A) {
  const int atom = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (atom >= A.n_atoms) return;
  const float *v = A.v + (i64)atom * NDIM, *vd = DUAL ? A.vd + (i64)atom * NDIM : nullptr;
  float *out = A.out + (i64)atom * FDIM, *outd = DUAL ? A.outd + (i64)atom * FDIM : nullptr;
  float inv, invd, unused;
  inverse_norm<DUAL>(v, vd, lane, inv, invd, unused);
  for (int u = lane; u < NS; u += 32) {
    const float y = v[u] * inv * A.w[u], s = sigmoid(y);
    out[u] = C_SILU * silu(y, s);
    if (DUAL) outd[u] = C_SILU * silu1(y, s) * (vd[u] * inv + v[u] * invd) * A.w[u];
  }
  gated<DUAL>(A, v, vd, out, outd, inv, invd, lane);
}
template <bool DUAL, int D, int MUL, int VOFF, int OOFF, int GOFF, int WOFF>
DEV void gated_degree(const Nodes& A, const float* v, const float* vd, float* out, float* outd, float inv, float invd, int lane) {
  for (int u = lane; u < MUL; u += 32) {
    const float wg = A.w[GOFF + u], w = A.w[WOFF + u], g = v[GOFF + u] * inv * wg, s = sigmoid(g);
    const float gate = C_SILU * silu(g, s);
    const float gate_d = DUAL ? C_SILU * silu1(g, s) * (vd[GOFF + u] * inv + v[GOFF + u] * invd) * wg : 0;
    for (int m = 0; m < D; m++) {
      const float x = v[VOFF + m * MUL + u], y = x * inv * w;
      out[OOFF + m * MUL + u] = y * gate;
      if (DUAL) outd[OOFF + m * MUL + u] = (vd[VOFF + m * MUL + u] * inv + x * invd) * w * gate + y * gate_d;
    }
  }
}

// What the gradient (gy, gyd) of the normalised (y, yd) = (v inv w, (vd inv + v invd) w) means for one element: its part of
// the gradients of inv, invd and w; and, but for the way through inv, of v and vd, which are left in out and outd.
struct Sums { float inv, invd; };
template <bool DUAL>
DEV float through_norm(Sums& sums, float* out, float* outd, float v, float vd, float w, float inv, float invd, float gy, float gyd) {
  const float t = gy * w, td = gyd * w;
  sums.inv += t * v + (DUAL ? td * vd : 0);
  if (DUAL) { sums.invd += td * v; *outd = td; }
  *out = t;
  return gy * v * inv + (DUAL ? gyd * (vd * inv + v * invd) : 0);
}

template <bool DUAL>
DEV void norm_gate_back(const Nodes& A) {
  const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, warps = gridDim.x * blockDim.x / 32, lane = threadIdx.x % 32;
  float gw[(WN + 31) / 32 + 8];
  EACH(i, (WN + 31) / 32 + 8) gw[i] = 0;
  for (int atom = warp; atom < A.n_atoms; atom += warps) {
    const i64 row = (i64)atom * NDIM, frow = (i64)atom * FDIM;
    const float *v = A.v + row, *vd = DUAL ? A.vd + row : nullptr, *g = A.g + frow, *gd = DUAL ? A.gd + frow : nullptr;
    float *out = A.out + row, *outd = DUAL ? A.outd + row : nullptr;
    float inv, invd, square_d;
    inverse_norm<DUAL>(v, vd, lane, inv, invd, square_d);
    Sums sums = {0, 0};
    EACH(i, (NS + 31) / 32) {
      const int u = lane + 32 * i;
      if (u < NS) {
        const float w = A.w[u], y = v[u] * inv * w, s = sigmoid(y), vdu = DUAL ? vd[u] : 0, gdu = DUAL ? gd[u] : 0;
        const float yd = (vdu * inv + v[u] * invd) * w;
        const float gy = C_SILU * (g[u] * silu1(y, s) + gdu * silu2(y, s) * yd), gyd = C_SILU * gdu * silu1(y, s);
        gw[i] += through_norm<DUAL>(sums, out + u, outd + u, v[u], vdu, w, inv, invd, gy, gyd);
      }
    }
    gated_back<DUAL>(A, sums, gw, v, vd, g, gd, out, outd, inv, invd, lane);
#if NORM
    const float i3 = inv * inv * inv, ginv = warp_sum(sums.inv), ginvd = DUAL ? warp_sum(sums.invd) : 0;
    const float gsquare = -0.5f * i3 * ginv + 0.75f * i3 * inv * inv * square_d * ginvd, gsquare_d = -0.5f * i3 * ginvd;
    for (int i = lane; i < NDIM; i += 32) {
      const float k = 2 * weight_of(i), t = out[i], td = DUAL ? outd[i] : 0;
      out[i] = t * inv + td * invd + k * (gsquare * v[i] + (DUAL ? gsquare_d * vd[i] : 0));
      if (DUAL) outd[i] = td * inv + k * gsquare_d * v[i];
    }
#endif
  }
  store_gw(A.gw + (i64)warp * WN, gw, lane);
}
template <bool DUAL, int D, int MUL, int VOFF, int OOFF, int GOFF, int WOFF>
DEV void gated_degree_back(const Nodes& A, Sums& sums, float* gw_gate, float* gw, const float* v, const float* vd,
    const float* g, const float* gd, float* out, float* outd, float inv, float invd, int lane) {
  EACH(i, (MUL + 31) / 32) {
    const int u = lane + 32 * i;
    if (u < MUL) {
      const float wg = A.w[GOFF + u], w = A.w[WOFF + u], vg = v[GOFF + u], vgd = DUAL ? vd[GOFF + u] : 0;
      const float z = vg * inv * wg, zd = (vgd * inv + vg * invd) * wg, s = sigmoid(z);
      const float gate = C_SILU * silu(z, s), gate_d = C_SILU * silu1(z, s) * zd;
      float ggate = 0, ggate_d = 0;
      EACH(m, D) {
        const int at = VOFF + m * MUL + u, from = OOFF + m * MUL + u;
        const float x = v[at], xd = DUAL ? vd[at] : 0, y = x * inv * w, yd = (xd * inv + x * invd) * w;
        const float go = g[from], god = DUAL ? gd[from] : 0;
        ggate += go * y + god * yd;
        ggate_d += god * y;
        gw[i] += through_norm<DUAL>(sums, out + at, outd + at, x, xd, w, inv, invd, go * gate + god * gate_d, god * gate);
      }
      const float gz = C_SILU * (ggate * silu1(z, s) + ggate_d * silu2(z, s) * zd), gzd = C_SILU * ggate_d * silu1(z, s);
      gw_gate[i] += through_norm<DUAL>(sums, out + GOFF + u, outd + GOFF + u, vg, vgd, wg, inv, invd, gz, gzd);
    }
  }
}
"""

# Pairs of atoms closer than the cutoff. An atom looks through the bins within reach; each of its LANES threads, through a piece
# of their sequence. First they count, then they write. A pair is found from both sides or from neither: the vector one way
# is exactly the negative of that the other way.
LANES = 16
PAIRS = r"""
typedef long long i64;
struct Pairs {
  const double *positions, *cell;
  const bool* pbc;
  const i64 *structure, *order, *start, *bin, *wrap, *bins, *reach, *first_bin;
  i64* count;
  const i64* begin;
  i64 *senders, *receivers, *shifts;
  double *vectors, square;
  int n_atoms;
};
extern "C" __global__ void find_pairs(const Pairs A) {
  const i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x, i = thread / LANES, lane = thread % LANES;
  if (i >= A.n_atoms) return;
  const i64 s = A.structure[i];
  const double *cell = A.cell + 9 * s, *r = A.positions + 3 * i;
  int n[3], low[3], span[3], image[3], target[3], visits = 1;
  for (int d = 0; d < 3; d++) {
    const int reach = (int)A.reach[3 * s + d];
    n[d] = (int)A.bins[3 * s + d];
    low[d] = (int)A.bin[3 * i + d] - reach;
    span[d] = 2 * reach + 1;
    visits *= span[d];
  }
  i64 at = A.count ? 0 : A.begin[thread];
  for (int visit = (int)(visits * lane / LANES); visit < (int)(visits * (lane + 1) / LANES); visit++) {
    const int step[3] = {visit / (span[1] * span[2]), visit / span[2] % span[1], visit % span[2]};
    bool there = true;
    for (int d = 0; d < 3; d++) {
      const int b = low[d] + step[d];
      image[d] = (b >= 0 ? b : b - n[d] + 1) / n[d];
      target[d] = b - image[d] * n[d];
      there &= image[d] == 0 || A.pbc[3 * s + d];
    }
    if (!there) continue;  // beyond an open end
    const i64 box = A.first_bin[s] + (i64)(target[0] * n[1] + target[1]) * n[2] + target[2], end = A.start[box + 1];
    for (i64 k = A.start[box]; k < end; k++) {
      const i64 j = A.order[k];
      i64 shift[3];
      double v[3], square = 0;
      for (int d = 0; d < 3; d++) shift[d] = image[d] - A.wrap[3 * j + d] + A.wrap[3 * i + d];
      for (int d = 0; d < 3; d++) {
        v[d] = A.positions[3 * j + d] - r[d] + (shift[0] * cell[d] + shift[1] * cell[3 + d] + shift[2] * cell[6 + d]);
        square += v[d] * v[d];
      }
      if (!(square < A.square) || (j == i && !shift[0] && !shift[1] && !shift[2])) continue;
      if (!A.count) {
        A.senders[at] = j;
        A.receivers[at] = i;
        for (int d = 0; d < 3; d++) { A.shifts[3 * at + d] = shift[d]; A.vectors[3 * at + d] = v[d]; }
      }
      at++;
    }
  }
  if (A.count) A.count[thread] = at;
}
""".replace("LANES", str(LANES))


def node_source(muls_out, norm):
    """CUDA source of norm and gate for a layer of `muls_out` channels, {kernel: its parts}, the size of a row after it, and the
    number of weights."""
    from model import SILU_NORM

    channels = [sum(muls_out), *muls_out[1:]]  # before the gate, whose own are scalars
    offsets = lambda muls: np.cumsum([0, *[(2 * l + 1) * m for l, m in enumerate(muls)]]).tolist()
    v_off, o_off = offsets(channels), offsets(muls_out)
    w_off, g_off = (np.cumsum([0, *m]).tolist() for m in (channels, muls_out))
    lanes = lambda n: -(-n // 32)  # registers a thread for n channels
    slot, calls, back, stores = lanes(muls_out[0]), [], [], [(0, muls_out[0], 0)]
    for l, m in list(enumerate(muls_out))[1:]:
        at = f"DUAL, {2 * l + 1}, {m}, {v_off[l]}, {o_off[l]}, {g_off[l]}, {w_off[l]}"
        calls.append(f"  gated_degree<{at}>(A, v, vd, out, outd, inv, invd, lane);")
        arguments = f"gw + {slot}, gw + {slot + lanes(m)}, v, vd, g, gd, out, outd, inv, invd, lane"
        back.append(f"  gated_degree_back<{at}>(A, sums, {arguments});")
        stores += [(g_off[l], m, slot), (w_off[l], m, slot + lanes(m))]
        slot += 2 * lanes(m)
    store = "  EACH(i, {}) if (lane + 32 * i < {}) gw[{} + lane + 32 * i] = mine[{} + i];"
    stores = [store.format(lanes(n), n, at, slot) for at, n, slot in stores]
    k = [f"{1 / (2 * l + 1) ** 2 / len(muls_out)!r}f" for l in range(len(muls_out))]
    weight = "".join(f"i < {end} ? {value} : " for end, value in zip(v_off[1:], k[:-1])) + k[-1]
    lines = "\n".join
    common = f"""#define NS {muls_out[0]}
#define NDIM {v_off[-1]}
#define FDIM {o_off[-1]}
#define WN {w_off[-1]}
#define NORM {int(norm)}
#define C_SILU {SILU_NORM!r}f
DEV float weight_of(int i) {{ return {weight}; }}
struct Nodes;
struct Sums;
template <bool DUAL> DEV void gated(const Nodes&, const float*, const float*, float*, float*, float, float, int);
template <bool DUAL> DEV void gated_back(const Nodes&, Sums&, float*, const float*, const float*, const float*, \
const float*, float*, float*, float, float, int);
DEV void store_gw(float*, const float*, int);
{NODES}template <bool DUAL>
DEV void gated(const Nodes& A, const float* v, const float* vd, float* out, float* outd,
    float inv, float invd, int lane) {{
{lines([*calls, "}"])}
template <bool DUAL>
DEV void gated_back(const Nodes& A, Sums& sums, float* gw, const float* v, const float* vd,
    const float* g, const float* gd, float* out, float* outd, float inv, float invd, int lane) {{
{lines([*back, "}"])}
DEV void store_gw(float* gw, const float* mine, int lane) {{
{lines([*stores, "}"])}"""
    parts = {}
    for call in "norm_gate<false>", "norm_gate_back<false>", "norm_gate<true>", "norm_gate_back<true>":
        parts[plain(call)] = common, f'extern "C" __global__ void {plain(call)}(const Nodes A) {{ {call}(A); }}'
    return parts, o_off[-1], w_off[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The source of one shape. Each kernel is compiled alone: those that are launched, many at once. So a source is {kernel: its
# parts}, which kernels have in common; what does not depend on the channels is the same in all layers, and compiled once.


def convolution_source(muls, paths, lmax, width, exact, warps):
    """CUDA source of the convolution's kernels; its constants; and the table of coupling coefficients that they take.

    muls: channels at l = 0, 1, ... of x; paths: [(l3, l1, l2, cg)], cg a (2l1+1, 2l2+1, 2l3+1) array, in the order of the
    weights; width: columns of `hidden`, a multiple of 64; warps: of a block, 4, 2 or 1.
    """
    l_out = max(l3 for l3, *_ in paths)
    mid, column, columns, channel = [0] * (l_out + 1), 0, [], []
    for l3, l1, _, _ in paths:
        columns.append(column)
        channel.append(mid[l3])
        column += muls[l1]
        mid[l3] += muls[l1]
    y_off = np.cumsum([0, *[(2 * l + 1) * m for l, m in enumerate(mid)]]).tolist()
    x_off = np.cumsum([0, *[(2 * l + 1) * m for l, m in enumerate(muls)]]).tolist()
    c = SimpleNamespace(lmax=lmax, width=width, exact=exact, warps=warps, mlp=())
    c.x_dim, c.y_dim, c.w_dim = x_off[-1], y_off[-1], column
    c.head = HARDWARE, f"#define EXACT {int(exact)}\n#define K {width}\n#define LMAX {lmax}"
    channels = f"#define XDIM {c.x_dim}\n#define YDIM {c.y_dim}\n#define WDIM {column}"
    channels += f"\n#define EVEN {int(all(m % 2 == 0 for m in muls))}"
    parts = {}
    stored = 4 if exact else 2  # bytes of a matrix element
    by_l1 = [[(p, *rest) for p, rest in enumerate(paths) if rest[1] == l1] for l1 in range(len(muls))]
    edges = 16 * (8 * (lmax + 1) * stored + 16 + width * stored + 16)
    c.slots = max(warps // count_groups(m, warps) for m in muls)  # partial sums of weight_grad, a block
    table, c.kernels = [], {plain(name): [] for name in BOUNDS}

    def kernel(name, l1, threads, shared, calls):
        """calls: [(blocks along the grid's second dimension, what the i-th of them does)]"""
        function, begin = f"{plain(name)}_{l1}", 0
        blocks = min(BOUNDS[name][l1], max(MULTIPROCESSOR // (shared + 1024), 1))
        code = [f'extern "C" __global__ void __launch_bounds__({threads}, {blocks}) {function}(const Args A) {{']
        code.append("  extern __shared__ __align__(16) char memory[];\n  const int i = blockIdx.y;")
        for n, call in calls:
            code.append(f"  if (i < {begin + n}) return {call.replace('#', f'(i - {begin})')};")
            begin += n
        parts[function] = *c.head, channels, PRELUDE, degree, "\n".join([*code, "}"])
        c.kernels[plain(name)].append(SimpleNamespace(function=function, threads=threads, shared=shared, slabs=begin))

    for l1 in reversed(range(len(muls))):  # long ones first
        ps, d, mul = by_l1[l1], 2 * l1 + 1, muls[l1]
        step = -(
            -len(ps) // max(-(-len(ps) * d // 24), -(-len(ps) // 4))
        )  # paths of a warp in `forward`: registers hold 24 of Z
        values = dict(
            COLUMN=[columns[p] for p, *_ in ps],
            L2=[l2 for _, _, _, l2, _ in ps],
            D3=[2 * l3 + 1 for _, l3, _, _, _ in ps],
            Y=[y_off[l3] + channel[p] for p, l3, *_ in ps],
            STRIDE=[mid[l3] for _, l3, *_ in ps],
        )
        choose = lambda v: "".join(f"p == {i} ? {x} : " for i, x in enumerate(v[:-1])) + str(v[-1])
        tables = "\n".join(f"DEV constexpr int {name}(int p) {{ return {choose(v)}; }}" for name, v in values.items())
        groups = count_groups(mul, warps)
        fill = dict(L=l1, D1=d, NP=len(ps), MUL=mul, XOFF=x_off[l1], CG=len(table), WARPS=warps, tables=tables)
        octets = (
            2 if d == 1 and mul > 8 * warps and not exact else 1
        )  # of channels, a warp in `backward`, as registers allow
        fill |= dict(groups=groups, SLOTS=c.slots, O=octets)
        degree = DEGREE.format(**fill)
        for _, _, _, _, cg in ps:
            for m in range(d):
                table.append(np.pad(cg[m].T, [(0, 8 - cg.shape[2]), (0, 8 - cg.shape[1])]))  # (m3, m2)
        threads = 32 * min(warps, -(-mul // 16))
        for dual in "false", "true":
            call = f"L{l1}::forward<{dual}, %d, %d>(A, # * {warps}, memory)"
            calls = [(-(-mul // (16 * warps)), call % (s, min(step, len(ps) - s))) for s in range(0, len(ps), step)]
            size = 16 + edges * (4 if dual == "true" else 2) + threads // 2 * width * step * stored
            kernel(f"forward<{dual}>", l1, threads, size, calls)
        for mode in range(3):
            dual = 1 + (mode == 2)
            n = warps * octets * len(ps)
            size = 16 + edges * (2 if mode == 1 else 4) + ((n + n % 2) * 8 * width + n * d * dual * 64) * stored
            size += (n + 1) * dual * 128 * stored if mode else 0
            size += warps * ((lmax + 1) * 512 * (mode < 2) + 64) + 16
            call = f"L{l1}::backward<{mode}>(A, # * {8 * warps * octets}, memory)"
            kernel(f"backward<{mode}>", l1, 32 * warps, size, [(-(-mul // (8 * warps * octets)), call)])
        size = warps * 2 * (edges + 64 + 16 * (64 * d + 16))
        most = 4 if d == 1 else 2  # paths of a warp in `weight_grad`, as registers allow
        for dual in "false", "true":
            call = f"L{l1}::weight_grad<{dual}, %d, %d>(A, # * {16 * groups}, (L{l1}::Rows*)memory)"
            calls = [(-(-mul // (16 * groups)), call % (s, min(most, len(ps) - s))) for s in range(0, len(ps), most)]
            kernel(f"weight_grad<{dual}>", l1, 32 * warps, size, calls)
    return parts, c, np.array(table, np.float32)


def layer_source(muls, paths, lmax, width, exact, warps, muls_out, n_basis, norm):
    """The same for a whole layer. muls_out: channels of its result; n_basis: inputs of the radial MLP; norm: has it a norm?"""
    parts, c, table = convolution_source(muls, paths, lmax, width, exact, warps)
    c.basis, stored = -(-n_basis // 16) * 16, 4 if exact else 2
    rows = lambda columns: columns * stored + 16  # bytes of one in shared memory
    weights, basis = (c.basis + width) * width * stored, 32 * warps * rows(c.basis)
    c.mlp = weights + basis, weights + basis + 6 * 16 * warps * rows(width) + 16
    head = *c.head, PRELUDE, f"#define BASIS {c.basis}\n#define N_BASIS {n_basis}\n#define WARPS {warps}", MLP
    parts |= dict(radial_mlp=(*head, RADIAL_MLP), radial_mlp_back=(*head, RADIAL_MLP_BACK))
    parts |= dict.fromkeys(("geometry", "geometry_back"), (*head, GEOMETRY))
    nodes, c.f_dim, c.n_weights = node_source(muls_out, norm)
    parts |= {name: (*head, *texts) for name, texts in nodes.items()}
    return parts, c, table


def plain(kernel):
    """ "forward<true>" -> "forward_true" """
    return kernel.replace("<", "_").replace(">", "")


def count_groups(mul, warps):
    """Groups of 16 channels that the warps of a block divide among them in `weight_grad`"""
    return min(warps, 4 if mul > 32 else 2 if mul > 16 else 1)


# ----------------------------------------------------------------------------------------------------------------------
# Compilation and launch


def mirror(name, code):
    """The struct of this name in CUDA source, of pointers, ints and doubles, for ctypes."""
    fields, kinds = [], dict(int=ctypes.c_int, double=ctypes.c_double)
    text = re.search(rf"struct {name} \{{(.*?)\}};", code, re.DOTALL)[1]
    for kind, names in re.findall(r"(?:const )?(\w+)\b([^;]*);", re.sub("//.*", "", text)):
        fields += [(n.strip(" *"), ctypes.c_void_p if "*" in n else kinds[kind]) for n in names.split(",")]
    return type(name, (ctypes.Structure,), dict(_fields_=fields))


STRUCTS = dict(Args=PRELUDE, Geometry=GEOMETRY, Mlp=MLP, Nodes=NODES, Pairs=PAIRS)
Args, Geometry, Mlp, Nodes, Pairs = map(mirror, STRUCTS, STRUCTS.values())


def fill(arguments, **values):
    """A kernel's arguments, of numbers and tensors; None: a null pointer."""
    values = {k: v for k, v in values.items() if v is not None}
    return arguments(**{k: v if isinstance(v, (int, float)) else v.data_ptr() for k, v in values.items()})


def check(status, what):
    if status:
        raise RuntimeError(f"{what} failed with CUDA error {status}")


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modded-nequix"


@functools.lru_cache
def nvrtc():
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    found = sorted(Path(torch.__file__).parents[1].glob(f"nvidia/*/lib/{name}"))  # pip's, off the loader's path
    return ctypes.CDLL(str(found[0]) if found else name)


def compile_cuda(source, options):
    """CUDA C++ -> machine code, by the NVRTC that torch brings. Raises RuntimeError with the compiler's log."""
    lib, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None), "NVRTC")
    options = [o.encode() for o in options]
    if lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    check(lib.nvrtcGetCUBINSize(program, ctypes.byref(size)), "NVRTC")
    binary = ctypes.create_string_buffer(size.value)
    check(lib.nvrtcGetCUBIN(program, binary), "NVRTC")
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


@contextlib.contextmanager
def cache_lock():
    """So that of several processes, as of torchrun, one compiles and the others find what it kept."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a home that can't be written or locked costs time, no more
            cache_folder().mkdir(parents=True, exist_ok=True)
            fcntl.lockf(stack.enter_context(open(cache_folder() / "lock", "w")), fcntl.LOCK_EX)
        yield


def machine_code(sources, capability, anew=False):
    """Of each source: from the user's cache folder, or compiled, many at once, and kept there."""
    options = "--gpu-architecture=sm_%d%d" % capability, "--std=c++17"

    def file(source):
        key = repr((torch.version.cuda, options, source)).encode()
        return cache_folder() / (hashlib.sha256(key).hexdigest()[:32] + ".cubin")

    def kept(source):
        with contextlib.suppress(OSError):
            return file(source).read_bytes()

    def compiled(source):
        binary, part = compile_cuda(source, options), file(source).with_suffix(f".{os.getpid()}.{get_ident()}")
        with contextlib.suppress(OSError):
            part.write_bytes(binary)
            part.replace(file(source))  # whole or not at all: others may read it
        return binary

    found = {s: None if anew else kept(s) for s in sources}
    missing = [s for s in found if found[s] is None]
    if missing:
        if len(missing) > 1 and os.environ.get("LOCAL_RANK", "0") == "0":
            words = f"compiling {len(missing)} CUDA kernels (or waiting for a process that does)"
            print(f"{words}, once: they are kept in {cache_folder()}", file=sys.stderr, flush=True)
        with cache_lock(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found |= zip(missing, pool.map(lambda s: (None if anew else kept(s)) or compiled(s), missing))
    return [found[s] for s in sources]


# Of several threads that are the first to use a model, one makes its kernels, and one loads them.
MAKING, LOADING = Lock(), Lock()


def load(kernels):
    """Kernels, [(Module, name)], at once: the compiler works on many side by side (that of CUDA 12 on one by one)."""
    missing = lambda: [(m, name) for m, name in dict.fromkeys(kernels) if name not in m.functions]
    if not missing():
        return
    with LOADING:  # else a thread puts its function in the place of one that another has given its shared memory
        if new := missing():
            codes = machine_code([m.sources[name] for m, name in new], new[0][0].capability)
            for (m, name), code in zip(new, codes):
                m.add(name, code)


class Module:
    """CUDA kernels, {name: parts of its source}, on one device; each is compiled when it is wanted."""

    def __init__(self, sources, device):
        self.device, self.cuda, self.functions = device, ctypes.CDLL("libcuda.so.1"), {}
        self.sources = {name: "\n".join(parts) for name, parts in sources.items()}
        self.capability = torch.cuda.get_device_capability(device)
        self.n_sm = torch.cuda.get_device_properties(device).multi_processor_count

    def add(self, name, code):
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()  # makes torch's context the current one
            if self.cuda.cuModuleLoadData(ctypes.byref(module), code):  # a damaged file? once more
                (code,) = machine_code([self.sources[name]], self.capability, anew=True)
                check(self.cuda.cuModuleLoadData(ctypes.byref(module), code), f"loading {name}")
            check(self.cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
        self.functions[name] = function

    def function(self, name):
        if name not in self.functions:
            load([(self, name)])
        return self.functions[name]

    def resident(self, name, threads, shared):
        """Blocks of a kernel with so much shared memory (bytes) that run at once; to be asked before the first launch."""
        f, blocks = self.function(name), ctypes.c_int()
        check(self.cuda.cuFuncSetAttribute(f, 8, shared), name)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        occupancy = self.cuda.cuOccupancyMaxActiveBlocksPerMultiprocessor
        check(occupancy(ctypes.byref(blocks), f, threads, ctypes.c_size_t(shared)), name)
        return blocks.value * self.n_sm

    def launch(self, name, grid, args, threads, shared=0):
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self.device.index))  # the public way is slow
        launch = (self.function(name), *grid, 1, threads, 1, 1, shared, stream, pointer, None)
        if torch.cuda.current_device() == self.device.index:
            return check(self.cuda.cuLaunchKernel(*launch), name)
        with torch.cuda.device(self.device):  # whose context must be the current one
            check(self.cuda.cuLaunchKernel(*launch), name)


def side_by_side(launches, device):
    """Call them all, in order; while a CUDA graph is captured, on streams of their own: so it has branches. (Where Python launches
    kernels one by one, streams cost more than they bring.)"""
    if device.type == "cpu" or not torch.cuda.is_current_stream_capturing():
        for launch in launches:
            launch()
        return
    main, forked = torch.cuda.current_stream(device), []
    try:
        for launch, side in zip(launches, streams(device)):
            side.wait_stream(main)
            forked.append(side)
            with torch.cuda.stream(side):
                launch()
    finally:  # also if the memory was not enough: a capture can't end with open branches
        for side in forked:
            main.wait_stream(side)


def capture(run, device):
    """A CUDA graph of run(), and what that returned, which replays write again. It is run once before: libraries set themselves
    up outside the capture."""
    main, side, graph = torch.cuda.current_stream(device), streams(device)[-1], torch.cuda.CUDAGraph()
    gc.collect()  # of autograd graphs whose leaves are tied to another stream
    side.wait_stream(main)
    with torch.cuda.stream(side):
        run()
    main.wait_stream(side)
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = run()
    return graph, out


@functools.lru_cache
def streams(device):
    return [torch.cuda.Stream(device) for _ in range(5)]  # one for each degree, and one to capture on


def shared_memory(device):
    """Bytes a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class Convolution:
    """The kernels of one shape of the convolution on one device. Arguments as of `convolution_source`."""

    source = staticmethod(convolution_source)

    def __init__(self, muls, paths, lmax, width, exact, device):
        self.device = torch.empty(0, device=device).device  # with its index
        for warps in (4, 2, 1):  # as the device's shared memory allows
            sources, self.shape, table = self.source(muls, paths, lmax, width, exact, warps)
            needed = max(*self.shape.mlp, *[k.shared for ks in self.shape.kernels.values() for k in ks])
            if needed <= shared_memory(self.device):
                break
        self.cg = torch.from_numpy(table).to(self.device)
        components = [8 * l + m for l in range(lmax + 1) for m in range(2 * l + 1)]
        self.components = torch.tensor(components, device=self.device)  # where harmonics are among those as stored
        self.module = Module(sources, self.device)
        self.launch, self.n_sm = self.module.launch, self.module.n_sm
        self.resident = functools.cache(self.module.resident)

    def blocks(self, kernel, n_atoms, atoms=1):
        """As many as run at once: each takes one node after another."""
        resident = self.resident(kernel.function, kernel.threads, kernel.shared)
        return min(-(-n_atoms // atoms), max(resident // kernel.slabs, 1))

    def launch_edges(self, name, x, senders, atoms=1, **tensors):
        """The kernels of all degrees; a block takes `atoms` nodes at a time. Raises ValueError if there are too many."""
        if max(x.numel(), 16 * len(senders)) >= 2**31:
            many = f"{len(x)} atoms with {len(senders)} edges"
            raise ValueError(f"{many} are too many for 32-bit indices: take fewer at a time")
        kernels, n_atoms = self.shape.kernels[name], len(tensors["row_ptr"]) - 1
        load([(self.module, k.function) for k in kernels])
        taken = torch.zeros(sum(k.slabs for k in kernels), dtype=torch.int32, device=self.device)
        args = fill(Args, x=x, senders=senders, n_atoms=n_atoms, cg=self.cg, taken=taken, **tensors)

        def launch(k):
            self.launch(k.function, (self.blocks(k, n_atoms, atoms), k.slabs), args, k.threads, k.shared)
            args.taken += taken.element_size() * k.slabs

        side_by_side([functools.partial(launch, k) for k in kernels], self.device)

    def stored(self, t):
        """As the kernels want it: float16; or, in the guise of float32, a row of high and one of low parts (times 2^11) of it."""
        high = t.half()
        return torch.cat([high, (2048 * (t - high)).half()], -1).view(torch.float32) if self.shape.exact else high

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.float32 if self.shape.exact else torch.float16, device=self.device)

    def harmonics(self, sh):
        """(E, (lmax+1)^2) -> (E, 8 (lmax+1)), as stored"""
        out = sh.new_zeros(len(sh), 8 * (self.shape.lmax + 1))
        return self.stored(out.index_copy(1, self.components, sh))

    def forward(self, name, out, x, sh, hidden, w3, senders, row_ptr, **tangents):
        if len(senders) == 0:
            return out.zero_()
        self.launch_edges(name, x, senders, sh=sh, hidden=hidden, w3=w3, row_ptr=row_ptr, out=out, **tangents)
        return out

    def backward(self, mode, x, sh, hidden, w3, senders, row_ptr, gy, **tensors):
        """Adds to the gradients given, what `mode` of the kernel says: gx, gsh, gr; gx, gsh, gh; gx, gh, gslope."""
        if len(senders):
            tensors = dict(sh=sh, hidden=hidden, w3=w3, row_ptr=row_ptr, gy=gy, **tensors)
            self.launch_edges(f"backward_{mode}", x, senders, **tensors)

    def weight_grad(self, x, sh, hidden, senders, row_ptr, gy, **tangents):
        n, c, name = len(x), self.shape, f"weight_grad_{str(bool(tangents)).lower()}"
        if len(senders) == 0:
            return x.new_zeros(c.width, c.w_dim)
        part = x.new_zeros(max(self.blocks(k, n, c.warps) for k in c.kernels[name]) * c.slots, c.width, c.w_dim)
        self.launch_edges(name, x, senders, c.warps, sh=sh, hidden=hidden, row_ptr=row_ptr, gy=gy, **tangents, gw3=part)
        return part.sum(0)


class LayerKernels(Convolution):
    """The kernels of a layer: its convolution, and what stands between these. Arguments as of `layer_source`."""

    def __init__(self, muls, paths, lmax, width, exact, device, muls_out, n_basis, norm):
        self.source = functools.partial(layer_source, muls_out=muls_out, n_basis=n_basis, norm=norm)
        super().__init__(muls, paths, lmax, width, exact, device)

    def geometry(self, name, vectors, **tensors):
        if len(vectors):
            args = fill(Geometry, vectors=vectors, n_edges=len(vectors), **tensors)
            self.launch(name, (min(-(-len(vectors) // 128), 16 * self.n_sm), 1), args, 128)

    def launch_mlp(self, name, basis, weights, **tensors):
        c, n_edges = self.shape, basis.shape[1]
        threads, shared = 32 * c.warps, c.mlp[name == "radial_mlp_back"]
        blocks = min(-(-n_edges // (16 * c.warps)), self.resident(name, threads, shared))
        tensors = {k: t.new_empty(blocks, *t.shape) if k in ("gw1", "gw2") else t for k, t in tensors.items()}
        tensors |= dict(basis=basis, w1=weights[0].contiguous(), w2=weights[1].contiguous())
        args = fill(Mlp, n_edges=n_edges, **tensors)
        self.launch(name, (blocks, 1), args, threads, shared)
        return tensors

    def radial(self, basis, weights):
        """Radial MLP with tangents, weights [w1, w2]: basis (2, E, B) of `Edges` -> hidden (2, E, K), as stored."""
        out = self.empty(*basis.shape[:2], self.shape.width)
        if basis.numel():
            self.launch_mlp("radial_mlp", basis, weights, out=out)
        return out

    def radial_back(self, grad, basis, weights):
        """-> gradients of the weights; grad (2, E, K), as `backward` leaves it"""
        if not basis.numel():
            return [torch.zeros_like(w) for w in weights]
        out = self.launch_mlp("radial_mlp_back", basis, weights, grad=grad, gw1=weights[0], gw2=weights[1])
        return out["gw1"].sum(0), out["gw2"].sum(0)


# ----------------------------------------------------------------------------------------------------------------------
# Neighbour list


@functools.lru_cache
def pairs_module(device):
    return Module(dict(find_pairs=(PAIRS,)), device)


def find_pairs(cutoff, **bins):
    """All pairs closer than `cutoff`; `bins` and what is returned as of `linked_cells` and `find_pairs` of data.py."""
    positions, bins = bins["positions"], {k: v.contiguous() for k, v in bins.items()}
    n, device = len(positions), torch.empty(0, device=positions.device).device
    args = fill(Pairs, **bins, square=cutoff**2, n_atoms=n)
    begin = torch.zeros(n * LANES + 1, dtype=torch.int64, device=device)
    args.count = begin.data_ptr() + begin.element_size()
    launch = lambda: pairs_module(device).launch("find_pairs", (-(-n * LANES // 128), 1), args, 128)
    launch()
    begin = begin.cumsum(0)
    e = int(begin[-1])
    senders, receivers, shifts = (begin.new_empty(e, *k) for k in ((), (), (3,)))
    vectors = positions.new_empty(e, 3)
    args.count = None
    for name, t in dict(begin=begin, senders=senders, receivers=receivers, shifts=shifts, vectors=vectors).items():
        setattr(args, name, t.data_ptr())
    launch()
    return senders, receivers, begin[::LANES].contiguous(), shifts, vectors


# ----------------------------------------------------------------------------------------------------------------------
# The operations of a layer, differentiable once. Features are flat, (A, sum (2l+1) mul), or with tangents (2 A, ...): values
# of all atoms, then tangents.


class Conv(torch.autograd.Function):
    """out (A, y_dim) of x (A, x_dim), sh (E, (lmax+1)^2), hidden (E, K), w3 (K, w_dim); see the top of this file. Float32, on
    CUDA. senders (E,) and row_ptr (A+1,) are int64; receiver i has the edges row_ptr[i] to row_ptr[i+1].

        out = Conv.apply(kernels, x, sh, hidden, w3, senders, row_ptr)

    Raises ValueError for tensors of another shape, type or device. Sums into gradients are in no fixed order: they differ
    from run to run by rounding.
    """

    @staticmethod
    def forward(ctx, k, x, sh, hidden, w3, senders, row_ptr):
        n_atoms, n_edges, c = len(row_ptr) - 1, len(senders), k.shape
        shapes = (n_atoms, c.x_dim), (n_edges, (c.lmax + 1) ** 2), (n_edges, c.width), (c.width, c.w_dim)
        wanted = [*zip(("x", "sh", "hidden", "w3"), (x, sh, hidden, w3), shapes, [torch.float32] * 4)]
        wanted += [("senders", senders, (n_edges,), torch.int64), ("row_ptr", row_ptr, (n_atoms + 1,), torch.int64)]
        for name, t, shape, dtype in wanted:
            if (t.shape, t.dtype, t.device) != (shape, dtype, k.device):
                given = f"{tuple(t.shape)} {t.dtype} on {t.device}"
                raise ValueError(f"{name} should be {shape} {dtype} on {k.device}, not {given}")
        x, w3, senders, row_ptr = (t.contiguous() for t in (x, w3, senders, row_ptr))
        ctx.k, sh, hidden = k, k.harmonics(sh), k.stored(hidden)
        ctx.save_for_backward(x, sh, hidden, w3, senders, row_ptr)
        return k.forward("forward_false", x.new_empty(len(x), c.y_dim), x, sh, hidden, w3, senders, row_ptr)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, sh, hidden, w3, senders, row_ptr = ctx.saved_tensors
        gx, gsh, gh, gy = torch.zeros_like(x), x.new_zeros(sh.shape), x.new_zeros(hidden.shape), gy.contiguous()
        ctx.k.backward(1, x, sh, hidden, w3, senders, row_ptr, gy, gx=gx, gsh=gsh, gh=gh)
        gw3 = ctx.k.weight_grad(x, sh, hidden, senders, row_ptr, gy)
        return None, gx, gsh[:, ctx.k.components], in_order(gh), gw3, None, None


def in_order(gh):
    """The gradient by `hidden`, of which `backward` leaves columns 2q, 2q+1, 2q+8, 2q+9 of 16 next to each other."""
    return gh.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)


class Edges(torch.autograd.Function):
    """Harmonics (E, 8 (lmax+1)), radial basis and its derivative by r (2, E, B), as stored, of edge vectors (E, 3), A, float64;
    and two tensors without content, by whose gradients `ForceConv` returns those by the harmonics and by r."""

    @staticmethod
    def forward(ctx, k, vectors, cutoff, p):
        if vectors.dtype != torch.float64:
            raise ValueError(f"edge vectors should be float64, not {vectors.dtype}")
        ctx.k, vectors = k, vectors.contiguous()
        ctx.save_for_backward(vectors)
        n, lmax = len(vectors), k.shape.lmax
        sh, basis = k.empty(n, 8 * (lmax + 1)), k.empty(2, n, k.shape.basis)
        k.geometry("geometry", vectors, sh=sh, basis=basis, cutoff=float(cutoff), p=float(p))
        ctx.mark_non_differentiable(sh, basis)
        nothing = vectors.new_zeros((), dtype=torch.float32)
        return sh, basis, nothing.expand(sh.shape), nothing.expand(n)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, __, gsh, gr):
        (vectors,) = ctx.saved_tensors
        g = torch.zeros_like(vectors)
        ctx.k.geometry("geometry_back", vectors, gsh=gsh.contiguous(), gr=gr.contiguous(), g=g)
        return None, g, None, None


def edge_tangents(k, vectors, along):
    """Derivatives of harmonics (E, 8 (lmax+1)), as stored, and of r (E,) along `along` (E, 3) float64."""
    shd = k.empty(len(vectors), 8 * (k.shape.lmax + 1))
    rd = vectors.new_empty(len(vectors), dtype=torch.float32)
    k.geometry("geometry", vectors.contiguous(), along=along.contiguous(), sh=shd, rd=rd)
    return shd, rd


class ForceConv(torch.autograd.Function):
    """The convolution as a function of x and of the edges' vectors. `radial` gives hidden (2, e, K) of a slice of the edges, its
    values and derivatives by r; it is asked for PIECE edges at a time, and again in the backward, if `hidden` is None. Writes
    to `out`, and returns it; adds its gradients by harmonics and r to `gsh` and `gr`, and leaves that by x in `gx`; out and
    gx are made if None. The last layer, whose backward is the first, begins the sums; the first layer is given what `Edges`
    returned, and returns them."""

    @staticmethod
    def forward(ctx, k, x, by_sh, by_r, sh, radial, hidden, w3, senders, row_ptr, out, gx, gsh, gr, last):
        ctx.k, ctx.radial, ctx.gx, ctx.gsh, ctx.gr = k, radial, gx, gsh, gr
        ctx.first, ctx.last = by_sh is not None, last
        ctx.save_for_backward(x, sh, hidden, w3, senders, row_ptr)
        out = x.new_empty(len(x), k.shape.y_dim) if out is None else out
        for nodes, edges, part, h in pieces(row_ptr, radial, hidden):
            k.forward("forward_false", out[nodes], x, sh[edges], h[0], w3, senders[edges], part)
            del h  # before the next one is made
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, sh, hidden, w3, senders, row_ptr = ctx.saved_tensors
        gx, gy = None, gy.contiguous()
        if ctx.last:
            ctx.gsh.zero_()
            ctx.gr.zero_()
        if ctx.needs_input_grad[1]:
            gx = torch.zeros_like(x) if ctx.gx is None else ctx.gx.zero_()
        for nodes, edges, part, h in pieces(row_ptr, ctx.radial, hidden):
            tensors = dict(slope=h[1], gx=gx, gsh=ctx.gsh[edges], gr=ctx.gr[edges])
            ctx.k.backward(0, x, sh[edges], h[0], w3, senders[edges], part, gy[nodes], **tensors)
            del h, tensors
        return None, gx, *((ctx.gsh, ctx.gr) if ctx.first else (None, None)), *[None] * 11


PIECE = 4_000_000  # edges


def pieces(row_ptr, radial, hidden):
    """Slices of nodes and of their edges, with row_ptr and hidden layers of these: all of them if `hidden` is given."""
    if hidden is not None:
        yield slice(None), slice(None), row_ptr, hidden
        return
    marks = torch.arange(PIECE, max(int(row_ptr[-1]), PIECE), PIECE, device=row_ptr.device)
    cuts = sorted({0, *(torch.searchsorted(row_ptr, marks, right=True) - 1).tolist(), len(row_ptr) - 1})
    for a, b in zip(cuts, cuts[1:]):
        begin, end = row_ptr[[a, b]].tolist()
        yield slice(a, b), slice(begin, end), row_ptr[a : b + 1] - begin, radial(slice(begin, end))


class DualConv(torch.autograd.Function):
    """The convolution and its tangent as a function of x (2A, ...) and the weights, of which only energies' tangents summed with
    weight 1, as in train.py, may be differentiated: then the gradient by the tangent of x is that of ForceConv, which is in `gx`
    already, as the values are in `out`."""

    @staticmethod
    def forward(ctx, k, geometry, basis, hidden, out, gx, x, w3, *inner):
        senders, row_ptr, sh, shd, rd = geometry
        n = len(x) // 2
        ctx.k, ctx.geometry, ctx.basis, ctx.inner, ctx.gx = k, geometry, basis, inner, gx
        ctx.save_for_backward(x, w3, hidden)
        tangents = dict(xd=x[n:], shd=shd, slope=hidden[1], rd=rd)
        k.forward("forward_true", out[n:], x[:n], sh, hidden[0], w3, senders, row_ptr, **tangents)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, w3, hidden = ctx.saved_tensors
        senders, row_ptr, sh, shd, rd = ctx.geometry
        k, n, gy = ctx.k, len(x) // 2, gy.contiguous()
        gx, gh = ctx.gx, x.new_zeros(hidden.shape)
        gx[:n].zero_()
        tangents = dict(xd=x[n:], shd=shd, slope=hidden[1], rd=rd, gyd=gy[n:])
        k.backward(2, x[:n], sh, hidden[0], w3, senders, row_ptr, gy, **tangents, gx=gx, gh=gh, gslope=gh[1])
        gw3 = k.weight_grad(x[:n], sh, hidden[0], senders, row_ptr, gy, **tangents)
        return None, None, None, None, None, None, gx, gw3, *k.radial_back(gh, ctx.basis, ctx.inner)


def degree(x, muls, l):
    """Degree l of flat features as a batch of matrices (2l+1, rows, mul), in place."""
    start = sum((2 * i + 1) * m for i, m in enumerate(muls[:l]))
    return x.as_strided((2 * l + 1, len(x), muls[l]), (muls[l], x.stride(0), 1), x.storage_offset() + start)


class Linear(torch.autograd.Function):
    """The sum of linear maps, degree by degree, of features xs with channels muls_in to channels muls_out. Weights have unit
    variance: 1/sqrt(fan_in) is part of the product."""

    @staticmethod
    def forward(ctx, muls_out, muls_in, *tensors):
        ctx.muls_out, ctx.muls_in = muls_out, muls_in
        xs, weights = Linear.sort(ctx, tensors)
        kept = xs if any(ctx.needs_input_grad[2 + len(xs) :]) else [None] * len(xs)  # only weights' gradients need them
        ctx.save_for_backward(*kept, *tensors[len(xs) :])
        out = xs[0].new_empty(len(xs[0]), sum((2 * l + 1) * m for l, m in enumerate(muls_out)))

        def launch(l):
            y = degree(out, muls_out, l)
            for i, (x, muls, ws) in enumerate(zip(xs, muls_in, weights)):
                if l < len(ws):
                    w = ws[l].expand(2 * l + 1, -1, -1)
                    torch.baddbmm(y, degree(x, muls, l), w, beta=min(i, 1), alpha=muls[l] ** -0.5, out=y)

        side_by_side([functools.partial(launch, l) for l in range(len(muls_out))], out.device)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        g, (xs, weights) = g.contiguous(), Linear.sort(ctx, ctx.saved_tensors)
        need_xs, need_weights = Linear.sort(ctx, ctx.needs_input_grad[2:])
        gxs, gws = [None] * len(xs), [[None] * len(ws) for ws in weights]
        for i, (muls, ws) in enumerate(zip(ctx.muls_in, weights)):
            if need_xs[i]:
                size = sum((2 * l + 1) * m for l, m in enumerate(muls))
                gxs[i] = (g.new_empty if len(ws) == len(muls) else g.new_zeros)(len(g), size)

        def launch(l):
            gy = degree(g, ctx.muls_out, l)
            for i, (x, muls, ws) in enumerate(zip(xs, ctx.muls_in, weights)):
                if l < len(ws):
                    w, scale = ws[l], muls[l] ** -0.5
                    if need_xs[i]:
                        gx = degree(gxs[i], muls, l)
                        torch.baddbmm(gx, gy, w.T.expand(2 * l + 1, -1, -1), beta=0, alpha=scale, out=gx)
                    if need_weights[i][l]:
                        xl = degree(x, muls, l).reshape(-1, muls[l])
                        gws[i][l] = torch.addmm(w, xl.T, gy.reshape(-1, gy.shape[2]), beta=0, alpha=scale)

        side_by_side([functools.partial(launch, l) for l in range(len(ctx.muls_out))], g.device)
        return None, None, *gxs, *sum(gws, [])

    @staticmethod
    def sort(ctx, items):
        """What comes one for each of xs, and then for each weight -> (that of xs, that of weights [of x][degree])"""
        n, items = len(ctx.muls_in), list(items)
        of_weights = iter(items[n:])
        return items[:n], [[next(of_weights) for _ in range(min(len(m), len(ctx.muls_out)))] for m in ctx.muls_in]


class NormGate(torch.autograd.Function):
    """RMSNorm, then gate, of v (A or 2A, ...); `weights`: all channels'."""

    @staticmethod
    def forward(ctx, k, dual, v, weights):
        n = len(v) // (1 + dual)
        out = v.new_empty(len(v), k.shape.f_dim)
        ctx.k, ctx.dual = k, dual
        ctx.save_for_backward(v, weights)
        if n:
            tangents = dict(vd=v[n:], outd=out[n:]) if dual else {}
            name = f"norm_gate_{str(dual).lower()}"
            k.launch(name, (-(-n // 4), 1), fill(Nodes, v=v, w=weights, out=out, n_atoms=n, **tangents), 128)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        v, weights = ctx.saved_tensors
        k, dual, n, g = ctx.k, ctx.dual, len(v) // (1 + ctx.dual), g.contiguous()
        out, blocks = torch.empty_like(v), max(min(-(-n // 4), 8 * ctx.k.n_sm), 1)
        gw = v.new_empty(4 * blocks, k.shape.n_weights)
        tangents = dict(vd=v[n:], outd=out[n:], gd=g[n:]) if dual else {}
        name = f"norm_gate_back_{str(dual).lower()}"
        k.launch(name, (blocks, 1), fill(Nodes, v=v, w=weights, g=g, out=out, gw=gw, n_atoms=n, **tangents), 128)
        return None, None, out, gw.sum(0) if ctx.needs_input_grad[3] else None


# ----------------------------------------------------------------------------------------------------------------------
# The network of model.py, made of the operations above. A model here is a `Nequix`.


@functools.lru_cache
def layer_kernels(muls_in, muls_out, lmax, width, n_basis, exact, norm, device):
    """The kernels of all layers of this shape."""
    from model import clebsch_gordan, paths

    couplings = paths(len(muls_in) - 1, lmax, len(muls_out) - 1)
    couplings = [(l3, l1, l2, clebsch_gordan(l1, l2, l3).numpy()) for l3, l1, l2 in couplings]
    return LayerKernels(muls_in, couplings, lmax, width, exact, device, muls_out, n_basis, norm)


def kernels_of(layer, model):
    shape = layer.muls_in, layer.muls_out, layer.lmax, len(layer.radial[-1]), len(layer.radial[0])
    with MAKING:
        return layer_kernels(*shape, not model.tf32, layer.norm is not None, layer.radial[0].device)


@functools.lru_cache
def prepare(*layers, training):
    """Compile all at once what passes through these LayerKernels launch, which is less than they have: no `Conv`."""
    others = "backward_1 weight_grad_false" if training else "backward_1 backward_2 true weight_grad mlp_back"
    unused = lambda name: any(part in name for part in others.split())
    load([(k.module, name) for k in layers for name in k.module.sources if not unused(name)])


def apply_layer(layer, k, x, conv, dual):
    """A layer of model.py on flat features; `conv` is a convolution that lacks only x. dual: values and tangents."""
    own = lambda weights: [w if dual else w.detach() for w in weights]  # only the tangent pass has gradients of weights
    y = conv(Linear.apply(layer.muls_in, [layer.muls_in], x, *own(layer.linear_1)))
    v = Linear.apply(layer.channels, [layer.muls_mid, layer.muls_in], y, x, *own([*layer.linear_2, *layer.skip]))
    weights = torch.cat(own(layer.norm)) if layer.norm is not None else v.new_ones(sum(layer.channels))
    return NormGate.apply(k, dual, v, weights)


@dataclass
class Kept:
    """What `energy_tangent` needs of `atom_energies`."""

    x: torch.Tensor  # input features
    sh: torch.Tensor
    basis: torch.Tensor
    senders: torch.Tensor
    row_ptr: torch.Tensor
    layers: list  # of each layer: hidden, output of the convolution, gradient by its input. Room for tangents in the last two.


def atom_energies(model, numbers, vectors, senders, row_ptr, keep=False):
    """`Nequix.forward`, differentiable once, and by the vectors alone; and, if `keep`, what `energy_tangent` goes on from."""
    config, x = model.config, torch.nn.functional.one_hot(model.species[numbers], len(model.e0)).float()
    shapes = [kernels_of(layer, model) for layer in model.layers]
    prepare(*shapes, training=keep)
    sh, basis, by_sh, by_r = Edges.apply(shapes[0], vectors, config["cutoff"], config["polynomial_p"])
    gsh, gr = x.new_empty(by_sh.shape), x.new_empty(by_r.shape)
    kept = Kept(x, sh, basis, senders, row_ptr, [])
    for layer, k in zip(model.layers, shapes):
        *inner, w3 = [w.detach() for w in layer.radial]
        radial = lambda edges, k=k, inner=inner: k.radial(basis[:, edges].contiguous(), inner)
        hidden = radial(slice(None)) if keep or len(senders) < PIECE else None
        out = gx = None
        if keep:  # `energy_tangent` has values in their first half, tangents in the second
            n = len(x)
            kept.layers.append((hidden, x.new_empty(2 * n, k.shape.y_dim), x.new_zeros(2 * n, k.shape.x_dim)))
            out, gx = kept.layers[-1][1][:n], kept.layers[-1][2][n:]
        edges = (by_sh, by_r) if layer is model.layers[0] else (None, None)
        w3, last = w3 * layer.avg_n_neighbors**-0.5, layer is model.layers[-1]
        tensors = sh, radial, hidden, w3, senders, row_ptr, out, gx, gsh, gr, last
        x = apply_layer(layer, k, x, lambda h: ForceConv.apply(k, h, *edges, *tensors), False)
    energy = x @ (model.readout[0].detach() * len(model.readout[0]) ** -0.5)
    return config["scale"] * energy.flatten().double() + config["shift"], kept


def energy_tangent(model, vectors, direction, kept):
    """Energies of the atoms (A,), and their derivatives along `direction` (E, 3) of the edge vectors (E, 3); both
    differentiable by the weights."""
    n, config = len(kept.x), model.config
    along = edge_tangents(kernels_of(model.layers[0], model), vectors, direction)
    geometry = kept.senders, kept.row_ptr, kept.sh, *along
    x = torch.cat([kept.x, torch.zeros_like(kept.x)])
    for layer, tensors in zip(model.layers, kept.layers):
        k, (*inner, w3) = kernels_of(layer, model), layer.radial
        w3 = w3 * layer.avg_n_neighbors**-0.5
        x = apply_layer(layer, k, x, lambda h: DualConv.apply(k, geometry, kept.basis, *tensors, h, w3, *inner), True)
    energy = config["scale"] * (x @ (model.readout[0] * len(model.readout[0]) ** -0.5)).flatten()
    return energy[:n] + config["shift"], energy[n:]


# ----------------------------------------------------------------------------------------------------------------------
# A training step as a CUDA graph


class Padded:
    """A Batch (of data.py) with room to spare, into which others are copied; with the tensors that the loss reads. Atoms
    beyond those of a batch have no edges and belong to the last structure. That structure, like all beyond those of the batch,
    has no labels. Edges beyond those of the batch are outside row_ptr, and count for nothing."""

    FIELDS = "numbers cell pbc n_atoms structure senders receivers row_ptr vectors energy forces stress".split()

    def __init__(self, batch, room):
        """room: atoms, edges and structures"""
        atoms, edges, structures = room
        rows = dict.fromkeys(self.FIELDS, structures) | dict.fromkeys(("senders", "receivers", "vectors"), edges)
        rows |= dict.fromkeys(("numbers", "structure", "forces"), atoms) | dict(row_ptr=atoms + 1)
        first = {k: getattr(batch, k)[:1] for k in self.FIELDS}
        wide = {k: t.repeat(rows[k], *[1] * (t.ndim - 1)) for k, t in first.items()}
        self.batch = replace(batch, positions=None, shifts=None, **wide)
        self.fill(batch)

    def fill(self, batch):
        """False if there is no room."""
        b, a, e, s = self.batch, len(batch.numbers), len(batch.senders), len(batch.cell)
        if a > len(b.numbers) or e > len(b.senders) or s >= len(b.cell):
            return False
        new = [getattr(batch, k) for k in self.FIELDS]
        torch._foreach_copy_([getattr(b, k)[: len(t)] for k, t in zip(self.FIELDS, new)], new)
        b.row_ptr[a + 1 :], b.structure[a:] = e, len(b.cell) - 1
        b.vectors[e:] = 1.0  # not zero, where derivatives are not finite, and zero times these would spoil all sums
        b.energy[s:], b.forces[a:], b.stress[s:] = torch.nan, torch.nan, torch.nan
        return True


class Replay:
    """run(batch, counts), which adds to the tensor `sums`, as a CUDA graph: one launch in place of a thousand. The graph has
    room for a tenth more than the largest batch so far. Batches with more edges than MOST run without it: the GPU is busy for
    longer than Python takes to launch, and the graph's own memory would be in the way."""

    MOST = 1_000_000

    def __init__(self, run, sums):
        self.run, self.sums, self.padded, self.room = run, sums, None, (0, 0, 0)

    def __call__(self, batch, counts):
        """counts: (3,) numpy"""
        if not 0 < len(batch.senders) <= self.MOST:
            return self.run(batch, counts)
        if not (self.padded and self.padded.fill(batch)):
            self.padded = self.graph = None  # frees its memory
            sizes = len(batch.numbers), len(batch.senders), len(batch.cell)
            room = [max(old, n + n // 10 + 1) for old, n in zip(self.room, sizes)]
            self.room = 0, 0, 0  # if the memory does not suffice, what is tried next may be smaller
            padded, self.counts, before = Padded(batch, room), batch.energy.new_ones(3), self.sums.clone()
            self.graph, _ = capture(lambda: self.run(padded.batch, self.counts), batch.vectors.device)
            self.sums.copy_(before)
            self.padded, self.room = padded, room
        self.counts.copy_(torch.from_numpy(counts), non_blocking=True)
        self.graph.replay()


# ----------------------------------------------------------------------------------------------------------------------
# Alone, without a network


def main(device="cuda", n=100):
    """Print one kernel; and, to stderr, errors of the convolution and its gradients, relative to plain torch in float64."""
    from model import clebsch_gordan, paths, torch_conv

    muls, lmax, l_out = (16, 8), 2, 1
    couplings = [(l3, l1, l2, clebsch_gordan(l1, l2, l3).numpy()) for l3, l1, l2 in paths(1, lmax, l_out)]
    print("\n".join(convolution_source(muls, couplings, lmax, 64, False, 4)[0]["forward_false_1"]))
    if device == "cuda" and not torch.cuda.is_available():
        return print("nothing checked: torch sees no CUDA device (test_kernels.py needs none)", file=sys.stderr)
    row_ptr = torch.randint(0, 60, (n,)).cumsum(0)
    row_ptr = torch.cat([row_ptr.new_zeros(1), row_ptr]).to(device)
    senders = torch.randint(0, n, (int(row_ptr[-1]),), device=device)
    for exact in True, False:
        k = Convolution(muls, couplings, lmax, 64, exact, device)
        shapes = (n, k.shape.x_dim), (len(senders), (lmax + 1) ** 2), (len(senders), 64), (64, k.shape.w_dim)
        leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        got = [Conv.apply(k, *leaves, senders, row_ptr)]
        expected = [torch_conv(muls, lmax, l_out, torch.float64, device)(*doubles, senders, row_ptr)]
        for out, inputs in (got, leaves), (expected, doubles):
            out += torch.autograd.grad(out[0].square().sum(), inputs)
        errors = [f"{(a - b).norm() / b.norm():.1e}" for a, b in zip(got, expected)]
        print(f"exact={exact}: errors of out {errors[0]}, by x, sh, hidden, w3 {errors[1:]}", file=sys.stderr)


if __name__ == "__main__":
    main()
