// The backward of chunk.h: every line of its forward in reverse order, as backends/manual/backward.py has it. d_x is the gradient of x.
#pragma once

#include "chunk.h"

namespace hope {

// Gradient of x for y = unit(x) = scale x, added to `out` or put into it.
static inline void unit_backward(const float* d_y, const float* y, float scale, float* out, int n, bool add) {
  const float along = dot(y, d_y, n);
  for (int i = 0; i < n; i += kLanes) {
    const Vec d_x = scale * (load(d_y + i) - along * load(y + i));
    store(out + i, add ? load(out + i) + d_x : d_x);
  }
}

class ChunkBackward {
 public:
  ChunkBackward(const Shape& s, Arena& arena, const Chunk& t) : s(s), t(t), C(s.chunk), d(s.d), h(s.h), wide(t.wide), ld(t.ld), n(kVector * s.d) {
    const auto per_hidden = [&] { return arena.take(int64_t(C) * wide); };
    const auto per_output = [&] { return arena.take(int64_t(C) * n); };
    const auto per_token = [&] { return arena.take(C); };
    d_rows_in = per_hidden(), d_keys = per_hidden(), d_delta = per_hidden(), d_phi_v = per_hidden(), d_z_x = per_hidden();
    lost_in = per_hidden(), d_z_k = arena.take(int64_t(2 * C) * wide), d_z_v = d_z_k + int64_t(C) * wide;
    d_rows_vector = per_output(), d_error = per_output(), d_held = per_output(), d_target = per_output(), lost_vector = per_output();
    d_rows_scalar = arena.take(kScalar * C);
    d_k = arena.take(2 * C * d), d_v = d_k + C * d, d_raw = arena.take(2 * C * d);
    d_hidden = arena.take(C * h), d_part = arena.take(C * std::max(d, h));
    d_eta = per_token(), d_gamma = per_token(), d_erase_gamma = per_token(), d_erase_lost = per_token(), d_total = per_token();
    d_Gamma = arena.take((C + 1) * ld) + ld;
    table = arena.take(C * ld), d_system = arena.take(C * ld);
    scratch = arena.take(int64_t(std::max(wide, n)) * std::max(d, ld));
  }

  // d_y [C, d]; out: gradients of the inputs; d_w: gradient of the weights after the chunk on entry, of those before it on return; d_anchor is added to.
  void run(const float* d_y, const Weights& w, const Weights* anchor, const Weights& d_w, const Weights* d_anchor, const Inputs& out) {
    std::fill(d_Gamma - ld, d_Gamma + C * ld, 0.0f);
    for (float* x : {d_eta, d_gamma, d_erase_gamma, d_erase_lost}) std::fill(x, x + C, 0.0f);
    end(w, anchor, d_w, d_anchor);
    read(d_y, w, anchor, d_w, d_anchor, out);
    solve_rows();
    rows(anchor, d_anchor);
    errors(w, d_w);
    features(w, d_w);
    rates(out);
    inputs(w, d_w, out);
  }

