"""The convolution of NequIP-class networks as fused CUDA kernels, compiled at run time by the NVRTC that comes with torch.

    out[i] = sum over edges e with receiver i of  (hidden_e w3) * CG(x[sender_e], sh_e)

What it is. For a path (l1, l2 -> l3) and a channel u the message of an edge is bilinear in the sender's features and the
harmonics, times one weight W_u = sum_k hidden_k w3_ku. With the (2l1+1, 2l3+1) matrix of the edge

    M = sum over m2 of CG[:, m2, :] sh[m2]                (the same for all channels)

it is  W_u x_u^T M,  and everything else follows from  f = W x^T M g  (g: gradient at the output):

    df/dx = W M g        df/dW = x^T M g        df/dM = W x g^T

The per-edge weights are never in memory: a warp takes 16 edges and 8 channels, forms their W for all paths on the tensor
cores (hidden from L1, w3 in shared memory), and the result's layout is the work plan: a thread holds W for edges g, g+8
and channels 2q, 2q+1 (g = lane / 4, q = lane % 4) and does the algebra above in registers, unrolled by the generator
below. Edges are sorted by receiver: sums over the edges of a node stay in registers until the node is done.

Training on forces needs no double backward. With tangents (xd, shd, hiddend) along a displacement of the atoms, the
tangent of the output is a first-order quantity, and one backward of (out, tangent) gives the gradient of the weights.

Kernels: `forward`, `tangent`, `backward` (of forward, or of both), `weight_grad`. Modes: exact=True splits operands into
three TF32 products (float32 accuracy); exact=False is TF32, with hidden and w3 in float16: the same significand, but
values beyond 65504 overflow.
"""

import contextlib
import ctypes
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch.autograd.function import once_differentiable

# Blocks a multiprocessor: what the compiler fits the registers to
BOUNDS = {"forward<false>": 3, "forward<true>": 2, "backward<0>": 2, "backward<1>": 2, "backward<2>": 2, "weights": 2}
# 1 / sqrt(E[silu(z)^2]) under a unit normal z, on the 1,000,001-point normal-quantile grid of e3nn-jax. The released
# weights need this constant: the one e3nn samples for torch differs from it in the third digit.
SILU_NORM = 1.6765620560798837
WARPS = 4  # a block; they share one slab of w3: 32 channels of one input degree, all its paths

PRELUDE = r"""
typedef long long i64;
#define DEV __device__ __forceinline__
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)

// Rounded to TF32, whose 10 explicit bits are also those of float16.
DEV float tf32(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000) & 0xffffe000); }
DEV unsigned short half(float x) { unsigned short h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h; }
DEV float low(unsigned h) { float x; asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(x) : "r"(h)); return x; }
DEV float high(unsigned h) { float x; asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(x) : "r"(h)); return x; }

// d (16 x 8) += a (16 x 8) b (8 x 8).  Thread (g, q): a = rows g, g+8 of column q, then of column q+4; b = rows q, q+4 of
// column g; d = columns 2q, 2q+1 of row g, then of row g+8. Which columns of a (rows of b) are called q, q+4 is free: we
// use that to load vectors, and to pass a d on as the next a.
DEV void mma(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
// The same for 16 columns of a, two in a register, in float16
DEV void mma_half(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d += a b of float32 operands. EXACT: each split into a high and a low part, and the sum rounded as float32 sums are.
DEV void product(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  float ah[4];
  EACH(i, 4) ah[i] = tf32(a[i]);
#if EXACT
  float bh[2], al[4], bl[2], t[4] = {0, 0, 0, 0};
  EACH(i, 2) bh[i] = tf32(b[i]);
  EACH(i, 4) al[i] = tf32(a[i] - ah[i]);
  EACH(i, 2) bl[i] = tf32(b[i] - bh[i]);
  mma(t, al, bh);
  mma(t, ah, bl);
  mma(t, ah, bh);
  EACH(i, 4) d[i] += t[i];
#else
  mma(d, ah, b);  // b comes rounded
#endif
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
DEV void add2(float* p, float a, float b, bool two) {
#if EVEN && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" :: "l"(p), "f"(a), "f"(b));
#else
  atomicAdd(p, a);
  if (two) atomicAdd(p + 1, b);
#endif
}

// w3's columns of one octet of channels and one path lie in shared memory as a plane: as float32, 8 columns and 8 floats of
// padding every 4 rows; in TF32 mode as float16, units of 8 rows of a column, so arranged that the reads of `radial` and of
// `radial_back` both meet each bank once.
#if EXACT
#define PLANE (10 * K)
#define ROW(k) ((k) * 8 + ((k) / 4) * 8)
#else
#define PLANE (8 * K)
#define UNIT(k8, c) (((k8) / 4 * 32 + (c) * 4 + ((k8) % 4 ^ (c) / 2)) * 8)
#endif

// W of 16 edges (ea: edge g, eb: edge g+8), 8 channels, NP paths: (16 x K) hidden times (K x 8) for each path
#if EXACT
typedef float Hidden;
template <int NP>
DEV void radial(float (*w)[4], const Hidden* __restrict__ hidden, i64 ea, i64 eb, const float* w3, int g, int q) {
  EACH(p, NP) EACH(i, 4) w[p][i] = 0;
#pragma unroll 2
  for (int j = 0; j < K / 16; j++) {
    float4 a = __ldg((const float4*)(hidden + ea * K + 16 * j + 4 * q));
    float4 b = __ldg((const float4*)(hidden + eb * K + 16 * j + 4 * q));
    float a0[4] = {a.x, b.x, a.y, b.y}, a1[4] = {a.z, b.z, a.w, b.w};
    EACH(p, NP) {
      const float* s = w3 + p * PLANE + ROW(16 * j + 4 * q) + g;
      float b0[2] = {s[0], s[8]}, b1[2] = {s[16], s[24]};
      product(w[p], a0, b0);
      product(w[p], a1, b1);
    }
  }
}
DEV void load8_shared(float (&h)[8], const Hidden* p) {
  float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
  h[0] = a.x; h[1] = a.y; h[2] = a.z; h[3] = a.w; h[4] = b.x; h[5] = b.y; h[6] = b.z; h[7] = b.w;
}
#else
typedef unsigned short Hidden;
template <int NP>
DEV void radial(float (*w)[4], const Hidden* __restrict__ hidden, i64 ea, i64 eb, const unsigned short* w3, int g, int q) {
  EACH(p, NP) EACH(i, 4) w[p][i] = 0;
  EACH(j, K / 32) {
    uint4 a = __ldg((const uint4*)(hidden + ea * K + 32 * j + 8 * q));
    uint4 b = __ldg((const uint4*)(hidden + eb * K + 32 * j + 8 * q));
    EACH(p, NP) {
      uint4 f = *(const uint4*)(w3 + p * PLANE + UNIT(4 * j + q, g));
      mma_half(w[p], a.x, b.x, a.y, b.y, f.x, f.y);
      mma_half(w[p], a.z, b.z, a.w, b.w, f.z, f.w);
    }
  }
}
DEV void load8_shared(float (&h)[8], const Hidden* p) {
  uint4 a = *(const uint4*)p;
  h[0] = low(a.x); h[1] = high(a.x); h[2] = low(a.y); h[3] = high(a.y);
  h[4] = low(a.z); h[5] = high(a.z); h[6] = low(a.w); h[7] = high(a.w);
}
#endif

// gh (16 edges x K) += gw (16 edges x 8 channels, as radial leaves it) w3^T. Column n' of product n is row K/8 n' + n of w3.
DEV void radial_back(float (&gh)[K / 8][4], const float (&gw)[4], const Hidden* w3, int g, int q) {
  float a[4] = {gw[0], gw[2], gw[1], gw[3]};
#if EXACT
  EACH(n, K / 8) {
    const float* s = w3 + ROW(K / 8 * g + n) + 2 * q;
    float b[2] = {s[0], s[1]};
    product(gh[n], a, b);
  }
#else
  EACH(k, K / 64) {
    const int odd = g & 1;  // threads with odd g read their two columns the other way round
    float b0[8], b1[8];
    load8_shared(b0, w3 + UNIT(K / 64 * g + k, 2 * q + odd));
    load8_shared(b1, w3 + UNIT(K / 64 * g + k, 2 * q + 1 - odd));
    EACH(n, 8) {
      float b[2] = {odd ? b1[n] : b0[n], odd ? b0[n] : b1[n]};
      product(gh[8 * k + n], a, b);
    }
  }
#endif
}

// What weight_grad reads of 8 edges, fetched while the 8 before are at work; rows 16 bytes longer than they need be
#define SH_ROW ((4 * SH + 31) / 16 * 16)
#define HIDDEN_ROW (sizeof(Hidden) * K + 16)
#define X_ROW (64 * (2 * LMAX_IN + 1) + 16)
struct __align__(16) Rows {
  i64 senders[16];
  char sh[8 * SH_ROW], shd[8 * SH_ROW], hidden[8 * HIDDEN_ROW], slope[8 * HIDDEN_ROW], x[8 * X_ROW], xd[8 * X_ROW];
};
template <int BYTES>
DEV void copy_async(char* to, const void* from) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(address), "l"(from), "n"(BYTES) : "memory");
}
DEV void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}
template <int BYTES, int ROW_BYTES>
DEV void copy_rows(char* to, const void* from, i64 e0, i64 n_edges, int lane) {
  const int UNIT = BYTES % 16 ? 4 : 16, UNITS = BYTES / UNIT;
  for (int i = lane; i < 8 * UNITS; i += 32) {
    const int row = i / UNITS, at = i % UNITS * UNIT;
    copy_async<UNIT>(to + row * ROW_BYTES + at, (const char*)from + min(e0 + row, n_edges - 1) * BYTES + at);
  }
}
DEV void load_row(float (&s)[SH], const char* row) {
#if SH % 4 == 0
  EACH(i, SH / 4) {
    float4 f = ((const float4*)row)[i];
    s[4 * i] = f.x; s[4 * i + 1] = f.y; s[4 * i + 2] = f.z; s[4 * i + 3] = f.w;
  }
#else
  EACH(i, SH) s[i] = ((const float*)row)[i];
#endif
}

DEV void put(float (&w)[4], int slot, int c, float v) {
  w[c] = slot ? w[c] : v;
  w[2 + c] = slot ? v : w[2 + c];
}

#define SH4 ((SH + 3) / 4)
DEV void load_sh(float (&s)[SH], const float* __restrict__ sh, i64 e) {
#if SH % 4 == 0
  EACH(i, SH / 4) {
    float4 f = __ldg((const float4*)(sh + e * SH) + i);
    s[4 * i] = f.x; s[4 * i + 1] = f.y; s[4 * i + 2] = f.z; s[4 * i + 3] = f.w;
  }
#else
  EACH(i, SH) s[i] = __ldg(sh + e * SH + i);
#endif
}
"""

