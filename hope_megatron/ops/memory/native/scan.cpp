// The loop over chunks, forward and backward. Streams are shared out over threads; a stream is one thread's from its first token to
// its last, so that results do not depend on their number.
//
// Tensors are contiguous float32: q, x_k, x_v, y [N, T, d]; logits [N, T]; weights [N, S] with S = Shape::weights() (chunk.h has their
// order); kept [segments, N, S]. T is a multiple of the chunk, d and h are multiples of 16.

#include "backward.h"

namespace {

using hope::Arena;
using hope::Chunk;
using hope::ChunkBackward;
using hope::Gradients;
using hope::Inputs;
using hope::Shape;
using hope::Weights;

struct Tensors {
  const float *q, *x_k, *x_v, *eta, *alpha;

  Inputs at(const Shape& s, int64_t stream, int chunk) const {
    const int64_t token = s.token(stream, chunk);
    return {q + token * s.d, x_k + token * s.d, x_v + token * s.d, eta + token, alpha + token};
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

  explicit ForwardSpace(const Shape& s) : chunk(s, reserved(s)) {}

  static Arena& reserved(const Shape& s) {
    Arena counted;
    Chunk(s, counted);
    return arena.reserve(counted.used());
  }
};

// Room for a chunk, its backward, and the weights at the start of every chunk of a segment.
struct BackwardSpace {
  Chunk chunk;
  ChunkBackward backward;
  float *starts, *y;

  explicit BackwardSpace(const Shape& s) : BackwardSpace(s, reserved(s)) {}

 private:
  BackwardSpace(const Shape& s, Arena& a)
      : chunk(s, a), backward(s, a, chunk), starts(a.take((s.segment_chunks + 1) * s.weights())), y(a.take(s.chunk * s.d)) {}

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
  for (int32_t n = 0; n < s.streams; ++n) {
    ForwardSpace space(s);
    Chunk& chunk = space.chunk;
    const Weights own(w + n * size, s);
    const Anchor initial(anchor, n * size, s);
    for (int i = 0; i < s.chunks(); ++i) {
      if (kept && i % s.segment_chunks == 0)
        std::copy(own.in, own.in + size, kept + (int64_t(i / s.segment_chunks) * s.streams + n) * size);
      chunk.write(x.at(s, n, i), own, initial.get());
      chunk.read(own, initial.get(), y + s.token(n, i) * s.d);
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
  const int64_t size = s.weights();
  const int segments = (s.chunks() + s.segment_chunks - 1) / s.segment_chunks;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
  for (int32_t n = 0; n < s.streams; ++n) {
    BackwardSpace space(s);
    Chunk& chunk = space.chunk;
    const Anchor initial(anchor, n * size, s), d_initial(d_anchor, n * size, s);
    const Weights d_own(d_w + n * size, s);
    for (int segment = segments - 1; segment >= 0; --segment) {
      const int begin = segment * s.segment_chunks, stop = std::min(begin + s.segment_chunks, s.chunks());
      const float* border = kept + (int64_t(segment) * s.streams + n) * size;
      std::copy(border, border + size, space.starts);
      for (int i = begin; i < stop - 1; ++i) {
        float* now = space.starts + (i - begin) * size;
        chunk.write(x.at(s, n, i), Weights(now, s), initial.get());
        std::copy(now, now + size, now + size);
        chunk.end(Weights(now + size, s), initial.get());
      }
      for (int i = stop - 1; i >= begin; --i) {
        const Weights w(space.starts + (i - begin) * size, s);
        const int64_t token = s.token(n, i);
        chunk.write(x.at(s, n, i), w, initial.get());
        chunk.read(w, initial.get(), space.y);
        const Gradients out{d_q + token * s.d, d_x_k + token * s.d, d_x_v + token * s.d, d_eta + token, d_alpha + token};
        space.backward.run(d_y + token * s.d, w, initial.get(), d_own, d_initial.get(), out);
      }
    }
  }
}

}  // extern "C"
