// The loop over chunks, forward and backward. Streams are shared out over threads; a stream is one thread's from its first token to
// its last, so that results do not depend on their number.
//
// Tensors are contiguous float32: q, x_k, x_v, y [B, T, H, d]; logits [B, T, H]; weights [B H, S] with S = Shape::weights() (chunk.h
// has their order); kept [segments, B H, S]. T is a multiple of the chunk, d and h are multiples of 16.

#include "backward.h"

namespace {

using hope::Arena;
using hope::Chunk;
using hope::ChunkBackward;
using hope::Inputs;
using hope::Shape;
using hope::Weights;

struct Tensors {
  const float *q, *x_k, *x_v, *eta, *alpha;

  void load(const Shape& s, int64_t stream, int i, const Inputs& to) const {
    const int64_t row = s.row(stream, i);
    hope::gather(s, q, row, s.d, to.q);
    hope::gather(s, x_k, row, s.d, to.x_k);
    hope::gather(s, x_v, row, s.d, to.x_v);
    hope::gather(s, eta, row, 1, to.eta);
    hope::gather(s, alpha, row, 1, to.alpha);
  }
};

struct Gradients {
  float *q, *x_k, *x_v, *eta, *alpha;

  void put(const Shape& s, int64_t stream, int i, const Inputs& from) const {
    const int64_t row = s.row(stream, i);
    hope::scatter(s, from.q, q, row, s.d);
    hope::scatter(s, from.x_k, x_k, row, s.d);
    hope::scatter(s, from.x_v, x_v, row, s.d);
    hope::scatter(s, from.eta, eta, row, 1);
    hope::scatter(s, from.alpha, alpha, row, 1);
  }
};

// An optional block of weights.
struct Anchor {
  Weights weights;
  bool there;

  Anchor(float* block, int64_t offset, const Shape& s) : weights(block ? block + offset : nullptr, s), there(block != nullptr) {}
  const Weights* get() const { return there ? &weights : nullptr; }
};

thread_local Arena arena;  // kept between calls: fresh pages cost more than the work on them

// Room for a chunk, in this thread's arena.
struct ForwardSpace {
  Chunk chunk;
  float* y;

  explicit ForwardSpace(const Shape& s) : ForwardSpace(s, reserved(s)) {}

 private:
  ForwardSpace(const Shape& s, Arena& a) : chunk(s, a), y(a.take(s.chunk * s.d)) {}

  static Arena& reserved(const Shape& s) {
    Arena counted;
    ForwardSpace(s, counted);
    return arena.reserve(counted.used());
  }
};

// Room for a chunk, its backward, and the weights at the start of every chunk of a segment.
struct BackwardSpace {
  Chunk chunk;
  ChunkBackward backward;
  Inputs gradients;
  float *starts, *y, *d_y;

  explicit BackwardSpace(const Shape& s) : BackwardSpace(s, reserved(s)) {}

 private:
  BackwardSpace(const Shape& s, Arena& a)
      : chunk(s, a), backward(s, a, chunk), gradients(s, a), starts(a.take(s.segment_chunks * s.weights())),
        y(a.take(s.chunk * s.d)), d_y(a.take(s.chunk * s.d)) {}

  static Arena& reserved(const Shape& s) {
    Arena counted;
    BackwardSpace(s, counted);
    return arena.reserve(counted.used());
  }
};

}  // namespace

extern "C" {

// y and w (in: the weights that the streams begin with, out: those that they end with). kept may be null.
void hope_memory_forward(const Shape* shape, const float* q, const float* x_k, const float* x_v, const float* eta, const float* alpha,
                         float* anchor, float* y, float* w, float* kept) {
  const Shape& s = *shape;
  const Tensors x{q, x_k, x_v, eta, alpha};
  const int64_t size = s.weights();
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
  for (int32_t n = 0; n < s.streams(); ++n) {
    ForwardSpace space(s);
    Chunk& chunk = space.chunk;
    const Weights own(w + n * size, s);
    const Anchor initial(anchor, n * size, s);
    for (int i = 0; i < s.chunks(); ++i) {
      if (kept && i % s.segment_chunks == 0)
        std::copy(own.in, own.in + size, kept + (int64_t(i / s.segment_chunks) * s.streams() + n) * size);
      x.load(s, n, i, chunk.in);
      chunk.write(own, initial.get());
      chunk.read(own, initial.get(), space.y);
      hope::scatter(s, space.y, y, s.row(n, i), s.d);
      chunk.end(own, initial.get());
    }
  }
}

// d_w: in: gradient of the weights that the streams end with, out: of those that they begin with. d_anchor: added to.
void hope_memory_backward(const Shape* shape, const float* q, const float* x_k, const float* x_v, const float* eta, const float* alpha,
                          float* anchor, const float* kept, const float* d_y, float* d_q, float* d_x_k, float* d_x_v, float* d_eta,
                          float* d_alpha, float* d_w, float* d_anchor) {
  const Shape& s = *shape;
  const Tensors x{q, x_k, x_v, eta, alpha};
  const Gradients d_x{d_q, d_x_k, d_x_v, d_eta, d_alpha};
  const int64_t size = s.weights();
  const int segments = (s.chunks() + s.segment_chunks - 1) / s.segment_chunks;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
  for (int32_t n = 0; n < s.streams(); ++n) {
    BackwardSpace space(s);
    Chunk& chunk = space.chunk;
    const Anchor initial(anchor, n * size, s), d_initial(d_anchor, n * size, s);
    const Weights d_own(d_w + n * size, s);
    for (int segment = segments - 1; segment >= 0; --segment) {
      const int begin = segment * s.segment_chunks, stop = std::min(begin + s.segment_chunks, s.chunks());
      const float* border = kept + (int64_t(segment) * s.streams() + n) * size;
      std::copy(border, border + size, space.starts);
      for (int i = begin; i < stop - 1; ++i) {
        float* now = space.starts + (i - begin) * size;
        x.load(s, n, i, chunk.in);
        chunk.write(Weights(now, s), initial.get());
        std::copy(now, now + size, now + size);
        chunk.end(Weights(now + size, s), initial.get());
      }
      for (int i = stop - 1; i >= begin; --i) {
        const Weights w(space.starts + (i - begin) * size, s);
        x.load(s, n, i, chunk.in);
        chunk.write(w, initial.get());
        chunk.read(w, initial.get(), space.y);
        hope::gather(s, d_y, s.row(n, i), s.d, space.d_y);
        space.backward.run(space.d_y, w, initial.get(), d_own, d_initial.get(), space.gradients);
        d_x.put(s, n, i, space.gradients);
      }
    }
  }
}

}  // extern "C"
