// Softmax(q K) V of one split, for two queries at a time, by squads of 32 lanes. A squad takes a few positions of a chunk, the
// newest first: teams of lanes multiply the keys, one position each; then every lane adds up its elements of all the values. A
// squad keeps a running maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018); what squads have
// found of a query is joined at the end. The code runs once per layer, in few blocks, and takes as long as it is: so it has few
// instructions rather than few trips.
#pragma once

#include "kernel/attention.h"

namespace mono::MONO_VARIANT {

constexpr i32 kUnit = 4;  // elements that a lane loads at once
constexpr i32 kUnits = Shape::head_dim / kUnit;
static_assert(Shape::head_dim % kUnit == 0, "head_dim must be a multiple of 4");

// Lanes that share a position's key: as few as leave it in registers, and a squad's positions in one chunk.
constexpr i32 team_lanes() {
  i32 lanes = 8;
  constexpr i32 most = 16;  // elements of a key
  while (lanes < kSquad && ((kUnits + lanes - 1) / lanes * kUnit > most || Shape::kv_chunk % (kSquad / lanes))) lanes *= 2;
  return lanes;
}
constexpr i32 kTeam = team_lanes(), kTeams = kSquad / kTeam;
constexpr i32 kKeyUnits = (kUnits + kTeam - 1) / kTeam, kValueUnits = (kUnits + kSquad - 1) / kSquad;

// Squads that share the positions for a pair of queries, and pairs that are worked on at once; squads may be left over.
constexpr i32 kQueries = Shape::queries_per_kv, kPairs = (kQueries + 1) / 2;
constexpr i32 kSquads = arch::kThreads / kSquad, kSharers = squads_that_share(kSquads, kQueries);
constexpr i32 kPairsAtOnce = kSquads / kSharers, kRound = kSharers * kTeams;  // positions
constexpr i32 kAhead = arch::kRoundsAhead;

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
struct alignas(16) Floats {
  float x[kUnit];
};
MONO_DEVICE Floats floats_at(const float* at, i32 unit) { return reinterpret_cast<const Floats*>(at)[unit]; }

constexpr float inverse_root(i32 n) {
  double root = n;
  for (i32 i = 0; i < 40; ++i) root = 0.5 * (root + n / root);
  return float(1.0 / root);
}

MONO_DEVICE i32 squad() { return arch::thread() / kSquad; }
MONO_DEVICE i32 squad_lane() { return arch::thread() % kSquad; }
MONO_DEVICE float of_squad_lane(float x, i32 lane) { return arch::of_lane(x, arch::lane() / kSquad * kSquad + lane); }

// A lane's parts of what its squad works on at once: of its team's key, and of the values of all teams' positions.
struct Round {
  Unit key[kKeyUnits], value[kTeams][kValueUnits];
};
struct Rounds {
  Round of[kAhead];
};

// Which positions of a split a squad takes in the round from `begin` on: so many, from `newest` down.
struct Run {
  i32 newest, count;  // may be negative
};
struct Positions {
  Visible visible;
  i32 last;  // chunk of the split