# One degree of the input. {L}: its number; D1 = 2l+1; NP paths; OUT components of the output a channel; MUL channels.
DEGREE = r"""
namespace L{L} {{
const int D1 = {D1}, NP = {NP}, OUT = {OUT}, MUL = {MUL}, XOFF = {XOFF}, OCTETS = {OCTETS};
__constant__ const int COLUMN[NP] = {{{columns}}};  // of w3, where a path begins
{functions}

DEV void load_x(float (&x)[D1], float (&x1)[D1], const float* __restrict__ feat, i64 atom, int u, int second) {{
  EACH(m, D1) {{
    Pair v = load2(feat + atom * XDIM + XOFF + m * MUL + u, second);
    x[m] = v.v[0]; x1[m] = v.v[1];
  }}
}}

DEV void load_x_row(float (&x)[2][D1], const char* row, int g) {{
  EACH(m, D1) {{
    const float2 f = *(const float2*)(row + 64 * m + 8 * g);
    x[0][m] = f.x; x[1][m] = f.y;
  }}
}}
// 16 channels from u0 of the features at 8 senders
DEV void copy_x(char* to, const float* x, const i64* senders, int u0, int lane) {{
  const int UNIT = MUL % 4 || XOFF % 4 || XDIM % 4 ? 1 : 4;  // floats
  EACH(i, 4 * D1 / UNIT) {{
    const int unit = 32 * i + lane, edge = unit / (D1 * 16 / UNIT), m = unit / (16 / UNIT) % D1, c = unit % (16 / UNIT) * UNIT;
    if (u0 + c < MUL) copy_async<4 * UNIT>(to + edge * X_ROW + 64 * m + 4 * c, x + senders[edge] * XDIM + XOFF + m * MUL + u0 + c);
  }}
}}

DEV void stage(Hidden* w3, const float* __restrict__ source, int u0, int octets) {{
  for (int i = threadIdx.x; i < octets * NP * K * 8; i += blockDim.x) {{
    int c = i % 8, k = i / 8 % K, p = i / (8 * K) % NP, o = i / (8 * K * NP), u = u0 + 8 * o + c;
    float v = u < MUL ? source[k * WDIM + COLUMN[p] + u] : 0;
    Hidden* plane = w3 + (o * NP + p) * PLANE;
#if EXACT
    plane[ROW(k) + c] = v;
#else
    plane[UNIT(k / 8, c) + k % 8] = half(v);
#endif
  }}
  __syncthreads();
}}

// forward and tangent: the warps of a block take the same nodes and different octets, so that `hidden` is read once
template <bool TANGENT>
DEV void forward(const Args& A, int u0, Hidden* smem) {{
  const int octets = min({WARPS}, (MUL - u0 + 7) / 8), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  stage(smem, A.w3, u0, octets);
  const int parts = octets / OCTETS, part = warp % parts;  // of the slab, one a warp
  const Hidden* w3 = smem + part * OCTETS * NP * PLANE;
  const int side = {WARPS} / parts;
  if (warp >= side * parts) return;
  int first[OCTETS], u[OCTETS], second[OCTETS];
  EACH(o, OCTETS) {{
    first[o] = u0 + 8 * (part * OCTETS + o) + 2 * q;
    u[o] = min(first[o], MUL - 1 - EVEN);
    second[o] = first[o] + 1 < MUL;
  }}
  const int last = min(A.n_atoms, (blockIdx.x + 1) * A.chunk);
  for (int node = blockIdx.x * A.chunk + warp / parts; node < last; node += side) {{
    float acc[2 * OCTETS][OUT];
    EACH(c, 2 * OCTETS) EACH(i, OUT) acc[c][i] = 0;
    const i64 begin = A.row_ptr[node], end = A.row_ptr[node + 1];
    for (i64 e0 = begin; e0 < end; e0 += 16) {{
      const i64 ea = min(e0 + g, end - 1), eb = min(e0 + g + 8, end - 1);
      float w[OCTETS * NP][4], wd[TANGENT ? OCTETS * NP : 1][4];
      radial<OCTETS * NP>(w, A.hidden, ea, eb, w3, g, q);
      if constexpr (TANGENT) radial<OCTETS * NP>(wd, A.slope, ea, eb, w3, g, q);
      const i64 ja = A.senders[ea], jb = A.senders[eb];
#pragma unroll 1
      for (int t = 0; t < 2; t++) {{
        const i64 e = t ? eb : ea, j = t ? jb : ja;
        const float valid = e0 + g + 8 * t < end;
        float x[2 * OCTETS][D1], s[SH], v[2 * OCTETS][NP];
        EACH(o, OCTETS) load_x(x[2 * o], x[2 * o + 1], A.x, j, u[o], second[o]);
        load_sh(s, A.sh, e);
        EACH(o, OCTETS) EACH(p, NP) EACH(c, 2) v[2 * o + c][p] = valid * (t ? w[o * NP + p][2 + c] : w[o * NP + p][c]);
        if constexpr (TANGENT) {{
          float xd[2 * OCTETS][D1], sd[SH], vd[2 * OCTETS][NP];
          const float rd = valid * A.rd[e];
          EACH(o, OCTETS) load_x(xd[2 * o], xd[2 * o + 1], A.xd, j, u[o], second[o]);
          load_sh(sd, A.shd, e);
          EACH(o, OCTETS) EACH(p, NP) EACH(c, 2) vd[2 * o + c][p] = rd * (t ? wd[o * NP + p][2 + c] : wd[o * NP + p][c]);
          tangent(acc, x, xd, s, sd, v, vd);
        }} else {{
          message(acc, x, s, v);
        }}
      }}
    }}
    EACH(c, 2 * OCTETS) EACH(i, OUT)
      for (int d = 4; d < 32; d *= 2) acc[c][i] += __shfl_xor_sync(~0u, acc[c][i], d);
    EACH(o, OCTETS)
      if (g == o && first[o] < MUL) store(A.out + (i64)node * YDIM + u[o], acc[2 * o], acc[2 * o + 1], second[o]);
  }}
}}

// backward: a warp takes a node and all octets of the slab. MODE 0: gradients of x, sh and r (slope = d hidden / dr);
// 1: of x, sh and hidden; 2: of forward and tangent together, by x, xd, hidden and slope.
template <int MODE>
DEV void backward(const Args& A, int u0, Hidden* smem) {{
  const int octets = min({WARPS}, (MUL - u0 + 7) / 8), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  stage(smem, A.w3, u0, octets);
  const int run = A.chunk / {WARPS}, start = blockIdx.x * A.chunk + warp * run, last = min(A.n_atoms, start + run);
  for (int node = start; node < last; node++) {{
    const i64 begin = A.row_ptr[node], end = A.row_ptr[node + 1];
    for (i64 e0 = begin; e0 < end; e0 += 16) {{
      const i64 ea = min(e0 + g, end - 1), eb = min(e0 + g + 8, end - 1);
      float gs[MODE == 2 ? 1 : 2][4 * SH4], gr[2] = {{0, 0}};
      float gh[MODE == 0 ? 1 : K / 8][4], gh2[MODE == 2 ? K / 8 : 1][4];
      if constexpr (MODE != 2) EACH(i, 4 * SH4) gs[0][i] = gs[1][i] = 0;
      if constexpr (MODE != 0) EACH(n, K / 8) EACH(i, 4) gh[n][i] = 0;
      if constexpr (MODE == 2) EACH(n, K / 8) EACH(i, 4) gh2[n][i] = 0;
#pragma unroll 1
      for (int o = 0; o < octets; o++) {{
        const Hidden* w3 = smem + o * NP * PLANE;
        const int first = u0 + 8 * o + 2 * q, u = min(first, MUL - 1 - EVEN), second = first + 1 < MUL;
        float w[NP][4], wd[MODE == 1 ? 1 : NP][4];
        radial<NP>(w, A.hidden, ea, eb, w3, g, q);
        if constexpr (MODE != 1) radial<NP>(wd, A.slope, ea, eb, w3, g, q);
#pragma unroll (MODE == 2 ? 1 : 2)
        for (int t = 0; t < 2; t++) {{
          if (e0 + 8 * t >= end) break;
          const i64 e = t ? eb : ea, j = A.senders[e];
          const bool live = e0 + g + 8 * t < end;
          const float valid = live;
          float x[2][D1], gx[2][D1], s[SH], v[2][NP], vd[2][NP];
          EACH(m, D1) gx[0][m] = gx[1][m] = 0;
          load_x(x[0], x[1], A.x, j, u, second);
          load_sh(s, A.sh, e);
          EACH(p, NP) EACH(c, 2) {{
            v[c][p] = valid * (t ? w[p][2 + c] : w[p][c]);
            if constexpr (MODE != 1) vd[c][p] = valid * (t ? wd[p][2 + c] : wd[p][c]);
          }}
          const float* gy = A.gy + (i64)node * YDIM + u;
          if constexpr (MODE == 2) {{
            float xd[2][D1], sd[SH];
            const float rd = A.rd[e];
            load_x(xd[0], xd[1], A.xd, j, u, second);
            load_sh(sd, A.shd, e);
            EACH(p, NP) EACH(c, 2) vd[c][p] *= rd;
            dual_back(gx, x, xd, s, sd, v, vd, gy, A.gyd + (i64)node * YDIM + u, second);
            EACH(p, NP) EACH(c, 2) {{
              put(w[p], t, c, valid * v[c][p]);
              put(wd[p], t, c, valid * rd * vd[c][p]);
            }}
          }} else {{
            message_back(gx, gs[t], x, s, v, gy, second);
            EACH(p, NP) EACH(c, 2) {{
              if constexpr (MODE == 0) gr[t] += v[c][p] * vd[c][p];
              if constexpr (MODE == 1) put(w[p], t, c, valid * v[c][p]);
            }}
          }}
          if (live && first < MUL && A.gx)
            EACH(m, D1)
              add2(A.gx + j * XDIM + XOFF + m * MUL + u, gx[0][m], gx[1][m], second);
        }}
        if constexpr (MODE != 0)
          EACH(p, NP) {{
            radial_back(gh, w[p], w3 + p * PLANE, g, q);
            if constexpr (MODE == 2) radial_back(gh2, wd[p], w3 + p * PLANE, g, q);
          }}
      }}
      EACH(t, 2) {{
        const i64 e = t ? eb : ea;
        const bool live = e0 + g + 8 * t < end;
        if constexpr (MODE != 2) {{
          // over the four threads of an edge; each ends with a quarter of the harmonics
          EACH(i, 2 * SH4) {{
            const float mine = q & 2 ? gs[t][i + 2 * SH4] : gs[t][i], other = q & 2 ? gs[t][i] : gs[t][i + 2 * SH4];
            gs[t][i] = mine + __shfl_xor_sync(~0u, other, 2);
          }}
          EACH(i, SH4) {{
            const float mine = q & 1 ? gs[t][i + SH4] : gs[t][i], other = q & 1 ? gs[t][i] : gs[t][i + SH4];
            gs[t][i] = mine + __shfl_xor_sync(~0u, other, 1);
          }}
          for (int d = 1; d < 4; d *= 2) gr[t] += __shfl_xor_sync(~0u, gr[t], d);
          if (live) {{
#if SH == 16
            red4(A.gsh + e * SH + 4 * q, gs[t][0], gs[t][1], gs[t][2], gs[t][3]);
#else
            EACH(i, SH4) if (q * SH4 + i < SH) atomicAdd(A.gsh + e * SH + q * SH4 + i, gs[t][i]);
#endif
            if (MODE == 0 && q == 0) atomicAdd(A.gr + e, gr[t]);
          }}
        }}
        if (MODE != 0 && live)
          EACH(i, 2) EACH(n, K / 32) {{
            const i64 at = e * K + K / 8 * (2 * q + i) + 4 * n;
            if constexpr (MODE != 0) red4(A.gh + at, gh[4 * n][2 * t + i], gh[4 * n + 1][2 * t + i], gh[4 * n + 2][2 * t + i], gh[4 * n + 3][2 * t + i]);
            if constexpr (MODE == 2) red4(A.gslope + at, gh2[4 * n][2 * t + i], gh2[4 * n + 1][2 * t + i], gh2[4 * n + 2][2 * t + i], gh2[4 * n + 3][2 * t + i]);
          }}
      }}
    }}
  }}
}}
}}  // namespace
"""

