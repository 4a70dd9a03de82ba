// RMSNorm of vectors while they arrive: every thread keeps the words that it has read in registers.
#pragma once

#include "kernel/block.h"

namespace mono::MONO_VARIANT {

constexpr i32 kLaneWords = kShape.num_blocks * kShape.hidden_run;  // of one vector over the hidden size
// Words of all lanes that a block reads at once, per thread.
constexpr i32 kHeldWords = (kTouchedLanes * kLaneWords + arch::kThreads - 1) / arch::kThreads;

struct Held {
  float x[kHeldWords][kFloatsPerWord];
};

struct LaneSums {
  float lane[kTouchedLanes];
};

// Writes held lanes as activations: normalised with a scale, or as they are without one.
template <class T>
MONO_DEVICE void store_normed(BlockState<T>& s, const Held& held, i32 lanes, const float* scale) {
  const i32 hidden = s.header.hidden_size, width = s.header.hidden_width;
  LaneSums inverse{};
  if (scale) {
  MONO_UNROLLED
    for (i32 k = 0; k < kHeldWords; ++k) {
      const i32 lane = (arch::thread() + k * arch::kThreads) / kLaneWords;
      float squares = 0.0f;
      for (i32 j = 0; j < kFloatsPerWord; ++j) squares += held.x[k][j] * held.x[k][j];
  MONO_UNROLLED
      for (i32 l = 0; l < kTouchedLanes; ++l) inverse.lane[l] += l == lane ? squares : 0.0f;
    }
    inverse = arch::all_reduce(inverse, [](LaneSums a, const LaneSums& b) {
      for (i32 l = 0; l < kTouchedLanes; ++l) a.lane[l] += b.lane[l];
      return a;
    });
  MONO_UNROLLED
    for (i32 l = 0; l < kTouchedLanes; ++l)
      inverse.lane[l] = 1.0f / arch::sqrt(inverse.lane[l] / float(hidden) + s.header.norm_eps);
  }
  MONO_UNROLLED
  for (i32 k = 0; k < kHeldWords; ++k) {
    const i32 i = arch::thread() + k * arch::kThreads, lane = i / kLaneWords;
    if (lane >= lanes) continue;
    const HiddenWord word(s.header, i - lane * kLaneWords);
    float factor = 1.0f;
  MONO_UNROLLED
    for (i32 l = 0; l < kTouchedLanes; ++l) factor = scale && l == lane ? inverse.lane[l] : factor;
    for (i32 j = 0; j < word.count; ++j) {
      const i32 row = word.first + j;
      arch::from_float(scale ? held.x[k][j] * factor * scale[row] : held.x[k][j], s.scratch.activations[lane * width + row]);
    }
  }
  MONO_ROLLED
  for (i32 lane = 0; lane < lanes; ++lane) pad_activations(s.scratch.activations + lane * width, hidden, width);
  arch::sync();
}

// RMSNorm of `lanes` consecutive vectors, published in runs from `from` on, into the activations.
template <class T>
MONO_DEVICE void norm_words(BlockState<T>& s, const arch::Word* from, i32 lanes, Channel channel, i32 layer,
                            const float* scale) {
  arch::Word words[kHeldWords];
  Held held{};
  MONO_UNROLLED
  for (i32 k = 0; k < kHeldWords; ++k) {
    const i32 i = arch::thread() + k * arch::kThreads;
    if (i < lanes * kLaneWords) words[k] = arch::load_word(from + i);
  }
  MONO_UNROLLED
  for (i32 k = 0; k < kHeldWords; ++k) {
    const i32 i = arch::thread() + k * arch::kThreads;
    if (i < lanes * kLaneWords) arch::unpack(s.link.confirm(words[k], from + i, channel, layer), held.x[k]);
  }
  store_normed(s, held, lanes, scale);
}

// RMSNorm of a token's embedding into the activations, the same for all lanes.
template <class T>
MONO_DEVICE void norm_embedding(BlockState<T>& s, const T* row, i32 lanes, const float* scale) {
  Held held{};
  MONO_UNROLLED
  for (i32 k = 0; k < kHeldWords; ++k) {
    const i32 i = arch::thread() + k * arch::kThreads, lane = i / kLaneWords;
    if (lane >= lanes) continue;
    const HiddenWord word(s.header, i - lane * kLaneWords);
    for (i32 j = 0; j < kFloatsPerWord; ++j) held.x[k][j] = j < word.count ? arch::to_float(row[word.first + j]) : 0.0f;
  }
  store_normed(s, held, lanes, scale);
}

// 1 / RMS of every lane of this device, from the residual stream after the last layer.
template <class T>
MONO_DEVICE void lane_inverses(BlockState<T>& s, const arch::Word* from, i32 layer, float* inverse) {
  MONO_ROLLED
  for (i32 lane = 0; lane < s.lanes(); ++lane) {
    float squares = 0.0f;
    s.link.read(
        kLaneWords, kMlpResidual, layer, [&](i32 i) { return from + lane * kLaneWords + i; },
        [&](i32, const arch::Word& word) {
          float x[kFloatsPerWord];
          arch::unpack(word, x);
          for (i32 j = 0; j < kFloatsPerWord; ++j) squares += x[j] * x[j];
        });
    squares = arch::all_reduce(squares, [](float a, float b) { return a + b; });
    inverse[lane] = 1.0f / arch::sqrt(squares / float(s.header.hidden_size) + s.header.norm_eps);
  }
}

}  // namespace mono::MONO_VARIANT
