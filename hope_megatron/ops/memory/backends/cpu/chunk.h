// A chunk of HOPE's own memories, for one head of one sequence: forward, and what backward needs of it.
//
// The same computation as backends/manual/forward.py, whose names it keeps; README.md has the formulas. Memories are ordered mem, k, v, eta,
// alpha. What every memory has per hidden unit lies in one row per token, [C, 5 h] ("wide"), so that the input layers of all
// five are one matrix [5 h, d], one product and one triangular system; the vector memories' outputs lie in [C, 3 d].
#pragma once

#include <memory>
#include <new>

#include "products.h"

namespace hope {

constexpr int kMemories = 5, kVector = 3, kScalar = 2;
constexpr float kEpsilonSquared = 1e-12f;  // of inner.py's EPSILON

struct Shape {
  int32_t sequences, heads, tokens, d, h, chunk, segment_chunks, threads;
  int32_t residual, read_skip, anchored, writes_in;
  float eta_max;

  int chunks() const { return tokens / chunk; }
  int streams() const { return sequences * heads; }
  // Where the first token of a stream's chunk i lies among the rows of [B, T, H]; its next token lies `heads` rows further.
  int64_t row(int64_t stream, int i) const {
    return (stream / heads * tokens + int64_t(i) * chunk) * heads + stream % heads;
  }
  int wide() const { return kMemories * h; }
  int ld() const { return (chunk + 15) / 16 * 16; }
  // Where the weights that are written begin: input layers come first.
  int64_t first_written() const { return writes_in ? 0 : int64_t(kMemories) * h * d; }
  // Of the systems that are solved: 0 is that of the input layers.
  int first_system() const { return writes_in ? 0 : 1; }
  int64_t weights() const { return int64_t(kMemories + kVector) * h * d + kScalar * h; }
};

// The weights of one stream, in one block: input layers [5 h, d], output layers [3, d, h], scalar output layers [2, h].
struct Weights {
  float* in;
  float* vectors;
  float* scalars;
  int h, d;

  Weights(float* block, const Shape& s)
      : in(block), vectors(block + kMemories * s.h * s.d), scalars(vectors + kVector * s.d * s.h), h(s.h), d(s.d) {}
  float* in_of(int memory) const { return in + memory * h * d; }
  float* vector(int i) const { return vectors + i * d * h; }
  float* scalar(int j) const { return scalars + j * h; }
};

// Hands out pieces of one allocation, each at a cache line's start.
class Arena {
 public:
  // Begin anew, with room for this much.
  Arena& reserve(int64_t floats) {
    if (floats > size_) {
      block_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kAlign)));
      size_ = floats;
    }
    used_ = 0;
    return *this;
  }
  float* take(int64_t floats) {
    float* found = block_ ? block_.get() + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;
    return found;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<float, Free> block_;
  int64_t size_ = 0, used_ = 0;
};

// The inputs of a chunk, gathered from [B, T, H, d] and [B, T, H]; or gradients, to be scattered there.
struct Inputs {
  float *q, *x_k, *x_v;  // [C, d]
  float *eta, *alpha;    // logits, [C]

  Inputs(const Shape& s, Arena& arena)
      : q(arena.take(s.chunk * s.d)), x_k(arena.take(s.chunk * s.d)), x_v(arena.take(s.chunk * s.d)),
        eta(arena.take(s.chunk)), alpha(arena.take(s.chunk)) {}
};

// [C, width] from every `heads`-th row, starting with row `first`.
static inline void gather(const Shape& s, const float* from, int64_t first, int width, float* to) {
  for (int t = 0; t < s.chunk; ++t) {
    const float* row = from + (first + int64_t(t) * s.heads) * width;
    std::copy(row, row + width, to + t * width);
  }
}

static inline void scatter(const Shape& s, const float* from, float* to, int64_t first, int width) {
  for (int t = 0; t < s.chunk; ++t)
    std::copy(from + t * width, from + (t + 1) * width, to + (first + int64_t(t) * s.heads) * width);
}

// 1 / |x| as `unit` has it; x is scaled in place.
static inline float make_unit(float* x, int n) {
  const float scale = 1.0f / std::sqrt(dot(x, x, n) + kEpsilonSquared);
  set_scaled(x, x, scale, n);
  return scale;
}