 private:
  void end(const Weights& w, const Weights* anchor, const Weights& d_w, const Weights* d_anchor) {
    const float kept = t.gamma[C - 1];
    if (s.writes_in) {
      mm_bt(Into::Set, C, wide, d, t.k(), d, d_w.in, d, d_rows_in, wide, scratch);
      reached(t.rows_in, wide);
      mm(Into::Set, C, d, wide, scratch, wide, d_w.in, d, d_k, d);
      unreach(d_rows_in, t.rows_in, wide);
    } else {
      std::fill(d_k, d_k + C * d, 0.0f);
    }
    for (int m = 0; m < kVector; ++m)
      mm_bt(Into::Set, C, d, h, t.keys + m * h, wide, d_w.vector(m), h, d_rows_vector + m * d, n, scratch);
    reached(t.rows_vector, n);
    for (int m = 0; m < kVector; ++m) mm(Into::Set, C, h, d, scratch + m * d, n, d_w.vector(m), h, d_keys + m * h, wide);
    unreach(d_rows_vector, t.rows_vector, n);
    for (int j = 0; j < kScalar; ++j)
      for (int i = 0; i < C; ++i) {
        const float back = dot(t.keys_of(kVector + j, i), d_w.scalar(j), h), row = t.rows_scalar[j * C + i];
        d_rows_scalar[j * C + i] = -t.reach_of(i) * back;
        d_Gamma[(C - 1) * ld + i] -= back * row;
        set_scaled(d_keys + i * wide + (kVector + j) * h, d_w.scalar(j), -t.reach_of(i) * row, h);
      }
    Vec d_kept = {};
    for (int64_t i = s.first_written(); i < s.weights(); i += kLanes) {
      const Vec x = load(d_w.in + i);
      d_kept += x * load(w.in + i);
      if (anchor) {
        d_kept -= x * load(anchor->in + i);
        store(d_anchor->in + i, load(d_anchor->in + i) + (1 - kept) * x);
      }
      store(d_w.in + i, kept * x);
    }
    d_gamma[C - 1] += sum(d_kept);
  }

  // scratch = -Gamma_C rows
  void reached(const float* rows_, int columns) {
    for (int i = 0; i < C; ++i) set_scaled(scratch + i * columns, rows_ + i * columns, -t.reach_of(i), columns);
  }

  // From the gradient of -Gamma_C rows to those of the rows, in place, and of Gamma_C.
  void unreach(float* d_rows, const float* rows_, int columns) {
    for (int i = 0; i < C; ++i) {
      float* own = d_rows + i * columns;
      d_Gamma[(C - 1) * ld + i] -= dot(own, rows_ + i * columns, columns);
      set_scaled(own, own, -t.reach_of(i), columns);
    }
  }

  void read(const float* d_y, const Weights& w, const Weights* anchor, const Weights& d_w, const Weights* d_anchor, const Inputs& out) {
    scale_rows(d_part, d_y, t.gamma, d);
    for (int i = 0; i < C; ++i) d_gamma[i] += dot(d_y + i * d, t.held_q + i * d, d);
    mm(Into::Set, C, h, d, d_part, d, w.vector(0), h, d_hidden, h);
    mm_at(Into::Add, d, h, C, d_part, d, t.phi_q, h, d_w.vector(0), h);
    decayed(d_y, d, t.rows_vector, n, t.scores_out, d_rows_vector, n);
    lower_mm(Into::Add, C, h, table, ld, t.keys, wide, d_hidden, h);
    lower_mm_at(Into::Add, C, h, table, ld, t.phi_q, h, d_keys, wide);
    if (anchor) {
      for (int i = 0; i < C; ++i) d_gamma[i] -= dot(d_y + i * d, t.initial_q + i * d, d);
      for (int i = 0; i < C * d; i += kLanes) store(d_part + i, load(d_y + i) - load(d_part + i));
      mm(Into::Add, C, h, d, d_part, d, anchor->vector(0), h, d_hidden, h);
      mm_at(Into::Add, d, h, C, d_part, d, t.phi_q, h, d_anchor->vector(0), h);
    }
    for (int i = 0; i < C * h; i += kLanes) store(d_hidden + i, load(d_hidden + i) * silu_slope(load(t.hidden + i)));
    if (s.writes_in) {
      read_input(anchor, d_anchor, out);
    } else {
      for (int i = 0; i < C; ++i) std::copy(d_hidden + i * h, d_hidden + (i + 1) * h, d_z_x + i * wide);
      std::fill(out.q, out.q + C * d, 0.0f);
    }
    if (s.read_skip) add_scaled(out.q, d_y, 1, C * d);
  }

