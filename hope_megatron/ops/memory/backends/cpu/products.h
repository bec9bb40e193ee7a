// Products of small matrices that stay in the caches, and the triangular systems of a chunk. Row-major throughout.
//
// A tile of kTileRows x 2 vectors of the result is held in registers. Operands are read where they lie; only the second
// one of A B^T is transposed first. Column counts are multiples of 16.
#pragma once

#include <algorithm>

#include "vector.h"

namespace hope {

enum class Into { Set, Add, Subtract };

// R rows and V vectors of the result; kAcross: A is stored [K, M] instead of [M, K].
template <int R, int V, bool kAcross>
static inline void tile(int K, const float* A, int lda, const float* B, int ldb, float* C, int ldc, Into into) {
  Vec acc[R][V] = {};
  for (int k = 0; k < K; ++k) {
    Vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = load(B + k * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float a = kAcross ? A[k * lda + r] : A[r * lda + k];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += a * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* c = C + r * ldc + v * kLanes;
      if (into == Into::Set) store(c, acc[r][v]);
      if (into == Into::Add) store(c, load(c) + acc[r][v]);
      if (into == Into::Subtract) store(c, load(c) - acc[r][v]);
    }
  }
}

template <int R, int V, bool kAcross>
static inline void last_tile(int rows, int K, const float* A, int lda, const float* B, int ldb, float* C, int ldc, Into into) {
  if constexpr (R > 0) {
    if (rows == R) return tile<R, V, kAcross>(K, A, lda, B, ldb, C, ldc, into);
    last_tile<R - 1, V, kAcross>(rows, K, A, lda, B, ldb, C, ldc, into);
  }
}

template <int V, bool kAcross>
static void panel(int M, int K, const float* A, int lda, const float* B, int ldb, float* C, int ldc, Into into) {
  int i = 0;
  const int step = kAcross ? 1 : lda;
  for (; i + kTileRows <= M; i += kTileRows)
    tile<kTileRows, V, kAcross>(K, A + i * step, lda, B, ldb, C + i * ldc, ldc, into);
  last_tile<kTileRows - 1, V, kAcross>(M - i, K, A + i * step, lda, B, ldb, C + i * ldc, ldc, into);
}

template <bool kAcross>
static void product(Into into, int M, int N, int K, const float* A, int lda, const float* B, int ldb, float* C, int ldc) {
  int j = 0;
  for (; j + 2 * kLanes <= N; j += 2 * kLanes) panel<2, kAcross>(M, K, A, lda, B + j, ldb, C + j, ldc, into);
  for (; j < N; j += kLanes) panel<1, kAcross>(M, K, A, lda, B + j, ldb, C + j, ldc, into);
}

// C = A B: A [M, K], B [K, N]
static void mm(Into into, int M, int N, int K, const float* A, int lda, const float* B, int ldb, float* C, int ldc) {
  product<false>(into, M, N, K, A, lda, B, ldb, C, ldc);
}

// C = A^T B: A [K, M], B [K, N]
static void mm_at(Into into, int M, int N, int K, const float* A, int lda, const float* B, int ldb, float* C, int ldc) {
  product<true>(into, M, N, K, A, lda, B, ldb, C, ldc);
}

// out [cols, ld] = x^T for x [rows, cols]; zero where ld goes beyond rows
static void transpose(int rows, int cols, const float* x, int ldx, float* out, int ld) {
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < cols; ++j)
      for (int r = i; r < std::min(i + 16, rows); ++r) out[j * ld + r] = x[r * ldx + j];
  for (int j = 0; j < cols && ld > rows; ++j) std::fill(out + j * ld + rows, out + (j + 1) * ld, 0.0f);
}

// Below this many rows a transposed operand would cost more than the product.
constexpr int kFewRows = 4;

static void few_rows_bt(Into into, int M, int N, int K, const float* A, int lda, const float* B, int ldb, float* C, int ldc) {
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      const float x = dot(A + i * lda, B + j * ldb, K);
      float* c = C + i * ldc + j;
      *c = into == Into::Set ? x : into == Into::Add ? *c + x : *c - x;
    }
}