class Chunk {
 public:
  Chunk(const Shape& s, Arena& arena) : in(s, arena), s(s), C(s.chunk), d(s.d), h(s.h), wide(s.wide()), ld(s.ld()) {
    const auto per_hidden = [&] { return arena.take(int64_t(C) * wide); };
    const auto per_output = [&] { return arena.take(int64_t(C) * kVector * d); };
    const auto per_token = [&] { return arena.take(C); };
    z_x = per_hidden(), phi_x = per_hidden(), keys = per_hidden();
    z_k = arena.take(int64_t(2 * C) * wide), z_v = z_k + int64_t(C) * wide;
    phi_v = per_hidden(), delta = per_hidden(), drive = per_hidden(), rows_in = per_hidden();
    initial_in = per_hidden();
    const int64_t widest = std::max(wide, kVector * d);
    reached = arena.take(C * widest);
    kv = arena.take(2 * C * d);
    target = per_output(), error = per_output(), held = per_output(), rows_vector = per_output();
    initial_vector = per_output();
    q_scale = per_token(), kv_scale = arena.take(2 * C);
    keys_scale = arena.take(kMemories * C), target_scale = arena.take(kVector * C);
    eta = per_token(), log_alpha = per_token(), total = per_token(), gamma = per_token(), gamma_prev = per_token();
    error_scalar = arena.take(kScalar * C), held_scalar = arena.take(kScalar * C);
    rows_scalar = arena.take(kScalar * C), initial_scalar = arena.take(kScalar * C);
    Gamma = arena.take((C + 1) * ld) + ld;
    grams = arena.take((1 + kMemories) * C * ld), system = arena.take((1 + kMemories) * C * ld);
    scores = arena.take(C * ld), scores_out = arena.take(C * ld), decayed = arena.take(C * ld);
    hidden = arena.take(C * h), phi_q = arena.take(C * h), initial_x = arena.take(C * h);
    held_q = arena.take(C * d), initial_q = arena.take(C * d);
    scratch = arena.take(widest * std::max(d, ld));
  }

  // What the chunk (`in`) writes into the weights `w`, as they stand at its start. anchor: what retention forgets towards.
  void write(const Weights& w, const Weights* anchor) {
    generate(w);
    decay();
    features(w);
    errors(w);
    if (anchor) initial(*anchor);
    solve_rows();
  }

  // y_t = M_t(q_t) [C, d]
  void read(const Weights& w, const Weights* anchor, float* y) {
    if (s.writes_in)
      read_input(anchor);
    else
      for (int t = 0; t < C; ++t) std::copy(z_x + t * wide, z_x + t * wide + h, hidden + t * h);
    for (int i = 0; i < C * h; i += kLanes) store(phi_q + i, silu(load(hidden + i)));

    lower_bt(C, h, phi_q, h, keys, wide, scores_out, ld, scratch);
    mm_bt(Into::Set, C, d, h, phi_q, h, w.vector(0), h, held_q, d, scratch);
    if (anchor) mm_bt(Into::Set, C, d, h, phi_q, h, anchor->vector(0), h, initial_q, d, scratch);
    for (int t = 0; t < C; ++t)
      for (int i = t * d; i < (t + 1) * d; i += kLanes) {
        Vec x = gamma[t] * load(held_q + i);
        if (anchor) x += (1 - gamma[t]) * load(initial_q + i);
        if (s.read_skip) x += load(in.q + i);
        store(y + i, x);
      }
    decay_table(scores_out);
    lower_mm(Into::Subtract, C, d, decayed, ld, rows_vector, kVector * d, y, d);
  }

  // The weights after the last token, in place.
  void end(const Weights& w, const Weights* anchor) {
    const float kept = gamma[C - 1];
    for (int64_t i = s.first_written(); i < s.weights(); i += kLanes) {
      Vec x = kept * load(w.in + i);
      if (anchor) x += (1 - kept) * load(anchor->in + i);
      store(w.in + i, x);
    }
    if (s.writes_in) {
      reach(rows_in, wide);
      mm_at(Into::Subtract, wide, d, C, reached, wide, k(), d, w.in, d);
    }
    reach(rows_vector, kVector * d);
    for (int m = 0; m < kVector; ++m)
      mm_at(Into::Subtract, d, h, C, reached + m * d, kVector * d, keys + m * h, wide, w.vector(m), h);
    for (int j = 0; j < kScalar; ++j)
      for (int t = 0; t < C; ++t)
        add_scaled(w.scalar(j), keys_of(kVector + j, t), -reach_of(t) * rows_scalar[j * C + t], h);
  }

  const float* k() const { return kv; }
  const float* v() const { return kv + C * d; }
  const float* keys_of(int memory, int t) const { return keys + t * wide + memory * h; }
  const float* gamma_row(int t) const { return Gamma + t * ld; }
  // Gamma a token back: strictly lower; row 0 is zero.
  const float* gamma_prev_row(int t) const { return Gamma + (t - 1) * ld; }
  // How much of what token t writes is left at the chunk's end.
  float reach_of(int t) const { return Gamma[(C - 1) * ld + t]; }

  // reached = Gamma_C rows, [C, n]
  void reach(const float* rows, int n) {
    for (int t = 0; t < C; ++t) set_scaled(reached + t * n, rows + t * n, reach_of(t), n);
  }