ARGS = r"""
struct Args {
  const float *x, *xd, *sh, *shd, *rd, *w3, *gy, *gyd;
  const Hidden *hidden, *slope;
  const i64 *senders, *row_ptr;
  float *out, *gx, *gsh, *gr, *gh, *gslope, *gw3;
  int n_atoms, chunk;
};
DEV void red4(float* p, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" :: "l"(p), "f"(a), "f"(b), "f"(c), "f"(d));
#else
  atomicAdd(p, a); atomicAdd(p + 1, b); atomicAdd(p + 2, c); atomicAdd(p + 3, d);
#endif
}
"""

# Gradient of w3 for a group of paths of one degree: channels are rows here, so that the products of 8 edges are at once
# the left operand of (16 channels x 8 edges) (8 edges x K), whose sum over the edges of the chunk stays in registers.
WEIGHTS = r"""
namespace L{L} {{
namespace G{G} {{
const int NP = {NP}, FIRST = {FIRST}, OUT = {OUT};
{functions}

template <bool DUAL>
DEV void weight_grad(const Args& A, int u0, Rows* all_rows) {{
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  u0 += 16 * (warp % {groups});
  Rows* buffer = all_rows + 2 * warp;
  int turn = 0;
  const int first = u0 + 2 * g, u = min(first, MUL - 1 - EVEN), second = first + 1 < MUL;  // rows g, g+8
  float acc[NP][K / 8][4];
  EACH(p, NP) EACH(n, K / 8) EACH(i, 4) acc[p][n][i] = 0;
  const int run = A.chunk / ({WARPS} / {groups}), start = blockIdx.x * A.chunk + warp / {groups} * run, last = min(A.n_atoms, start + run);
  const i64 n_edges = A.row_ptr[A.n_atoms];
  auto fetch_edges = [&](Rows& to, i64 e0) {{
    copy_rows<4 * SH, SH_ROW>(to.sh, A.sh, e0, n_edges, lane);
    copy_rows<sizeof(Hidden) * K, HIDDEN_ROW>(to.hidden, A.hidden, e0, n_edges, lane);
    if constexpr (DUAL) {{
      copy_rows<4 * SH, SH_ROW>(to.shd, A.shd, e0, n_edges, lane);
      copy_rows<sizeof(Hidden) * K, HIDDEN_ROW>(to.slope, A.slope, e0, n_edges, lane);
    }}
  }};
  auto fetch_x = [&](Rows& to, const i64* senders) {{
    copy_x(to.x, A.x, senders, u0, lane);
    if constexpr (DUAL) copy_x(to.xd, A.xd, senders, u0, lane);
  }};
  i64 j_soon = 0;  // senders of 16 edges from where the tile at hand begins: those of the next one are among them
  if (start < last) {{
    const i64 e0 = A.row_ptr[start];
    fetch_edges(buffer[0], e0);
    j_soon = A.senders[min(e0 + lane % 16, n_edges - 1)];
    buffer[0].senders[lane % 16] = j_soon;
    __syncwarp();
    fetch_x(buffer[0], buffer[0].senders);
  }}
  for (int node = start; node < last; node++) {{
    const i64 begin = A.row_ptr[node], end = A.row_ptr[node + 1];
    float gy[2][OUT], gyd[2][OUT];
    load_gy(gy, A.gy + (i64)node * YDIM + u, second);
    if constexpr (DUAL) load_gy(gyd, A.gyd + (i64)node * YDIM + u, second);
    for (i64 e0 = begin; e0 < end; e0 += 8) {{
      float a[NP][4], ad[DUAL ? NP : 1][4];
      const i64 ea = min(e0 + 2 * q, end - 1), eb = min(e0 + 2 * q + 1, end - 1);
      const i64 next = min(e0 + 8, end);
      Rows &rows = buffer[turn], &soon = buffer[turn ^ 1];
      turn ^= 1;
      rows.senders[lane % 16] = j_soon;
      wait_for_copies();
      fetch_edges(soon, next);
      fetch_x(soon, rows.senders + (next - e0));
      j_soon = A.senders[min(next + lane % 16, n_edges - 1)];
      EACH(t, 2) {{
        const i64 e = t ? eb : ea;
        const float valid = e0 + 2 * q + t < end;
        float x[2][D1], s[SH], v[2][NP];
        load_x_row(x, rows.x + (2 * q + t) * X_ROW, g);
        load_row(s, rows.sh + (2 * q + t) * SH_ROW);
        if constexpr (DUAL) {{
          float xd[2][D1], sd[SH], vd[2][NP];
          const float rd = valid * A.rd[e];
          load_x_row(xd, rows.xd + (2 * q + t) * X_ROW, g);
          load_row(sd, rows.shd + (2 * q + t) * SH_ROW);
          dual_weights(v, vd, x, xd, s, sd, gy, gyd);
          EACH(p, NP) EACH(c, 2) ad[p][2 * t + c] = rd * vd[c][p];
        }} else {{
          message_weights(v, x, s, gy);
        }}
        EACH(p, NP) EACH(c, 2) a[p][2 * t + c] = valid * v[c][p];
      }}
      // column n of b stands for row K/8 n' + n of w3, n' its number in the product: 8 in a row are one load
      EACH(k, K / 64) {{
        float ha[8], hb[8];
        load8_shared(ha, (const Hidden*)(rows.hidden + 2 * q * HIDDEN_ROW) + K / 8 * g + 8 * k);
        load8_shared(hb, (const Hidden*)(rows.hidden + (2 * q + 1) * HIDDEN_ROW) + K / 8 * g + 8 * k);
        EACH(n, 8) {{
          float b[2] = {{ha[n], hb[n]}};
          EACH(p, NP) product(acc[p][8 * k + n], a[p], b);
        }}
        if constexpr (DUAL) {{
          load8_shared(ha, (const Hidden*)(rows.slope + 2 * q * HIDDEN_ROW) + K / 8 * g + 8 * k);
          load8_shared(hb, (const Hidden*)(rows.slope + (2 * q + 1) * HIDDEN_ROW) + K / 8 * g + 8 * k);
          EACH(n, 8) {{
            float b[2] = {{ha[n], hb[n]}};
            EACH(p, NP) product(acc[p][8 * k + n], ad[p], b);
          }}
        }}
      }}
    }}
  }}
  wait_for_copies();
  float* out = A.gw3 + (i64)(blockIdx.x * {SLOTS} + warp / {groups}) * K * WDIM;
  EACH(p, NP)
    EACH(n, K / 8)
      EACH(i, 4) {{
        const int k = K / 8 * (2 * q + i % 2) + n, c = first + i / 2;
        if (c < MUL) out[k * WDIM + COLUMN[FIRST + p] + c] = acc[p][n][i];
      }}
}}
}}
}}  // namespaces
"""