  // Of what the input layer of M_mem made of the queries.
  void read_input(const Weights* anchor, const Weights* d_anchor, const Inputs& out) {
    for (int i = 0; i < C; ++i) {
      set_scaled(d_z_x + i * wide, d_hidden + i * h, t.gamma[i], h);
      d_gamma[i] += dot(d_hidden + i * h, t.z_x + i * wide, h);
    }
    decayed(d_hidden, h, t.rows_in, wide, t.scores, d_rows_in, wide);
    lower_mm(Into::Set, C, d, table, ld, t.k(), d, out.q, d);
    lower_mm_at(Into::Add, C, d, table, ld, t.in.q, d, d_k, d);
    if (anchor) {
      for (int i = 0; i < C; ++i) {
        d_gamma[i] -= dot(d_hidden + i * h, t.initial_x + i * h, h);
        set_scaled(d_part + i * h, d_hidden + i * h, 1 - t.gamma[i], h);
      }
      mm(Into::Add, C, d, h, d_part, h, anchor->in, d, out.q, d);
      mm_at(Into::Add, h, d, C, d_part, h, t.in.q, d, d_anchor->in, d);
    }
  }

  // y = -(Gamma scores) rows: `table` becomes the gradient of scores; those of Gamma and of the rows are added.
  void decayed(const float* d_out, int width, const float* rows_, int ldr, const float* scores, float* d_rows, int ldd) {
    for (int i = 0; i < C; ++i)
      for (int j = 0; j < i / 16 * 16 + 16; j += kLanes)
        store(table + i * ld + j, load(t.gamma_row(i) + j) * load(scores + i * ld + j));
    lower_mm_at(Into::Subtract, C, width, table, ld, d_out, width, d_rows, ldd);
    lower_bt(C, width, d_out, width, rows_, ldr, table, ld, scratch);
    for (int i = 0; i < C; ++i)
      for (int j = 0; j < i / 16 * 16 + 16; j += kLanes) {
        const int at = i * ld + j;
        const Vec x = -load(table + at);
        store(d_Gamma + at, load(d_Gamma + at) + x * load(scores + at));
        store(table + at, x * load(t.gamma_row(i) + j));
      }
  }

  // rows = (I + L)^-1 r: d_r = (I + L)^-T d_rows takes the place of d_rows; d_L = -d_r rows^T, L = eta Gamma_prev gram.
  void solve_rows() {
    std::fill(d_system, d_system + C * ld, 0.0f);
    for (int g = s.first_system(); g <= kMemories; ++g) {
      const float *L = t.system + g * C * ld, *gram = t.grams + g * C * ld;
      if (g == 0) {
        solve_transposed(C, wide, L, ld, d_rows_in, wide);
        lower_bt(C, wide, d_rows_in, wide, t.rows_in, wide, table, ld, scratch);
      } else if (g <= kVector) {
        float* own = d_rows_vector + (g - 1) * d;
        solve_transposed(C, d, L, ld, own, n);
        lower_bt(C, d, own, n, t.rows_vector + (g - 1) * d, n, table, ld, scratch);
      } else {
        const int j = g - 1 - kVector;
        solve_one_transposed(C, L, ld, d_rows_scalar + j * C);
        for (int i = 0; i < C; ++i)
          for (int c = 0; c < i; ++c) table[i * ld + c] = d_rows_scalar[j * C + i] * t.rows_scalar[j * C + c];
      }
      for (int i = 0; i < C; ++i) {
        const int columns = i / 16 * 16 + 16;
        std::fill(table + i * ld + i, table + i * ld + columns, 0.0f);  // L is strictly lower
        for (int c = 0; c < columns; c += kLanes) {
          const int at = i * ld + c;
          const Vec x = load(table + at);
          store(d_system + at, load(d_system + at) - x * load(gram + at));
          store(table + at, -t.eta[i] * x * load(t.gamma_prev_row(i) + c));
        }
      }
      const float* x = g ? t.keys + (g - 1) * h : t.k();
      float* d_x = g ? d_keys + (g - 1) * h : d_k;
      const int width = g ? h : d, stride = g ? wide : d;
      lower_mm(Into::Add, C, width, table, ld, x, stride, d_x, stride);
      lower_mm_at(Into::Add, C, width, table, ld, x, stride, d_x, stride);
    }
    for (int i = 0; i < C; ++i) {
      const float* own = d_system + i * ld;
      const int columns = i / 16 * 16 + 16;
      d_eta[i] += dot(own, t.gamma_prev_row(i), columns);
      add_scaled(d_Gamma + (i - 1) * ld, own, t.eta[i], columns);
    }
  }