  // decayed = Gamma table, zero above the diagonal
  void decay_table(const float* table) {
    for (int t = 0; t < C; ++t)
      for (int j = 0; j < t / 16 * 16 + 16; j += kLanes)
        store(decayed + t * ld + j, load(gamma_row(t) + j) * load(table + t * ld + j));
  }

  Inputs in;
  const Shape s;
  const int C, d, h, wide, ld;
  // [C, 5 h]; z_k and z_v follow each other, and so do k and v
  float *z_x, *phi_x, *z_k, *z_v, *keys, *phi_v, *delta, *drive, *rows_in, *reached, *initial_in;
  float *kv, *q_scale, *kv_scale, *keys_scale, *target_scale;            // [2 C, d], [C], [2 C], [C, 5], [C, 3]
  float *target, *error, *held, *rows_vector, *initial_vector;           // [C, 3 d]
  float *eta, *log_alpha, *total, *gamma, *gamma_prev;                   // [C]
  float *error_scalar, *held_scalar, *rows_scalar, *initial_scalar;      // [2, C]
  float *Gamma, *grams, *system, *scores, *scores_out, *decayed;         // [C, ld]; grams, system: of k, then of the keys of each
  float *hidden, *phi_q, *initial_x, *held_q, *initial_q;                // [C, h] and [C, d], of the read
  float* scratch;

 private:
  // What the input layer of M_mem, as written so far, makes of the queries.
  void read_input(const Weights* anchor) {
    lower_bt(C, d, in.q, d, k(), d, scores, ld, scratch);
    if (anchor) mm_bt(Into::Set, C, h, d, in.q, d, anchor->in, d, initial_x, h, scratch);
    for (int t = 0; t < C; ++t)
      for (int i = 0; i < h; i += kLanes) {
        Vec x = gamma[t] * load(z_x + t * wide + i);
        if (anchor) x += (1 - gamma[t]) * load(initial_x + t * h + i);
        store(hidden + t * h + i, x);
      }
    decay_table(scores);
    lower_mm(Into::Subtract, C, h, decayed, ld, rows_in, wide, hidden, h);
  }

  // Keys, values and rates, by the memories at the chunk's start (eqs. 86-87). Queries become of unit length where they lie.
  void generate(const Weights& w) {
    for (int t = 0; t < C; ++t) q_scale[t] = make_unit(in.q + t * d, d);
    const struct { int memory, count; const float* x; } applied[] = {{0, 1, in.q}, {1, 1, in.x_k}, {2, 1, in.x_v}, {3, 2, in.x_k}};
    for (const auto& a : applied)
      mm_bt(Into::Set, C, a.count * h, d, a.x, d, w.in_of(a.memory), d, z_x + a.memory * h, wide, scratch);
    for (int t = 0; t < C; ++t)
      for (int i = t * wide + h; i < (t + 1) * wide; i += kLanes) store(phi_x + i, silu(load(z_x + i)));
    std::copy(in.x_k, in.x_k + C * d, kv);
    std::copy(in.x_v, in.x_v + C * d, kv + C * d);
    mm_bt(Into::Add, C, d, h, phi_x + h, wide, w.vector(1), h, kv, d, scratch);
    mm_bt(Into::Add, C, d, h, phi_x + 2 * h, wide, w.vector(2), h, kv + C * d, d, scratch);
    for (int t = 0; t < 2 * C; ++t) kv_scale[t] = make_unit(kv + t * d, d);
    for (int t = 0; t < C; ++t) {
      const float rate = in.eta[t] + dot(phi_x + t * wide + 3 * h, w.scalar(0), h);
      const float kept = in.alpha[t] + dot(phi_x + t * wide + 4 * h, w.scalar(1), h);
      eta[t] = s.eta_max / (1 + std::exp(-rate));
      log_alpha[t] = (kept < 0 ? kept : 0) - std::log1p(std::exp(-std::fabs(kept)));
    }
  }

  void decay() {
    for (int t = 0; t < C; ++t) {
      total[t] = log_alpha[t] + (t ? total[t - 1] : 0);
      gamma[t] = std::exp(total[t]);
      gamma_prev[t] = t ? gamma[t - 1] : 1;
    }
    std::fill(Gamma - ld, Gamma + C * ld, 0.0f);
    for (int t = 0; t < C; ++t) {
      float* row = Gamma + t * ld;
      for (int j = 0; j <= t; ++j) row[j] = total[t] - total[j];
      for (int j = 0; j <= t; j += kLanes) store(row + j, exp(load(row + j)));
      std::fill(row + t + 1, row + ld, 0.0f);
    }
  }