# What stands between the convolutions: SiLU of the radial MLP, and norm and gate of a layer; each also with tangents. A warp
# takes an atom. v: the layer's channels before norm and gate, NS scalars and NG gates first; k: 1/(2l+1)^2 / degrees.
NODES = r"""
DEV float sigmoid(float z) { return 1 / (1 + expf(-z)); }
DEV float silu(float z, float s) { return z * s; }
DEV float silu1(float z, float s) { return s * (1 + z * (1 - s)); }
DEV float silu2(float z, float s) { return s * (1 - s) * (2 + z * (1 - 2 * s)); }

struct Elements { const float *z, *grad; float *out; Hidden *stored; i64 n; };

// (a, ad) = (silu(z), silu'(z) zd), the last layer's as `Hidden`
extern "C" __global__ void dual_silu(const Elements A) {
  for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < A.n; i += (i64)gridDim.x * blockDim.x) {
    const float z = A.z[i], zd = A.z[A.n + i], s = sigmoid(z), a = silu(z, s), ad = silu1(z, s) * zd;
    if (A.out) { A.out[i] = a; A.out[A.n + i] = ad; }
#if EXACT
    else { A.stored[i] = a; A.stored[A.n + i] = ad; }
#else
    else { A.stored[i] = half(a); A.stored[A.n + i] = half(ad); }
#endif
  }
}
extern "C" __global__ void dual_silu_back(const Elements A) {
  for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < A.n; i += (i64)gridDim.x * blockDim.x) {
    const float z = A.z[i], zd = A.z[A.n + i], s = sigmoid(z), g = A.grad[i], gd = A.grad[A.n + i];
    A.out[i] = g * silu1(z, s) + gd * silu2(z, s) * zd;
    A.out[A.n + i] = gd * silu1(z, s);
  }
}

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


def node_source(muls_out, norm):
    """CUDA source of norm and gate for a layer of `muls_out` channels, and the sizes of a row before and after it."""
    gates = sum(muls_out[1:])
    channels = [muls_out[0] + gates, *muls_out[1:]]
    v_off = np.cumsum([0, *[(2 * l + 1) * m for l, m in enumerate(channels)]]).tolist()
    o_off = np.cumsum([0, *[(2 * l + 1) * m for l, m in enumerate(muls_out)]]).tolist()
    w_off = np.cumsum([0, *channels]).tolist()
    g_off = np.cumsum([muls_out[0], *muls_out[1:]]).tolist()
    lanes = lambda n: -(-n // 32)  # registers a thread for n channels
    slot, calls, back, stores = lanes(muls_out[0]), [], [], [(0, muls_out[0], 0)]
    for l in range(1, len(muls_out)):
        m = muls_out[l]
        at = f"DUAL, {2 * l + 1}, {m}, {v_off[l]}, {o_off[l]}, {g_off[l - 1]}, {w_off[l]}"
        calls.append(f"  gated_degree<{at}>(A, v, vd, out, outd, inv, invd, lane);")
        arguments = f"gw + {slot}, gw + {slot + lanes(m)}, v, vd, g, gd, out, outd, inv, invd, lane"
        back.append(f"  gated_degree_back<{at}>(A, sums, {arguments});")
        stores += [(g_off[l - 1], m, slot), (w_off[l], m, slot + lanes(m))]
        slot += 2 * lanes(m)
    k = [f"{1 / (2 * l + 1) ** 2 / len(muls_out)!r}f" for l in range(len(muls_out))]
    weight = "".join(f"i < {end} ? {value} : " for end, value in zip(v_off[1:], k[:-1])) + k[-1]
    heads = (
        f"#define NS {muls_out[0]}\n#define NDIM {v_off[-1]}\n#define FDIM {o_off[-1]}\n#define WN {w_off[-1]}\n"
        f"#define NORM {int(norm)}\n#define C_SILU {SILU_NORM!r}f\nDEV float weight_of(int i) {{ return {weight}; }}\n"
        "struct Nodes;\nstruct Sums;\ntemplate <bool DUAL> DEV void gated(const Nodes&, const float*, const float*, float*, float*, float, float, int);\n"
        "template <bool DUAL> DEV void gated_back(const Nodes&, Sums&, float*, const float*, const float*, const float*, const float*, float*, float*, float, float, int);\n"
        "DEV void store_gw(float*, const float*, int);\n"
    )
    tails = ["template <bool DUAL>", "DEV void gated(const Nodes& A, const float* v, const float* vd, float* out, float* outd, float inv, float invd, int lane) {", *calls, "}"]
    tails += ["template <bool DUAL>", "DEV void gated_back(const Nodes& A, Sums& sums, float* gw, const float* v, const float* vd, const float* g,"]
    tails += ["    const float* gd, float* out, float* outd, float inv, float invd, int lane) {", *back, "}"]
    tails += ["DEV void store_gw(float* gw, const float* mine, int lane) {"]
    tails += [f"  EACH(i, {lanes(n)}) if (lane + 32 * i < {n}) gw[{at} + lane + 32 * i] = mine[{slot} + i];" for at, n, slot in stores] + ["}"]
    for dual in "false", "true":
        tails += [f'extern "C" __global__ void norm_gate_{dual}(const Nodes A) {{ norm_gate<{dual}>(A); }}']
        tails += [f'extern "C" __global__ void norm_gate_back_{dual}(const Nodes A) {{ norm_gate_back<{dual}>(A); }}']
    return heads + NODES + "\n".join(tails), v_off[-1], o_off[-1], w_off[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The generator


class Coupling:
    """One path (l1, l2 -> l3) as C: the edge's matrix M and the sums over it, term by term."""

    def __init__(self, index, l1, l2, l3, cg, out_offset, y_offset, y_stride):
        self.i, self.l1, self.l2, self.l3 = index, l1, l2, l3
        self.out, self.y, self.stride = out_offset, y_offset, y_stride
        self.m = {}  # (m1, m3) -> [(coefficient, m2)]
        for m1, m2, m3 in np.argwhere(cg):
            self.m.setdefault((int(m1), int(m3)), []).append((float(cg[m1, m2, m3]), l2 * l2 + int(m2)))

    def matrix(self, name, sh):
        terms = {k: " + ".join(f"{c!r}f * {sh}[{m2}]" for c, m2 in t) for k, t in self.m.items()}
        return " ".join(f"const float {name}{a}_{b} = {t};" for (a, b), t in terms.items())

    def times(self, name, vector):
        """M vector, (2l1+1) sums; vector(m3) is C."""
        return {
            a: " + ".join(f"{name}{a}_{b} * {vector(b)}" for (a_, b) in self.m if a_ == a)
            for a in sorted({a for a, _ in self.m})
        }

    def outputs(self):
        return range(2 * self.l3 + 1)

    def inputs(self):
        return sorted({a for a, _ in self.m})