// C = A B^T: A [M, K], B [N, K]; K a multiple of 16 too. scratch: K N floats.
static void mm_bt(Into into, int M, int N, int K, const float* A, int lda, const float* B, int ldb, float* C, int ldc,
                  float* scratch) {
  if (M < kFewRows) return few_rows_bt(into, M, N, K, A, lda, B, ldb, C, ldc);
  transpose(N, K, B, ldb, scratch, N);
  mm(into, M, N, K, A, lda, scratch, N, C, ldc);
}

// Tables of a chunk are [C, ld] with ld the next multiple of 16, and nothing but the lower triangle (with its diagonal) is
// meant. Their products skip what is zero in blocks of 16 rows.

constexpr int kBlock = 16;

// table = lower(A B^T): A, B [C, K]. Entries above the diagonal, in its block, are whatever the product is.
static void lower_bt(int C, int K, const float* A, int lda, const float* B, int ldb, float* table, int ld, float* scratch) {
  if (C < kFewRows) {
    std::fill(table, table + C * ld, 0.0f);
    return few_rows_bt(Into::Set, C, C, K, A, lda, B, ldb, table, ld);
  }
  transpose(C, K, B, ldb, scratch, ld);
  for (int i = 0; i < C; i += kBlock) {
    const int rows = std::min(kBlock, C - i);
    mm(Into::Set, rows, i + kBlock, K, A + i * lda, lda, scratch, ld, table + i * ld, ld);
  }
}

// out [C, N] (+)= table B
static void lower_mm(Into into, int C, int N, const float* table, int ld, const float* B, int ldb, float* out, int ldo) {
  for (int i = 0; i < C; i += kBlock) {
    const int rows = std::min(kBlock, C - i);
    mm(into, rows, N, i + rows, table + i * ld, ld, B, ldb, out + i * ldo, ldo);
  }
}

// out [C, N] (+)= table^T B
static void lower_mm_at(Into into, int C, int N, const float* table, int ld, const float* B, int ldb, float* out, int ldo) {
  for (int i = 0; i < C; i += kBlock) {
    const int rows = std::min(kBlock, C - i);
    mm_at(into, rows, N, C - i, table + i * ld + i, ld, B + i * ldb, ldb, out + i * ldo, ldo);
  }
}

// x [C, N] <- (I + L)^-1 x for strictly lower L
static void solve(int C, int N, const float* L, int ld, float* x, int ldx) {
  for (int b = 0; b < C; b += kBlock) {
    const int rows = std::min(kBlock, C - b);
    if (b) mm(Into::Subtract, rows, N, b, L + b * ld, ld, x, ldx, x + b * ldx, ldx);
    for (int i = b + 1; i < b + rows; ++i)
      for (int s = b; s < i; ++s) add_scaled(x + i * ldx, x + s * ldx, -L[i * ld + s], N);
  }
}

// x [C, N] <- (I + L)^-T x
static void solve_transposed(int C, int N, const float* L, int ld, float* x, int ldx) {
  for (int b = (C - 1) / kBlock * kBlock; b >= 0; b -= kBlock) {
    const int rows = std::min(kBlock, C - b), done = b + rows;
    if (done < C)
      mm_at(Into::Subtract, rows, N, C - done, L + done * ld + b, ld, x + done * ldx, ldx, x + b * ldx, ldx);
    for (int i = done - 2; i >= b; --i)
      for (int s = i + 1; s < done; ++s) add_scaled(x + i * ldx, x + s * ldx, -L[s * ld + i], N);
  }
}

// The same for one column.
static void solve_one(int C, const float* L, int ld, float* x) {
  for (int t = 1; t < C; ++t)
    for (int s = 0; s < t; ++s) x[t] -= L[t * ld + s] * x[s];
}

static void solve_one_transposed(int C, const float* L, int ld, float* x) {
  for (int t = C - 1; t > 0; --t)
    for (int s = 0; s < t; ++s) x[s] -= L[t * ld + s] * x[t];
}

}  // namespace hope