  // z, phi and unit keys of the chunk's keys and values.
  void features(const Weights& w) {
    mm_bt(Into::Set, 2 * C, wide, d, kv, d, w.in, d, z_k, wide, scratch);
    for (int i = 0; i < C * wide; i += kLanes) {
      store(keys + i, silu(load(z_k + i)));
      store(phi_v + i, silu(load(z_v + i)));
    }
    for (int t = 0; t < C; ++t)
      for (int m = 0; m < kMemories; ++m) keys_scale[t * kMemories + m] = make_unit(keys + t * wide + m * h, h);
  }

  // Errors at the memories' own targets, carried to the hidden layer; and what the output layers hold at the keys.
  void errors(const Weights& w) {
    const int n = kVector * d;
    for (int t = 0; t < C; ++t)
      for (int m = 0; m < kVector; ++m) std::copy(v() + t * d, v() + (t + 1) * d, target + t * n + m * d);
    for (int m = 0; m < kVector; ++m) {
      mm_bt(Into::Add, C, d, h, phi_v + m * h, wide, w.vector(m), h, target + m * d, n, scratch);
      mm_bt(Into::Set, C, d, h, keys + m * h, wide, w.vector(m), h, held + m * d, n, scratch);
      for (int t = 0; t < C; ++t) {
        float* own = target + t * n + m * d;
        target_scale[t * kVector + m] = make_unit(own, d);
        for (int i = 0; i < d; i += kLanes) {
          const Vec goal = load(own + i);
          store(error + t * n + m * d + i, s.residual ? load(k() + t * d + i) - goal : -goal);
        }
      }
      if (s.writes_in) mm(Into::Set, C, h, d, error + m * d, n, w.vector(m), h, delta + m * h, wide);
    }
    for (int j = 0; j < kScalar; ++j)
      for (int t = 0; t < C; ++t) {
        const int at = t * wide + (kVector + j) * h;
        held_scalar[j * C + t] = dot(keys + at, w.scalar(j), h);
        error_scalar[j * C + t] = -std::tanh(dot(phi_v + at, w.scalar(j), h));
        if (s.writes_in) set_scaled(delta + at, w.scalar(j), error_scalar[j * C + t], h);
      }
    if (!s.writes_in) return;
    for (int i = 0; i < C * wide; i += kLanes) store(drive + i, load(delta + i) * silu_slope(load(z_k + i)));
  }

  // What the learned initial state answers to the keys.
  void initial(const Weights& a) {
    if (s.writes_in) mm_bt(Into::Set, C, wide, d, k(), d, a.in, d, initial_in, wide, scratch);
    for (int m = 0; m < kVector; ++m)
      mm_bt(Into::Set, C, d, h, keys + m * h, wide, a.vector(m), h, initial_vector + m * d, kVector * d, scratch);
    for (int j = 0; j < kScalar; ++j)
      for (int t = 0; t < C; ++t) initial_scalar[j * C + t] = dot(keys_of(kVector + j, t), a.scalar(j), h);
  }

  // rows = (I + L)^-1 eta (gradient + gamma_prev held + (1 - gamma_prev) initial), L = eta Gamma_prev gram
  void solve_rows() {
    for (int g = s.first_system(); g <= kMemories; ++g) {
      float *gram = grams + g * C * ld, *L = system + g * C * ld;
      const float* x = g ? keys + (g - 1) * h : k();
      lower_bt(C, g ? h : d, x, g ? wide : d, x, g ? wide : d, gram, ld, scratch);
      for (int t = 0; t < C; ++t)
        for (int j = 0; j < t / 16 * 16 + 16; j += kLanes)
          store(L + t * ld + j, eta[t] * load(gamma_prev_row(t) + j) * load(gram + t * ld + j));
    }
    for (int t = 0; t < C; ++t) {
      if (s.writes_in) right(t, wide, drive, z_k, initial_in, rows_in);
      right(t, kVector * d, error, held, initial_vector, rows_vector);
      for (int j = 0; j < kScalar; ++j) {
        const int at = j * C + t;
        float x = error_scalar[at] + gamma_prev[t] * held_scalar[at];
        if (s.anchored) x += (1 - gamma_prev[t]) * initial_scalar[at];
        rows_scalar[at] = eta[t] * x;
      }
    }
    if (s.writes_in) solve(C, wide, system, ld, rows_in, wide);
    for (int m = 0; m < kVector; ++m) solve(C, d, system + (1 + m) * C * ld, ld, rows_vector + m * d, kVector * d);
    for (int j = 0; j < kScalar; ++j) solve_one(C, system + (1 + kVector + j) * C * ld, ld, rows_scalar + j * C);
  }

  void right(int t, int n, const float* gradient, const float* held_, const float* initial_, float* rows) {
    for (int i = t * n; i < (t + 1) * n; i += kLanes) {
      Vec x = load(gradient + i) + gamma_prev[t] * load(held_ + i);
      if (s.anchored) x += (1 - gamma_prev[t]) * load(initial_ + i);
      store(rows + i, eta[t] * x);
    }
  }
};

}  // namespace hope
