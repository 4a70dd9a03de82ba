// Softmax(q K) V of one split: every warp works for one query, and its teams of lanes take positions in turn, each with a
// running maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). The teams' parts are joined at
// the end. Several queries at once would read keys and values less often, but the code of this stage runs once per layer, in
// few blocks, and takes as long as it is.
#pragma once

#include "kernel/attention.h"

namespace mono::MONO_VARIANT {

constexpr i32 kUnit = 4;  // weights that a lane loads at once
constexpr i32 kUnits = Shape::head_dim / kUnit;
static_assert(Shape::head_dim % kUnit == 0, "head_dim must be a multiple of 4");

// Lanes that share a position: as few as leave a query and its output in registers.
constexpr i32 team_lanes() {
  i32 lanes = 8;
  constexpr i32 most = 16;  // elements of a query
  while (lanes < 32 && (kUnits + lanes - 1) / lanes * kUnit > most) lanes *= 2;
  return lanes;
}
constexpr i32 kTeam = team_lanes(), kTeamsPerWarp = arch::kWarp / kTeam;
constexpr i32 kUnitsPerLane = (kUnits + kTeam - 1) / kTeam, kOwn = kUnitsPerLane * kUnit;

// Warps that share a query, and queries that are worked on at once; a warp may be left over.
constexpr i32 kQueries = Shape::queries_per_kv;
constexpr i32 kSharers = arch::kWarps > kQueries ? arch::kWarps / kQueries : 1, kQueriesAtOnce = arch::kWarps / kSharers;
constexpr i32 kTeams = kSharers * kTeamsPerWarp;  // that share the positions

// So many 16-bit numbers as they lie in memory. Registers hold them as words until they are needed: to take one apart is to
// wait for it.
struct alignas(8) Unit {
  u32 words[kUnit / 2];
};
template <class T>
MONO_DEVICE float element(const Unit& unit, i32 k) {
  static_assert(sizeof(T) == 2);
  return arch::to_float(T{u16(unit.words[k / 2] >> (k % 2 * 16))});
}

// A lane's part of one query: the unnormalised output with its maximum and sum.
struct Part {
  float maximum = -kInfinity, sum = 0.0f;
  float out[kOwn] = {};
};

// e^(x - maximum), for x not above it; 0 for -infinity.
MONO_DEVICE float weight_of(float x, float maximum) { return x == -kInfinity ? 0.0f : exp(x - maximum); }

MONO_DEVICE void join(Part& part, int mask) {
  const float other = arch::swapped(part.maximum, mask), maximum = other > part.maximum ? other : part.maximum;
  const float own = weight_of(part.maximum, maximum), their = weight_of(other, maximum);
  part.maximum = maximum;
  part.sum = part.sum * own + arch::swapped(part.sum, mask) * their;
  MONO_UNROLLED
  for (i32 i = 0; i < kOwn; ++i) part.out[i] = part.out[i] * own + arch::swapped(part.out[i], mask) * their;
}

// The k-th element of this lane is element index(k) of the head, if that is below head_dim.
struct Elements {
  i32 first = arch::lane() % kTeam * kUnit;
  MONO_DEVICE i32 index(i32 k) const { return first + k / kUnit * (kTeam * kUnit) + k % kUnit; }
};

// A lane's parts of the keys and the values that a team works on at once. More than one hide each other's latency.
constexpr i32 kAtOnce = arch::kPositionsAtOnce;
struct Round {
  Unit key[kAtOnce][kUnitsPerLane], value[kAtOnce][kUnitsPerLane];
};

// Which positions a split's teams take.
struct Positions {
  Visible visible;
  i32 first, count;  // chunk; positions, visible or not
  i32 team;