  // r = eta gradient + erase_gamma held + erase_lost initial, of the three kinds of layer.
  void rows(const Weights* anchor, const Weights* d_anchor) {
    if (!s.writes_in) std::fill(d_z_k, d_z_k + C * wide, 0.0f);
    for (int i = 0; i < C; ++i) {
      if (s.writes_in) right(i, wide, d_rows_in, t.drive, t.z_k, t.initial_in, nullptr, d_z_k, lost_in);
      right(i, n, d_rows_vector, t.error, t.held, t.initial_vector, d_error, d_held, lost_vector);
      for (int j = 0; j < kScalar; ++j) {
        const int at = j * C + i;
        d_eta[i] += d_rows_scalar[at] * t.error_scalar[at];
        d_erase_gamma[i] += d_rows_scalar[at] * t.held_scalar[at];
        if (s.anchored) d_erase_lost[i] += d_rows_scalar[at] * t.initial_scalar[at];
      }
    }
    if (!anchor) return;
    if (s.writes_in) {
      mm(Into::Add, C, d, wide, lost_in, wide, anchor->in, d, d_k, d);
      mm_at(Into::Add, wide, d, C, lost_in, wide, t.k(), d, d_anchor->in, d);
    }
    for (int m = 0; m < kVector; ++m) {
      mm(Into::Add, C, h, d, lost_vector + m * d, n, anchor->vector(m), h, d_keys + m * h, wide);
      mm_at(Into::Add, d, h, C, lost_vector + m * d, n, t.keys + m * h, wide, d_anchor->vector(m), h);
    }
    for (int j = 0; j < kScalar; ++j)
      for (int i = 0; i < C; ++i) {
        const float lost = t.eta[i] * (1 - t.gamma_prev[i]) * d_rows_scalar[j * C + i];
        add_scaled(d_keys + i * wide + (kVector + j) * h, anchor->scalar(j), lost, h);
        add_scaled(d_anchor->scalar(j), t.keys_of(kVector + j, i), lost, h);
      }
  }

  // One token's row of r. d_gradient: eta d_r, left where d_r is if null.
  void right(int i, int columns, float* d_r, const float* gradient, const float* held, const float* initial, float* d_gradient,
             float* d_held_, float* lost) {
    const int at = i * columns;
    const float eta = t.eta[i], before = t.gamma_prev[i];
    d_eta[i] += dot(d_r + at, gradient + at, columns);
    d_erase_gamma[i] += dot(d_r + at, held + at, columns);
    set_scaled(d_held_ + at, d_r + at, eta * before, columns);
    if (s.anchored) {
      d_erase_lost[i] += dot(d_r + at, initial + at, columns);
      set_scaled(lost + at, d_r + at, eta * (1 - before), columns);
    }
    set_scaled((d_gradient ? d_gradient : d_r) + at, d_r + at, eta, columns);
  }