def generate_message(paths):
    """acc += W x^T M"""
    out = ["DEV void message(float (&acc)[2 * OCTETS][OUT], const float (&x)[2 * OCTETS][D1], const float (&s)[SH],",
           "    const float (&w)[2 * OCTETS][NP]) {"]
    for p in paths:
        out += ["  {", "    " + p.matrix("M", "s"), "    EACH(c, 2 * OCTETS) {"]
        out += [f"      const float u{a} = w[c][{p.i}] * x[c][{a}];" for a in p.inputs()]
        out += [f"      acc[c][{p.out + b}] += M{a}_{b} * u{a};" for a, b in p.m]
        out += ["    }", "  }"]
    return "\n".join([*out, "}"])


def generate_tangent(paths):
    """acc += (Wd x + W xd)^T M + W x^T Md"""
    out = ["DEV void tangent(float (&acc)[2 * OCTETS][OUT], const float (&x)[2 * OCTETS][D1], const float (&xd)[2 * OCTETS][D1],"]
    out += ["    const float (&s)[SH], const float (&sd)[SH], const float (&w)[2 * OCTETS][NP], const float (&wd)[2 * OCTETS][NP]) {"]
    for p in paths:
        out += ["  {", "    " + p.matrix("M", "s"), "    " + p.matrix("N", "sd"), "    EACH(c, 2 * OCTETS) {"]
        for a in p.inputs():
            out += [f"      const float u{a} = w[c][{p.i}] * x[c][{a}];"]
            out += [f"      const float v{a} = w[c][{p.i}] * xd[c][{a}] + wd[c][{p.i}] * x[c][{a}];"]
        out += [f"      acc[c][{p.out + b}] += M{a}_{b} * v{a}; acc[c][{p.out + b}] += N{a}_{b} * u{a};" for a, b in p.m]
        out += ["    }", "  }"]
    return "\n".join([*out, "}"])


def load_gradient(p, name, pointer):
    return " ".join(f"const Pair {name}{b} = load2({pointer} + {p.y + b * p.stride}, second);" for b in p.outputs())


def generate_message_back(paths):
    """gx += W M g; W <- x^T M g; gs += CG-contraction of W x g^T"""
    out = ["DEV void message_back(float (&gx)[2][D1], float (&gs)[4 * SH4], const float (&x)[2][D1], const float (&s)[SH],"]
    out += ["    float (&w)[2][NP], const float* __restrict__ gy, int second) {"]
    for p in paths:
        out += ["  {", "    " + p.matrix("M", "s"), "    " + load_gradient(p, "g", "gy")]
        out += ["    float " + ", ".join(f"Q{a}_{b} = 0" for a, b in p.m) + ";", "    EACH(c, 2) {"]
        for a, total in p.times("M", lambda b: f"g{b}.v[c]").items():
            out += [f"      const float b{a} = {total}; const float u{a} = w[c][{p.i}] * x[c][{a}];"]
            out += [f"      gx[c][{a}] += w[c][{p.i}] * b{a};"]
        out += [f"      Q{a}_{b} += u{a} * g{b}.v[c];" for a, b in p.m]
        out += [f"      w[c][{p.i}] = " + " + ".join(f"x[c][{a}] * b{a}" for a in p.inputs()) + ";", "    }"]
        out += [f"    gs[{m2}] += {c!r}f * Q{a}_{b};" for (a, b), t in p.m.items() for c, m2 in t] + ["  }"]
    return "\n".join([*out, "}"])