  MONO_DEVICE Positions(const Visible& v, Shape h, i32 split) : visible(v) {
    last = v.last_chunk - (v.last_chunk % h.kv_splits - split + h.kv_splits) % h.kv_splits;
  }
  MONO_DEVICE i32 chunk(i32 i) const { return last - i / Shape::kv_chunk * Shape::kv_splits; }
  MONO_DEVICE bool any(i32 begin) const { return chunk(begin) >= visible.first_chunk; }
  MONO_DEVICE Run run(i32 begin) const {
    const i32 i = begin + squad() % kSharers * kTeams, start = chunk(i) * Shape::kv_chunk;
    const i32 end = chunk(i) == visible.last_chunk ? visible.position : start + Shape::kv_chunk - 1;
    const i32 first = visible.first > start ? visible.first : start, newest = end - i % Shape::kv_chunk;
    return {newest, newest - first + 1};
  }
  // Asks for what the cache has of them: the token's own position is not there yet.
  template <class T>
  MONO_DEVICE Round load(const T* keys, const T* values, i32 begin) const {
    Round round{};
    const Run of = run(begin);
    const i32 own = squad_lane(), first = of.newest == visible.position, team = own / kTeam;
    const T* key = keys + i64(of.newest - team) * Shape::head_dim + own % kTeam * kUnit;
    const T* value = values + i64(of.newest) * Shape::head_dim + own * kUnit;
    MONO_UNROLLED
    for (i32 u = 0; u < kKeyUnits; ++u)
      if (team >= first && team < of.count && own % kTeam + u * kTeam < kUnits)
        round.key[u] = *reinterpret_cast<const Unit*>(key + u * kTeam * kUnit);
    MONO_UNROLLED
    for (i32 n = 0; n < kTeams; ++n)
      MONO_UNROLLED
      for (i32 u = 0; u < kValueUnits; ++u)
        if (n >= first && n < of.count && own + u * kSquad < kUnits)
          round.value[n][u] = *reinterpret_cast<const Unit*>(value - n * Shape::head_dim + u * kSquad * kUnit);
    return round;
  }
};

template <class T>
MONO_DEVICE Rounds first_rounds(const T* keys, const T* values, const Visible& visible, i32 split, Shape h) {
  const Positions positions(visible, h, split);
  Rounds rounds;
  MONO_UNROLLED
  for (i32 r = 0; r < kAhead; ++r) rounds.of[r] = positions.load(keys, values, r * kRound);
  return rounds;
}

// What a squad has found of a query, in near memory: [sharers, queries], each its weight among the sharers, its maximum, its
// sum, the maximum of all sharers, and the unnormalised output.
constexpr i32 kPart = part_floats(Shape::head_dim);
template <class T>
MONO_DEVICE float* part_of(const BlockState<T>& s, i32 sharer, i32 query) {
  return reinterpret_cast<float*>(s.scratch.activations) + (sharer * kQueries + query) * kPart;
}

template <class T>
MONO_DEVICE void attend(BlockState<T>& s, T* keys, T* values, const Visible& visible, i32 split, Rounds rounds) {
  constexpr i32 kSize = Shape::head_dim;
  constexpr float kScale = inverse_root(kSize), kLowest = -3.402823466e38f;  // finite, so that nothing is infinity - infinity
  const float *own_key = s.scratch.query + kQueries * kSize, *own_value = own_key + kSize;  // the key is rounded already
  const Positions positions(visible, s.header, split);
  const i32 own = squad_lane(), team = own / kTeam, mine = own % 2;  // a lane looks after one query's maximum and sum
  MONO_ROLLED
  for (i32 pair = squad() / kSharers; pair < kPairs; pair += kPairsAtOnce) {
    const i32 queries[2] = {2 * pair, 2 * pair + 1 < kQueries ? 2 * pair + 1 : 2 * pair};
    float maximum = kLowest, sum = 0.0f, out[2][kValueUnits * kUnit] = {};
    // All squads go round equally often, because lanes meet in shuffles.
    MONO_ROLLED
    for (i32 begin = 0; positions.any(begin); begin += kRound) {
      const Run run = positions.run(begin);
      const Round& round = rounds.of[0];
      float key[kKeyUnits * kUnit], value[kTeams][kValueUnits * kUnit];
      MONO_UNROLLED
      for (i32 k = 0; k < kKeyUnits * kUnit; ++k) key[k] = element<T>(round.key[k / kUnit], k % kUnit);
      MONO_UNROLLED
      for (i32 n = 0; n < kTeams; ++n)
        MONO_UNROLLED
        for (i32 k = 0; k < kValueUnits * kUnit; ++k) value[n][k] = element<T>(round.value[n][k / kUnit], k % kUnit);
      if (run.newest == visible.position) {
        MONO_UNROLLED
        for (i32 k = 0; k < kKeyUnits * kUnit; ++k) {
          const i32 unit = own % kTeam + k / kUnit * kTeam;
          if (team == 0 && unit < kUnits) key[k] = floats_at(own_key, unit).x[k % kUnit];
        }
        MONO_UNROLLED
        for (i32 k = 0; k < kValueUnits * kUnit; ++k) {
          const i32 unit = own + k / kUnit * kSquad;
          if (unit < kUnits) value[0][k] = arch::rounded<T>(floats_at(own_value, unit).x[k % kUnit]);
        }
      }
      auto product = [&](i32 query) {
        float sum = 0.0f;
        MONO_UNROLLED
        for (i32 u = 0; u < kKeyUnits; ++u) {
          const i32 unit = own % kTeam + u * kTeam;
          if (unit >= kUnits) continue;
          const Floats of = floats_at(s.scratch.query + query * kSize, unit);
          MONO_UNROLLED
          for (i32 k = 0; k < kUnit; ++k) sum += of.x[k] * key[u * kUnit + k];
        }
        return sum;
      };
      // Each lane adds up the products of its own query: it gets its neighbour's and gives those of the other.
      const float left = product(queries[0]), right = product(queries[1]);
      float score = (mine ? right : left) + arch::swapped(mine ? left : right, 1);
      MONO_UNROLLED
      for (i32 mask = 2; mask < kTeam; mask *= 2) score += arch::swapped(score, mask);
      score = team < run.count ? score * kScale : -kInfinity;
      float highest = score > maximum ? score : maximum;
      MONO_UNROLLED
      for (i32 mask = kTeam; mask < kSquad; mask *= 2) {
        const float other = arch::swapped(highest, mask);
        highest = other > highest ? other : highest;
      }
      if (begin > 0) {
        const float shrink = exp_below(maximum - highest);
        sum *= shrink;
        MONO_UNROLLED
        for (i32 q = 0; q < 2; ++q) {
          const float of_query = of_squad_lane(shrink, q);
          MONO_UNROLLED
          for (float& x : out[q]) x *= of_query;
        }
      }
      maximum = highest;
      const float weight = exp_below(score - highest);
      float weights = weight;
      MONO_UNROLLED
      for (i32 mask = kTeam; mask < kSquad; mask *= 2) weights += arch::swapped(weights, mask);
      sum += weights;
      MONO_UNROLLED
      for (i32 n = 0; n < kTeams; ++n)
        MONO_UNROLLED
        for (i32 q = 0; q < 2; ++q) {
          const float of_query = of_squad_lane(weight, n * kTeam + q);
          MONO_UNROLLED
          for (i32 k = 0; k < kValueUnits * kUnit; ++k) out[q][k] += of_query * value[n][k];
        }
      if (!positions.any(begin + kRound)) continue;
      MONO_UNROLLED
      for (i32 r = 0; r + 1 < kAhead; ++r) rounds.of[r] = rounds.of[r + 1];
      rounds.of[kAhead - 1] = positions.load(keys, values, begin + kAhead * kRound);
    }
    if constexpr (kPairs > kPairsAtOnce) rounds = first_rounds(keys, values, visible, split, s.header);
    const i32 sharer = squad() % kSharers;
    if (own < 2) {
      float* to = part_of(s, sharer, mine ? queries[1] : queries[0]);
      to[1] = maximum;
      to[2] = sum;
    }
    MONO_UNROLLED
    for (i32 q = 0; q < 2; ++q)
      MONO_UNROLLED
      for (i32 u = 0; u < kValueUnits; ++u)
        if (own + u * kSquad < kUnits) {
          const float* x = out[q] + u * kUnit;
          reinterpret_cast<Floats*>(part_of(s, sharer, queries[q]) + 4)[own + u * kSquad] = {{x[0], x[1], x[2], x[3]}};
        }
  }
  arch::sync();
  // The last threads, because the first store heads.
  MONO_ROLLED
  for (i32 i = arch::kThreads - 1 - arch::thread(); i < kSharers * kQueries; i += arch::kThreads) {
    float maximum = kLowest, *part = part_of(s, 0, i);
    MONO_UNROLLED
    for (i32 k = 0; k < kSharers; ++k) {
      const float other = part_of(s, k, i % kQueries)[1];
      maximum = other > maximum ? other : maximum;
    }
    part[0] = exp_below(part[1] - maximum);
    part[3] = maximum;
  }
  if (visible.owned_by(s.header, split)) store_heads(s, keys, values, visible.position);
  arch::sync();
}

// The w-th word of a query's part, joined from all sharers'. They lie there as words do: one with maximum and sum, then the
// output.
template <class T>
MONO_DEVICE void attention_payload(const BlockState<T>& s, i32 query, i32 w, float (&payload)[kFloatsPerWord]) {
  static_assert(kPartHead == 1 && kFloatsPerWord == 3);
  constexpr i32 kTogether = kSharers < 4 ? kSharers : 4;
  MONO_ROLLED
  for (i32 i = 0; i < kSharers; i += kTogether) {
    const float* part = part_of(s, i, query);
    MONO_UNROLLED
    for (i32 k = 0; k < kTogether; ++k)
      for (i32 j = 0; j < kFloatsPerWord; ++j)
        payload[j] += part[k * kQueries * kPart] * part[k * kQueries * kPart + w * kFloatsPerWord + 1 + j];
  }
  if (w == 0) payload[0] = part_of(s, 0, query)[3];
}

}  // namespace mono::MONO_VARIANT