  // drive = delta silu'(z_k); delta = W^T error; held = W keys; error = k - unit(v + W phi_v), or without k.
  void errors(const Weights& w, const Weights& d_w) {
    const int hidden = s.writes_in ? C * wide : 0;
    for (int i = 0; i < hidden; i += kLanes) {
      Vec first, second;
      silu_slopes(load(t.z_k + i), &first, &second);
      const Vec d_drive = load(d_rows_in + i);
      store(d_delta + i, d_drive * first);
      store(d_z_k + i, load(d_z_k + i) + d_drive * load(t.delta + i) * second);
    }
    for (int m = 0; m < kVector; ++m) {
      const float* own = d_delta + m * h;
      if (s.writes_in) {
        mm_bt(Into::Add, C, d, h, own, wide, w.vector(m), h, d_error + m * d, n, scratch);
        mm_at(Into::Add, d, h, C, t.error + m * d, n, own, wide, d_w.vector(m), h);
      }
      mm(Into::Add, C, h, d, d_held + m * d, n, w.vector(m), h, d_keys + m * h, wide);
      mm_at(Into::Add, d, h, C, d_held + m * d, n, t.keys + m * h, wide, d_w.vector(m), h);
      for (int i = 0; i < C; ++i) {
        const int at = i * n + m * d;
        if (s.residual) add_scaled(d_k + i * d, d_error + at, 1, d);
        unit_backward(d_error + at, t.target + at, -t.target_scale[i * kVector + m], d_target + at, d, false);
      }
      mm(Into::Set, C, h, d, d_target + m * d, n, w.vector(m), h, d_phi_v + m * h, wide);
      mm_at(Into::Add, d, h, C, d_target + m * d, n, t.phi_v + m * h, wide, d_w.vector(m), h);
    }
    for (int j = 0; j < kScalar; ++j)
      for (int i = 0; i < C; ++i) scalar_error(j, i, w, d_w);
  }

  void scalar_error(int j, int i, const Weights& w, const Weights& d_w) {
    const int at = i * wide + (kVector + j) * h;
    const float error = t.error_scalar[j * C + i], d_row = d_rows_scalar[j * C + i];
    const float d_held_ = t.eta[i] * t.gamma_prev[i] * d_row;
    const float d_delta_ = s.writes_in ? dot(d_delta + at, w.scalar(j), h) : 0;
    const float d_answer = (t.eta[i] * d_row + d_delta_) * (error * error - 1);
    if (s.writes_in) add_scaled(d_w.scalar(j), d_delta + at, error, h);
    add_scaled(d_keys + at, w.scalar(j), d_held_, h);
    add_scaled(d_w.scalar(j), t.keys + at, d_held_, h);
    set_scaled(d_phi_v + at, w.scalar(j), d_answer, h);
    add_scaled(d_w.scalar(j), t.phi_v + at, d_answer, h);
  }

  // keys = unit(silu(z_k)), phi_v = silu(z_v), z = W_in of unit keys and values: down to what those were made of.
  void features(const Weights& w, const Weights& d_w) {
    for (int i = 0; i < C; ++i)
      for (int m = 0; m < kMemories; ++m) {
        const int at = i * wide + m * h;
        unit_backward(d_keys + at, t.keys + at, t.keys_scale[i * kMemories + m], d_keys + at, h, false);
      }
    for (int i = 0; i < C * wide; i += kLanes) {
      store(d_z_k + i, load(d_z_k + i) + load(d_keys + i) * silu_slope(load(t.z_k + i)));
      store(d_z_v + i, load(d_phi_v + i) * silu_slope(load(t.z_v + i)));
    }
    mm_at(Into::Add, wide, d, 2 * C, d_z_k, wide, t.k(), d, d_w.in, d);
    mm(Into::Add, C, d, wide, d_z_k, wide, w.in, d, d_k, d);
    mm(Into::Set, C, d, wide, d_z_v, wide, w.in, d, d_v, d);
    for (int i = 0; i < C; ++i)
      for (int m = 0; m < kVector; ++m) add_scaled(d_v + i * d, d_target + i * n + m * d, 1, d);
    for (int i = 0; i < 2 * C; ++i) unit_backward(d_k + i * d, t.kv + i * d, t.kv_scale[i], d_raw + i * d, d, false);
  }