def generate_dual_back(paths):
    """With b = M gd, d = M g + Md gd:  gx += W d + Wd b;  W <- x^T d + xd^T b;  Wd <- x^T b"""
    out = ["DEV void dual_back(float (&gx)[2][D1], const float (&x)[2][D1], const float (&xd)[2][D1],"]
    out += ["    const float (&s)[SH], const float (&sd)[SH], float (&w)[2][NP], float (&wd)[2][NP],"]
    out += ["    const float* __restrict__ gy, const float* __restrict__ gyd, int second) {"]
    for p in paths:
        out += ["  {", "    " + p.matrix("M", "s"), "    " + p.matrix("N", "sd")]
        out += ["    " + load_gradient(p, "g", "gy"), "    " + load_gradient(p, "h", "gyd")]
        out += ["    EACH(c, 2) {"]
        b = p.times("M", lambda b: f"h{b}.v[c]")
        d, e = p.times("M", lambda b: f"g{b}.v[c]"), p.times("N", lambda b: f"h{b}.v[c]")
        for a in b:
            out += [f"      const float b{a} = {b[a]}, d{a} = {d[a]} + {e[a]};"]
            out += [f"      gx[c][{a}] += w[c][{p.i}] * d{a}; gx[c][{a}] += wd[c][{p.i}] * b{a};"]
        out += [f"      w[c][{p.i}] = " + " + ".join(f"x[c][{a}] * d{a} + xd[c][{a}] * b{a}" for a in b) + ";"]
        out += [f"      wd[c][{p.i}] = " + " + ".join(f"x[c][{a}] * b{a}" for a in b) + ";", "    }", "  }"]
    return "\n".join([*out, "}"])


def generate_weights(paths):
    """The node's gradients by path; W <- x^T M g; and with tangents Wd <- x^T M gd, W <- x^T (M g + Md gd) + xd^T M gd"""
    at = [p.y + b * p.stride for p in paths for b in p.outputs()]
    out = ["DEV void load_gy(float (&g)[2][OUT], const float* __restrict__ gy, int second) {"]
    out += [f"  {{ const Pair v = load2(gy + {a}, second); g[0][{i}] = v.v[0]; g[1][{i}] = v.v[1]; }}" for i, a in enumerate(at)]
    out += ["}"]
    out += ["DEV void message_weights(float (&w)[2][NP], const float (&x)[2][D1], const float (&s)[SH], const float (&g)[2][OUT]) {"]
    start = np.cumsum([0, *[2 * p.l3 + 1 for p in paths]]).tolist()
    for k, p in enumerate(paths):
        t = p.times("M", lambda b: f"g[c][{start[k] + b}]")
        out += ["  {", "    " + p.matrix("M", "s"), "    EACH(c, 2) {"]
        out += [f"      w[c][{k}] = " + " + ".join(f"x[c][{a}] * ({v})" for a, v in t.items()) + ";", "    }", "  }"]
    out += ["}", "DEV void dual_weights(float (&w)[2][NP], float (&wd)[2][NP], const float (&x)[2][D1], const float (&xd)[2][D1],"]
    out += ["    const float (&s)[SH], const float (&sd)[SH], const float (&g)[2][OUT], const float (&h)[2][OUT]) {"]
    for k, p in enumerate(paths):
        b = p.times("M", lambda b: f"h[c][{start[k] + b}]")
        d, e = p.times("M", lambda b: f"g[c][{start[k] + b}]"), p.times("N", lambda b: f"h[c][{start[k] + b}]")
        out += ["  {", "    " + p.matrix("M", "s"), "    " + p.matrix("N", "sd"), "    EACH(c, 2) {"]
        out += [f"      const float b{a} = {b[a]}, d{a} = {d[a]} + {e[a]};" for a in b]
        out += [f"      w[c][{k}] = " + " + ".join(f"x[c][{a}] * d{a} + xd[c][{a}] * b{a}" for a in b) + ";"]
        out += [f"      wd[c][{k}] = " + " + ".join(f"x[c][{a}] * b{a}" for a in b) + ";", "    }", "  }"]
    return "\n".join([*out, "}"])


def generate_store(paths):
    out = ["DEV void store(float* y, const float (&a)[OUT], const float (&b)[OUT], int second) {"]
    for p in paths:
        for m in p.outputs():
            at = p.y + m * p.stride
            out += ["#if EVEN", f"  *(float2*)(y + {at}) = make_float2(a[{p.out + m}], b[{p.out + m}]);", "#else"]
            out += [f"  y[{at}] = a[{p.out + m}]; if (second) y[{at + 1}] = b[{p.out + m}];", "#endif"]
    return "\n".join([*out, "}"])


def count_groups(mul):
    return 4 if mul > 32 else 2 if mul > 16 else 1


