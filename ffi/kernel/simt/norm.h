// RMSNorm of vectors while they arrive: every thread keeps the words that it has read in registers.
#pragma once

#include "kernel/simt/product.h"

namespace mono::MONO_VARIANT {

constexpr i32 kTouchedLanes = kExtents.touched_lanes > 1 ? i32(kExtents.touched_lanes) : 1;
constexpr i32 kLaneWords = Shape::num_blocks * Shape::hidden_run;  // of one vector over the hidden size
// Words of all lanes that a block reads at once, per thread.
constexpr i32 kHeldWords = (kTouchedLanes * kLaneWords + arch::kThreads - 1) / arch::kThreads;

struct Held {
  float x[kHeldWords][kFloatsPerWord], scale[kHeldWords][kFloatsPerWord];
};

struct LaneSums {
  float lane[kTouchedLanes];
};

// Where the k-th word that a thread holds belongs. Where blocks touch one lane each, and threads hold equally many words, the
// compiler knows most of it.
struct HeldWord {
  i32 index, lane, in_lane;

  MONO_DEVICE HeldWord(i32 k)
      : index(arch::thread() + k * arch::kThreads),
        lane(kTouchedLanes == 1 ? 0 : index / kLaneWords),
        in_lane(index - lane * kLaneWords) {}
  MONO_DEVICE bool exists(i32 lanes) const {
    if constexpr (kTouchedLanes == 1) return kLaneWords % arch::kThreads == 0 || index < kLaneWords;
    return lane < lanes;
  }
};

// Writes held lanes as activations: normalised with a scale, or as they are without one.
template <class T>
MONO_DEVICE void store_normed(const Held& held, i32 lanes, bool normalise, T* activations) {
  constexpr i32 hidden = Shape::hidden_size, width = Shape::hidden_width;
  LaneSums inverse{};
  const float scale = activation_scale(Shape{});
  if (normalise) {
    MONO_UNROLLED
    for (i32 k = 0; k < kHeldWords; ++k) {
      const i32 lane = HeldWord(k).lane;
      float squares = 0.0f;
      for (i32 j = 0; j < kFloatsPerWord; ++j) squares += held.x[k][j] * held.x[k][j];
      MONO_UNROLLED
      for (i32 l = 0; l < kTouchedLanes; ++l) inverse.lane[l] += l == lane ? squares : 0.0f;
    }
    inverse = arch::reduce_before_sync(inverse, [](LaneSums a, const LaneSums& b) {
      for (i32 l = 0; l < kTouchedLanes; ++l) a.lane[l] += b.lane[l];
      return a;
    });
    MONO_UNROLLED
    for (i32 l = 0; l < kTouchedLanes; ++l) inverse.lane[l] = scale / arch::sqrt(inverse.lane[l] / float(hidden) + Shape::norm_eps);
  }
  MONO_UNROLLED
  for (i32 k = 0; k < kHeldWords; ++k) {
    const HeldWord at(k);
    if (!at.exists(lanes)) continue;
    const HiddenWord word(Shape{}, at.in_lane);
    float factor = 1.0f;
    MONO_UNROLLED
    for (i32 l = 0; l < kTouchedLanes; ++l) factor = normalise && l == at.lane ? inverse.lane[l] : factor;
    MONO_UNROLLED
    for (i32 j = 0; j < kFloatsPerWord; ++j) {
      const float x = normalise ? held.x[k][j] * factor * held.scale[k][j] : held.x[k][j] * scale;
      if (j < word.count) arch::from_float(x, activations[at.lane * width + word.first + j]);
    }
  }
  if constexpr (width > hidden) {
    MONO_ROLLED
    for (i32 lane = 0; lane < lanes; ++lane) pad_activations(activations + lane * width, hidden, width);
  }
  arch::sync();
}

// RMSNorm of `lanes` consecutive vectors, published in runs from `from` on, into the activations; or of a token's embedding,
// the same for all lanes.
template <class T>
MONO_OUTLINE void hold_and_store(Link link, const arch::Word* from, const T* embedding, i32 lanes, Channel channel, i32 layer,
                                 const float* scale, T* activations) {
  Held held{};
  // Asked for before anything is waited for.
  MONO_UNROLLED
  for (i32 k = 0; k < kHeldWords; ++k) {
    const HeldWord at(k);
    if (!at.exists(lanes)) continue;
    const HiddenWord word(Shape{}, at.in_lane);
    for (i32 j = 0; j < kFloatsPerWord; ++j) held.scale[k][j] = scale && j < word.count ? scale[word.first + j] : 0.0f;
  }
  if (embedding) {
    MONO_UNROLLED
    for (i32 k = 0; k < kHeldWords; ++k) {
      const HeldWord at(k);
      if (!at.exists(lanes)) continue;
      const HiddenWord word(Shape{}, at.in_lane);
      MONO_UNROLLED
      for (i32 j = 0; j < kFloatsPerWord; ++j) held.x[k][j] = j < word.count ? arch::to_float(embedding[word.first + j]) : 0.0f;
    }
  } else {
    arch::Word words[kHeldWords];
    auto wanted = [&](i32 k) { return HeldWord(k).exists(lanes); };
    link.wait_for(words, Blocks::kOfDevice, channel, layer, [&](i32 k) { return from + HeldWord(k).index; }, wanted);
    MONO_UNROLLED
    for (i32 k = 0; k < kHeldWords; ++k)
      if (wanted(k)) arch::unpack(words[k], held.x[k]);
  }
  store_normed(held, lanes, scale != nullptr, activations);
}

template <class T>
MONO_DEVICE void norm_words(BlockState<T>& s, const arch::Word* from, i32 lanes, Channel channel, i32 layer,
                            const float* scale) {
  hold_and_store<T>(s.link, from, nullptr, lanes, channel, layer, scale, s.scratch.activations);
}

template <class T>
MONO_DEVICE void norm_embedding(BlockState<T>& s, const T* row, i32 lanes, const float* scale) {
  hold_and_store<T>(s.link, nullptr, row, lanes, kMlpResidual, 0, scale, s.scratch.activations);
}

// 1 / RMS of every lane of this device, from the residual stream after the last layer; as many lanes at once as a reduction
// takes.
template <class T>
MONO_DEVICE void lane_inverses(BlockState<T>& s, const arch::Word* from, i32 layer, float* inverse) {
  constexpr i32 kAtOnce = kOwnLanes < arch::kReduceWords ? kOwnLanes : arch::kReduceWords;
  struct Sums {
    float lane[kAtOnce];
  };
  for (i32 first = 0; first < s.lanes(); first += kAtOnce) {
    const i32 count = s.lanes() - first < kAtOnce ? s.lanes() - first : kAtOnce;
    const arch::Word* words = from + first * kLaneWords;
    Sums sums{};
    s.link.read(
        count * kLaneWords, kMlpResidual, layer, [&](i32 i) { return words + i; },
        [&](i32 i, const arch::Word& word) {
          float x[kFloatsPerWord], squares = 0.0f;
          arch::unpack(word, x);
          for (i32 j = 0; j < kFloatsPerWord; ++j) squares += x[j] * x[j];
          MONO_UNROLLED
          for (i32 l = 0; l < kAtOnce; ++l) sums.lane[l] += l == i / kLaneWords ? squares : 0.0f;
        });
    sums = arch::all_reduce(sums, [](Sums a, const Sums& b) {
      for (i32 l = 0; l < kAtOnce; ++l) a.lane[l] += b.lane[l];
      return a;
    });
    MONO_UNROLLED
    for (i32 l = 0; l < kAtOnce; ++l)
      if (l < count) inverse[first + l] = 1.0f / arch::sqrt(sums.lane[l] / float(s.header.hidden_size) + s.header.norm_eps);
  }
}

}  // namespace mono::MONO_VARIANT