  // eta, and the decays down to log alpha.
  void rates(const Inputs& out) {
    for (int i = 0; i < C; ++i) {
      const float lost = s.anchored ? d_erase_lost[i] : 0;
      d_eta[i] += d_erase_gamma[i] * t.gamma_prev[i] + lost * (1 - t.gamma_prev[i]);
      if (i) d_gamma[i - 1] += (d_erase_gamma[i] - lost) * t.eta[i];
      out.eta[i] = d_eta[i] * t.eta[i] * (1 - t.eta[i] / s.eta_max);
    }
    std::fill(d_total, d_total + C, 0.0f);
    for (int i = 0; i < C; ++i) {
      d_total[i] += d_gamma[i] * t.gamma[i];
      for (int j = 0; j < i; ++j) {
        const float x = d_Gamma[i * ld + j] * t.gamma_row(i)[j];
        d_total[i] += x;
        d_total[j] -= x;
      }
    }
    float later = 0;
    for (int i = C - 1; i >= 0; --i) {
      later += d_total[i];
      out.alpha[i] = -later * std::expm1(t.log_alpha[i]);
    }
  }

  // What the memories made of the inputs.
  void inputs(const Weights& w, const Weights& d_w, const Inputs& out) {
    for (int m = 1; m < kVector; ++m) {
      const float* d_own = d_raw + (m - 1) * C * d;
      mm(Into::Set, C, h, d, d_own, d, w.vector(m), h, d_z_x + m * h, wide);
      mm_at(Into::Add, d, h, C, d_own, d, t.phi_x + m * h, wide, d_w.vector(m), h);
    }
    for (int j = 0; j < kScalar; ++j)
      for (int i = 0; i < C; ++i) {
        const int at = i * wide + (kVector + j) * h;
        const float d_logit = (j ? out.alpha : out.eta)[i];
        set_scaled(d_z_x + at, w.scalar(j), d_logit, h);
        add_scaled(d_w.scalar(j), t.phi_x + at, d_logit, h);
      }
    for (int i = 0; i < C; ++i)
      for (int c = i * wide + h; c < (i + 1) * wide; c += kLanes)
        store(d_z_x + c, load(d_z_x + c) * silu_slope(load(t.z_x + c)));
    const struct { int memory, count; const float* x; float* d_x; } applied[] = {
        {0, 1, t.in.q, out.q}, {1, 1, t.in.x_k, out.x_k}, {2, 1, t.in.x_v, out.x_v}, {3, 2, t.in.x_k, out.x_k}};
    std::copy(d_raw, d_raw + C * d, out.x_k);
    std::copy(d_raw + C * d, d_raw + 2 * C * d, out.x_v);
    for (const auto& a : applied) {
      const float* own = d_z_x + a.memory * h;
      mm_at(Into::Add, a.count * h, d, C, own, wide, a.x, d, d_w.in_of(a.memory), d);
      mm(Into::Add, C, d, a.count * h, own, wide, w.in_of(a.memory), d, a.d_x, d);
    }
    for (int i = 0; i < C; ++i) unit_backward(out.q + i * d, t.in.q + i * d, t.q_scale[i], out.q + i * d, d, false);
  }

  void scale_rows(float* out, const float* x, const float* scale, int columns) {
    for (int i = 0; i < C; ++i) set_scaled(out + i * columns, x + i * columns, scale[i], columns);
  }

  const Shape s;
  const Chunk& t;
  const int C, d, h, wide, ld, n;
  float *d_rows_in, *d_keys, *d_delta, *d_phi_v, *d_z_x, *lost_in, *d_z_k, *d_z_v;   // [C, 5 h]
  float *d_rows_vector, *d_error, *d_held, *d_target, *lost_vector;                  // [C, 3 d]
  float *d_rows_scalar, *d_k, *d_v, *d_raw, *d_hidden, *d_part;
  float *d_eta, *d_gamma, *d_erase_gamma, *d_erase_lost, *d_total;                   // [C]
  float *d_Gamma, *table, *d_system;                                                 // [C, ld]
  float* scratch;
};

}  // namespace hope