  MONO_DEVICE Positions(const Visible& v, Shape h, i32 split)
      : visible(v), first(v.first_of(h, split)), team(arch::warp() % kSharers * kTeamsPerWarp + arch::lane() / kTeam) {
    count = ((visible.last_chunk - first) / h.kv_splits + 1) * h.kv_chunk;
  }
  // The n-th position of this thread's team in the round from `begin` on, or -1 where there is none.
  MONO_DEVICE i32 of_team(i32 begin, i32 n) const {
    const i32 i = begin + n * kTeams + team;
    const i32 p = (first + i / Shape::kv_chunk * Shape::kv_splits) * Shape::kv_chunk + i % Shape::kv_chunk;
    return i < count && p >= visible.first && p <= visible.position ? p : -1;
  }
  // Asks for what the cache has of it: the token's own position is not there yet.
  template <class T>
  MONO_DEVICE Round load(const T* keys, const T* values, i32 begin) const {
    Round round{};
    const Elements own;
    MONO_UNROLLED
    for (i32 n = 0; n < kAtOnce; ++n) {
      const i32 p = of_team(begin, n);
      if (p < 0 || p == visible.position) continue;
      MONO_UNROLLED
      for (i32 u = 0; u < kUnitsPerLane; ++u) {
        const i64 at = i64(p) * Shape::head_dim + own.index(u * kUnit);
        if (own.index(u * kUnit) >= Shape::head_dim) continue;
        round.key[n][u] = *reinterpret_cast<const Unit*>(keys + at);
        round.value[n][u] = *reinterpret_cast<const Unit*>(values + at);
      }
    }
    return round;
  }
};

template <class T>
MONO_DEVICE Round first_round(const T* keys, const T* values, const Visible& visible, i32 split, Shape h) {
  return Positions(visible, h, split).load(keys, values, 0);
}

// Leaves every sharer's part of every query in near memory: [sharers, queries, head_dim + 2].
template <class T>
MONO_DEVICE void attend(BlockState<T>& s, T* keys, T* values, const Visible& visible, i32 split, Round round) {
  constexpr i32 kSize = Shape::head_dim;
  const float scale = 1.0f / arch::sqrt(float(kSize));
  const float* own = s.scratch.query + kQueries * kSize;  // the position's key, rounded already, and value
  const Positions positions(visible, s.header, split);
  const Elements of_lane;
  MONO_ROLLED
  for (i32 g = arch::warp() / kSharers; g < kQueries; g += kQueriesAtOnce) {
    float query[kOwn];
    Part part;
    MONO_UNROLLED
    for (i32 k = 0; k < kOwn; ++k) query[k] = of_lane.index(k) < kSize ? s.scratch.query[g * kSize + of_lane.index(k)] * scale : 0.0f;
    // All lanes go round equally often, because a team's meet in shuffles.
    MONO_ROLLED
    for (i32 begin = 0; begin < positions.count; begin += kAtOnce * kTeams) {
      float score[kAtOnce], value[kAtOnce][kOwn], maximum = part.maximum;
      MONO_UNROLLED
      for (i32 n = 0; n < kAtOnce; ++n) {
        const bool newest = positions.of_team(begin, n) == visible.position;
        score[n] = 0.0f;
        MONO_UNROLLED
        for (i32 k = 0; k < kOwn; ++k) {
          float key = element<T>(round.key[n][k / kUnit], k % kUnit);
          value[n][k] = element<T>(round.value[n][k / kUnit], k % kUnit);
          if (newest) {
            key = of_lane.index(k) < kSize ? own[of_lane.index(k)] : 0.0f;
            value[n][k] = of_lane.index(k) < kSize ? arch::rounded<T>(own[kSize + of_lane.index(k)]) : 0.0f;
          }
          score[n] += query[k] * key;
        }
      }
      if (begin + kAtOnce * kTeams < positions.count) round = positions.load(keys, values, begin + kAtOnce * kTeams);
      MONO_UNROLLED
      for (i32 n = 0; n < kAtOnce; ++n) {
        for (i32 mask = kTeam / 2; mask; mask /= 2) score[n] += arch::swapped(score[n], mask);
        if (positions.of_team(begin, n) < 0) score[n] = -kInfinity;
        maximum = score[n] > maximum ? score[n] : maximum;
      }
      const float shrink = weight_of(part.maximum, maximum);
      part.maximum = maximum;
      part.sum *= shrink;
      MONO_UNROLLED
      for (i32 k = 0; k < kOwn; ++k) part.out[k] *= shrink;
      MONO_UNROLLED
      for (i32 n = 0; n < kAtOnce; ++n) {
        const float weight = weight_of(score[n], maximum);
        part.sum += weight;
        MONO_UNROLLED
        for (i32 k = 0; k < kOwn; ++k) part.out[k] += weight * value[n][k];
      }
    }
    if (g + kQueriesAtOnce < kQueries) round = positions.load(keys, values, 0);
    MONO_ROLLED
    for (i32 mask = kTeam; mask < arch::kWarp; mask *= 2) join(part, mask);
    if (arch::lane() >= kTeam) continue;
    float* to = reinterpret_cast<float*>(s.scratch.activations) + (arch::warp() % kSharers * kQueries + g) * (kSize + 2);
    if (arch::lane() == 0) {
      to[0] = part.maximum;
      to[1] = part.sum;
    }
    MONO_UNROLLED
    for (i32 k = 0; k < kOwn; ++k)
      if (of_lane.index(k) < kSize) to[2 + of_lane.index(k)] = part.out[k];
  }
  if (visible.owned_by(s.header, split)) store_heads(s, keys, values, visible.position);
  arch::sync();
}

// The w-th word of a query's part, joined from all sharers'.
template <class T>
MONO_DEVICE void attention_payload(const BlockState<T>& s, i32 query, i32 w, float (&payload)[kFloatsPerWord]) {
  constexpr i32 kSize = Shape::head_dim, kStride = kQueries * (kSize + 2);
  const float* near = reinterpret_cast<const float*>(s.scratch.activations) + query * (kSize + 2);
  float maximum = -kInfinity, sum = 0.0f;
  MONO_ROLLED
  for (i32 i = 0; i < kSharers; ++i) maximum = near[i * kStride] > maximum ? near[i * kStride] : maximum;
  MONO_ROLLED
  for (i32 i = 0; i < kSharers; ++i) {
    const float* of = near + i * kStride;
    const float weight = weight_of(of[0], maximum);
    sum += weight * of[1];
    for (i32 k = 0; k < kFloatsPerWord; ++k) {
      const i32 at = (w - 1) * kFloatsPerWord + k;
      if (at >= 0 && at < kSize) payload[k] += weight * of[2 + at];
    }
  }
  if (w == 0) {
    payload[0] = maximum;
    payload[1] = sum;
  }
}

}  // namespace mono::MONO_VARIANT