def source(muls, muls_out, paths, lmax, width, exact, norm):
    """CUDA source of all kernels of one layer's shape, and the slabs that their grids run over.

    muls, muls_out: channels at l = 0, 1, ... of x and of the layer's result; paths: [(l3, l1, l2, cg)], cg a (2l1+1, 2l2+1,
    2l3+1) array, in the order of the weights; width: columns of `hidden`, a multiple of 64.
    """
    l_out = len(muls_out) - 1
    mid, column, columns, channel = [0] * (l_out + 1), 0, [], []
    for l3, l1, _, _ in paths:
        columns.append(column)
        channel.append(mid[l3])
        column += muls[l1]
        mid[l3] += muls[l1]
    y_off = np.cumsum([0, *[(2 * l + 1) * m for l, m in enumerate(mid)]]).tolist()
    x_off = np.cumsum([0, *[(2 * l + 1) * m for l, m in enumerate(muls)]]).tolist()
    code = [
        f"#define EXACT {int(exact)}\n#define K {width}\n#define SH {(lmax + 1) ** 2}\n#define XDIM {x_off[-1]}",
        f"#define YDIM {y_off[-1]}\n#define LMAX_IN {len(muls) - 1}\n#define WDIM {column}\n#define EVEN {int(all(m % 2 == 0 for m in muls))}",
        PRELUDE,
        ARGS,
    ]
    cases = {k: [] for k in BOUNDS if k != "weights"}
    weight_cases, slabs, units, slab = [], 0, 0, 0
    slots = max(WARPS // count_groups(m) for m in muls)  # partial sums of weight_grad, a block
    for l1 in reversed(range(len(muls))):  # long ones first
        mine, offset = [], 0
        for (l3, m, l2, cg), c in zip(paths, channel):
            if m == l1:
                mine.append(Coupling(len(mine), l1, l2, l3, cg, offset, y_off[l3] + c, mid[l3]))
                offset += 2 * l3 + 1
        at = [c for c, (_, m, _, _) in zip(columns, paths) if m == l1]
        generators = generate_message, generate_tangent, generate_message_back, generate_dual_back, generate_store
        octets = 2 if l1 == 0 and muls[l1] % 16 == 0 else 1  # a warp in `forward`: as the registers allow
        fill = dict(OCTETS=octets, L=l1, D1=2 * l1 + 1, NP=len(mine), OUT=offset, MUL=muls[l1], XOFF=x_off[l1], WARPS=WARPS)
        code.append(DEGREE.format(**fill, columns=", ".join(map(str, at)), functions="\n".join(g(mine) for g in generators)))
        n = -(-muls[l1] // (8 * WARPS))
        for k, lines in cases.items():
            lines.append(f"  if (slab < {slabs + n}) return L{l1}::{k}(A, (slab - {slabs}) * {8 * WARPS}, smem);")
        slabs += n
        slab = max(slab, min(WARPS, -(-muls[l1] // 8)) * len(mine) * width * 8)
        groups = count_groups(muls[l1])  # of 16 channels, that warps of a block divide
        for G, first in enumerate(range(0, len(mine), 2)):
            part = mine[first : first + 2]
            out = sum(2 * p.l3 + 1 for p in part)
            code.append(WEIGHTS.format(L=l1, G=G, NP=len(part), FIRST=first, OUT=out, functions=generate_weights(part), groups=groups, SLOTS=slots, WARPS=WARPS))
            n = -(-muls[l1] // (16 * groups))
            weight_cases.append((l1, G, units, n, 16 * groups))
            units += n
    for k, lines in cases.items():
        bound = BOUNDS[k]
        name = k.replace("<", "_").replace(">", "")
        code.append(f'extern "C" __global__ void __launch_bounds__({32 * WARPS}, {bound}) {name}(const Args A) {{')
        code.append("  extern __shared__ __align__(16) Hidden smem[];\n  const int slab = blockIdx.y;")
        code += [*lines, "}"]
    for dual in "false", "true":
        code.append(f'extern "C" __global__ void __launch_bounds__({32 * WARPS}, {BOUNDS["weights"]}) weight_grad_{dual}(const Args A) {{')
        code.append("  extern __shared__ __align__(16) Rows rows[];\n  const int unit = blockIdx.y;")
        for l1, G, start, n, channels in weight_cases:
            code.append(f"  if (unit < {start + n}) return L{l1}::G{G}::weight_grad<{dual}>(A, (unit - {start}) * {channels}, rows);")
        code.append("}")
    nodes, *dims = node_source(muls_out, norm)
    code.append(nodes)
    return "\n".join(code), slabs, units, slots, slab, dims


# ----------------------------------------------------------------------------------------------------------------------
# Compilation and launch


class Args(ctypes.Structure):
    POINTERS = "x xd sh shd rd w3 gy gyd hidden slope senders row_ptr out gx gsh gr gh gslope gw3".split()
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [("n_atoms", ctypes.c_int), ("chunk", ctypes.c_int)]


def check(status, what):
    if status:
        raise RuntimeError(f"{what} failed with CUDA error {status}")


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modded-nequix"


def load_nvrtc():
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    found = sorted(Path(torch.__file__).parents[1].glob(f"nvidia/*/lib/{name}"))  # pip's, off the loader's path
    return ctypes.CDLL(str(found[0]) if found else name)


def compile_cuda(code, capability):
    """CUDA C++ -> machine code, by the NVRTC that torch has loaded, once: it is kept in the user's cache folder.

    Raises RuntimeError with the compiler's log.
    """
    architecture = "sm_%d%d" % capability
    cache = cache_folder()
    file = cache / (hashlib.sha256((architecture + code).encode()).hexdigest()[:32] + ".cubin")
    if file.exists():
        return file.read_bytes()
    nvrtc, program, size = load_nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernels.cu", 0, None, None), "NVRTC")
    options = [b"--gpu-architecture=" + architecture.encode(), b"--std=c++17"]
    if nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "NVRTC")
    binary = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetCUBIN(program, binary), "NVRTC")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    with contextlib.suppress(OSError):  # a home that can't be written costs time, no more
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(binary.raw)
        part.replace(file)  # whole or not at all: other processes may be at it
    return binary.raw


class Elements(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "z grad out stored".split()] + [("n", ctypes.c_longlong)]


class Nodes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "v vd w g gd out outd gw".split()] + [("n_atoms", ctypes.c_int)]


class Kernels:
    """The compiled kernels of one layer's shape on one device. Arguments as `source`."""

    CONVOLUTIONS = "forward_false forward_true backward_0 backward_1 backward_2".split()
    WEIGHT_GRADS = "weight_grad_false weight_grad_true".split()
    OTHERS = "norm_gate_false norm_gate_true norm_gate_back_false norm_gate_back_true dual_silu dual_silu_back".split()

    def __init__(self, muls, muls_out, paths, lmax, width, exact, norm, device):
        code, self.slabs, self.units, self.slots, slab, dims = source(muls, muls_out, paths, lmax, width, exact, norm)
        self.v_dim, self.f_dim, self.n_weights = dims
        self.x_dim = sum((2 * l + 1) * m for l, m in enumerate(muls))
        self.y_dim = sum((2 * l3 + 1) * muls[l1] for l3, l1, _, _ in paths)
        self.w_dim = sum(muls[l1] for _, l1, _, _ in paths)
        self.sh_dim, self.width, self.exact = (lmax + 1) ** 2, width, exact
        rows = 128 + 2 * 8 * ((4 * self.sh_dim + 31) // 16 * 16 + width * (4 if exact else 2) + 16 + 64 * (2 * len(muls) - 1) + 16)
        self.shared = {name: slab * (5 if exact else 2) for name in self.CONVOLUTIONS}
        self.shared |= {name: 2 * WARPS * rows for name in self.WEIGHT_GRADS}
        self.device, self.cuda = device, ctypes.CDLL("libcuda.so.1")
        self.n_sm = torch.cuda.get_device_properties(device).multi_processor_count
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes torch's context the current one
            binary = compile_cuda(code, torch.cuda.get_device_capability(device))
            module = ctypes.c_void_p()
            check(self.cuda.cuModuleLoadData(ctypes.byref(module), binary), "loading the kernels")
        self.functions = {}
        for name in [*self.shared, *self.OTHERS]:
            f = self.functions[name] = ctypes.c_void_p()
            check(self.cuda.cuModuleGetFunction(ctypes.byref(f), module, name.encode()), name)
            if name in self.shared:
                check(self.cuda.cuFuncSetAttribute(f, 8, self.shared[name]), name)  # MAX_DYNAMIC_SHARED_SIZE_BYTES

    def launch(self, name, grid, arguments, threads=32 * WARPS, **tensors):
        args = arguments(**{k: v if isinstance(v, int) else v.data_ptr() for k, v in tensors.items() if v is not None})
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        shared = self.shared.get(name, 0)
        with torch.cuda.device(self.device):  # whose context must be the current one
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            check(self.cuda.cuLaunchKernel(self.functions[name], *grid, 1, threads, 1, 1, shared, stream, pointer, None), name)

    def grid(self, n_atoms, least, most):
        """Atoms a block: many blocks for a multiprocessor, but few enough that loading w3 does not show."""
        chunk = min(max(n_atoms * self.slabs // (16 * self.n_sm), least), most)
        return chunk, (-(-n_atoms // chunk), self.slabs)

    def stored(self, hidden):
        """As the kernels want it: float32, or float16, whose significand is TF32's."""
        return hidden.contiguous() if self.exact else hidden.half()

    def forward(self, name, out, x, sh, hidden, w3, senders, row_ptr, **tangents):
        n = len(x)
        if n:
            chunk, grid = self.grid(n, 1, 16)
            base = dict(x=x, sh=sh, hidden=hidden, w3=w3, senders=senders, row_ptr=row_ptr, n_atoms=n, chunk=chunk)
            self.launch(name, grid, Args, **base, out=out, **tangents)
        return out

    def backward(self, mode, x, sh, hidden, w3, senders, row_ptr, gy, **tensors):
        """Adds to the gradients given, what `mode` of the kernel says: gx, gsh, gr; gx, gsh, gh; gx, gh, gslope."""
        n = len(x)
        if n and len(senders):
            chunk, grid = self.grid(n, 1, 8)
            chunk, grid = WARPS * chunk, (-(-grid[0] // WARPS), grid[1])
            base = dict(x=x, sh=sh, hidden=hidden, w3=w3, senders=senders, row_ptr=row_ptr, n_atoms=n, chunk=chunk)
            self.launch(f"backward_{mode}", grid, Args, **base, gy=gy, **tensors)

    def weight_grad(self, x, sh, hidden, senders, row_ptr, gy, **tangents):
        n = len(x)
        blocks = min(-(-6 * self.n_sm // self.units), max(n // WARPS, 1))
        chunk = -(-n // (blocks * WARPS)) * WARPS
        part = x.new_zeros(blocks * self.slots, self.width, self.w_dim)
        if n and len(senders):
            base = dict(x=x, sh=sh, hidden=hidden, senders=senders, row_ptr=row_ptr, n_atoms=n, chunk=chunk)
            kind = "true" if tangents else "false"
            self.launch(f"weight_grad_{kind}", (blocks, self.units), Args, **base, gy=gy, **tangents, gw3=part)
        return part.sum(0)

    def dual_silu(self, z, last):
        """z (2, E, K): values and tangents; the last layer's result is what the convolution reads."""
        out = z.new_empty(z.shape, dtype=torch.float32 if self.exact or not last else torch.float16)
        if z.numel():
            self.launch("dual_silu", (16 * self.n_sm, 1), Elements, 256, z=z, n=z.numel() // 2, **{"stored" if last else "out": out})
        return out

    def dual_silu_back(self, z, grad):
        out = torch.empty_like(z)
        if z.numel():
            self.launch("dual_silu_back", (16 * self.n_sm, 1), Elements, 256, z=z, grad=grad, out=out, n=z.numel() // 2)
        return out

    def radial(self, basis, weights):
        """Radial MLP with tangents: basis (2, E, B) -> hidden (2, E, K), and what its backward needs."""
        z, a, saved = None, basis, []
        for i, w in enumerate(weights):
            z = (a.view(-1, a.shape[-1]) @ w).view(*a.shape[:-1], -1)
            saved.append((a, z))
            a = self.dual_silu(z, i == len(weights) - 1)
        return a, saved

    def radial_back(self, grad, weights, saved):
        """-> gradients of the weights; grad (2, E, K)"""
        out = []
        for i in reversed(range(len(weights))):
            a, z = saved[i]
            gz = self.dual_silu_back(z, grad)
            gz = gz.view(-1, gz.shape[-1])
            out.insert(0, a.view(-1, a.shape[-1]).T @ gz)
            grad = (gz @ weights[i].T).view(*a.shape) if i else None
        return out


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
        n_atoms, n_edges = len(row_ptr) - 1, len(senders)
        shapes = (n_atoms, k.x_dim), (n_edges, k.sh_dim), (n_edges, k.width), (k.width, k.w_dim)
        for t, shape, name in zip((x, sh, hidden, w3), shapes, ("x", "sh", "hidden", "w3")):
            if t.shape != shape or t.dtype != torch.float32 or not t.is_cuda:
                raise ValueError(f"{name} should be {shape} float32 on CUDA, not {tuple(t.shape)} {t.dtype} on {t.device}")
        x, sh, w3, senders, row_ptr = (t.contiguous() for t in (x, sh, w3, senders, row_ptr))
        ctx.k, hidden = k, k.stored(hidden)
        ctx.save_for_backward(x, sh, hidden, w3, senders, row_ptr)
        return k.forward("forward_false", x.new_empty(len(x), k.y_dim), x, sh, hidden, w3, senders, row_ptr)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, sh, hidden, w3, senders, row_ptr = ctx.saved_tensors
        gx, gsh, gh, gy = torch.zeros_like(x), torch.zeros_like(sh), sh.new_zeros(hidden.shape), gy.contiguous()
        ctx.k.backward(1, x, sh, hidden, w3, senders, row_ptr, gy, gx=gx, gsh=gsh, gh=gh)
        return None, gx, gsh, gh, ctx.k.weight_grad(x, sh, hidden, senders, row_ptr, gy), None, None


class ForceConv(torch.autograd.Function):
    """The convolution as a function of x, sh and r, hidden[1] being d hidden[0] / dr. Writes to `out`, and returns it; its
    gradient by x goes to `gx`."""

    @staticmethod
    def forward(ctx, k, x, sh, r, hidden, w3, senders, row_ptr, out, gx):
        ctx.k, ctx.gx = k, gx
        ctx.save_for_backward(x, sh, hidden, w3, senders, row_ptr)
        return k.forward("forward_false", out, x, sh, hidden[0], w3, senders, row_ptr)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, sh, hidden, w3, senders, row_ptr = ctx.saved_tensors
        gx = ctx.gx.zero_() if ctx.needs_input_grad[1] else None
        gsh, gr = torch.zeros_like(sh), sh.new_zeros(len(sh))
        ctx.k.backward(0, x, sh, hidden[0], w3, senders, row_ptr, gy.contiguous(), slope=hidden[1], gx=gx, gsh=gsh, gr=gr)
        return None, gx, gsh, gr, None, None, None, None, None, None


class DualConv(torch.autograd.Function):
    """The convolution and its tangent as a function of x (2A, ...) and the weights. `out` has the values already, and `gx` the
    gradient by the tangent of x: it is that of ForceConv, the energy's derivative being what its tangent is linear in."""

    @staticmethod
    def forward(ctx, k, geometry, hidden, saved, out, gx, x, w3, *inner):
        senders, row_ptr, sh, shd, rd = geometry
        n = len(x) // 2
        ctx.k, ctx.geometry, ctx.saved, ctx.inner, ctx.gx = k, geometry, saved, inner, gx
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
        return None, None, None, None, None, None, gx, gw3, *k.radial_back(gh, ctx.inner, ctx.saved)


def degree(x, muls, l):
    """Degree l of flat features as a batch of matrices (2l+1, rows, mul), in place."""
    start = sum((2 * i + 1) * m for i, m in enumerate(muls[:l]))
    return x.as_strided((2 * l + 1, len(x), muls[l]), (muls[l], x.stride(0), 1), x.storage_offset() + start)


class Linear(torch.autograd.Function):
    """The sum of linear maps, degree by degree, of features xs with channels muls_in to channels muls_out."""

    @staticmethod
    def forward(ctx, muls_out, muls_in, *tensors):
        xs, weights = tensors[: len(muls_in)], list(tensors[len(muls_in) :])
        out = xs[0].new_empty(len(xs[0]), sum((2 * l + 1) * m for l, m in enumerate(muls_out)))
        ctx.muls_out, ctx.muls_in = muls_out, muls_in
        ctx.save_for_backward(*tensors)
        for i, (x, muls) in enumerate(zip(xs, muls_in)):
            for l in range(min(len(muls), len(muls_out))):
                w, y = weights.pop(0), degree(out, muls_out, l)
                w = (w * muls[l] ** -0.5).expand(2 * l + 1, -1, -1)
                torch.bmm(degree(x, muls, l), w, out=y) if i == 0 else y.baddbmm_(degree(x, muls, l), w)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        n = len(ctx.muls_in)
        xs, weights, g = ctx.saved_tensors[:n], list(ctx.saved_tensors[n:]), g.contiguous()
        need = list(ctx.needs_input_grad[2:])
        gxs, gws = [], []
        for x, muls, need_x in zip(xs, ctx.muls_in, need):
            common = min(len(muls), len(ctx.muls_out))
            gx = (torch.empty_like if common == len(muls) else torch.zeros_like)(x) if need_x else None
            for l in range(common):
                w, gy = weights.pop(0), degree(g, ctx.muls_out, l)
                if need_x:
                    torch.bmm(gy, (w.T * muls[l] ** -0.5).expand(2 * l + 1, -1, -1), out=degree(gx, muls, l))
                if need[n + len(gws)]:
                    gw = degree(x, muls, l).reshape(-1, muls[l]).T @ gy.reshape(-1, gy.shape[2])
                gws.append(gw * muls[l] ** -0.5 if need[n + len(gws)] else None)
            gxs.append(gx)
        return None, None, *gxs, *gws


class NormGate(torch.autograd.Function):
    """RMSNorm, then gate, of v (A or 2A, ...); `weights`: all channels'."""

    @staticmethod
    def forward(ctx, k, dual, v, weights):
        n = len(v) // (1 + dual)
        out = v.new_empty(len(v), k.f_dim)
        ctx.k, ctx.dual = k, dual
        ctx.save_for_backward(v, weights)
        if n:
            tangents = dict(vd=v[n:], outd=out[n:]) if dual else {}
            name = f"norm_gate_{str(dual).lower()}"
            k.launch(name, (-(-n // WARPS), 1), Nodes, v=v, w=weights, out=out, n_atoms=n, **tangents)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        v, weights = ctx.saved_tensors
        k, dual, n, g = ctx.k, ctx.dual, len(v) // (1 + ctx.dual), g.contiguous()
        out, blocks = torch.empty_like(v), 8 * ctx.k.n_sm
        gw = v.new_empty(blocks * WARPS, k.n_weights)
        tangents = dict(vd=v[n:], outd=out[n:], gd=g[n:]) if dual else {}
        name = f"norm_gate_back_{str(dual).lower()}"
        k.launch(name, (blocks, 1), Nodes, v=v, w=weights, g=g, out=out, gw=gw, n_atoms=n, **tangents)
        return None, None, out, gw.sum(0) if ctx.needs_input_grad[3] else None
