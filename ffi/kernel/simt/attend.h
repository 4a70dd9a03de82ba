// Softmax(q K) V of one split, for two queries at a time, by squads of 32 lanes. A squad takes a few positions of a chunk, the
// newest first: teams of lanes multiply the keys, one position each; then every lane adds up its elements of all the values. A
// squad keeps a running maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018); what squads have
// found of a query is joined at the end.
//
// A short context is one round. Its code runs once per layer, in few blocks, and takes as long as it is: so it has few
// instructions. In a long context, a round takes as long as its longest chain of dependent instructions, or until what the next
// one needs is loaded: so kAhead rounds are taken together, while those that follow are loaded.
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
static_assert(kAhead > 1, "a round that is taken alone is the last");

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
template <class T>
MONO_DEVICE Unit unit_of(const Floats& floats) {
  Unit unit{};
  MONO_UNROLLED
  for (i32 k = 0; k < kUnit; ++k) {
    T x;
    arch::from_float(floats.x[k], x);
    unit.words[k / 2] |= u32(x.bits) << (k % 2 * 16);
  }
  return unit;
}
MONO_DEVICE Floats floats_at(const float* at, i32 unit) { return reinterpret_cast<const Floats*>(at)[unit]; }

constexpr float inverse_root(i32 n) {
  double root = n;
  for (i32 i = 0; i < 40; ++i) root = 0.5 * (root + n / root);
  return float(1.0 / root);
}

MONO_DEVICE i32 squad() { return arch::thread() / kSquad; }
MONO_DEVICE i32 squad_lane() { return arch::thread() % kSquad; }
MONO_DEVICE float of_squad_lane(float x, i32 lane) { return arch::of_lane(x, arch::lane() / kSquad * kSquad + lane); }

// A lane's parts of what its squad takes in a round: of its team's key, and of the values of all teams' positions.
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
template <class T>
struct Positions {
  const T *keys, *values;
  Visible visible;
  i32 last;  // chunk of the split

  MONO_DEVICE Positions(const T* k, const T* v, const Visible& of, i32 split, Shape h) : keys(k), values(v), visible(of) {
    last = of.last_chunk - (of.last_chunk % h.kv_splits - split + h.kv_splits) % h.kv_splits;
  }
  MONO_DEVICE i32 chunk(i32 i) const { return last - i32(u32(i) / Shape::kv_chunk) * Shape::kv_splits; }
  MONO_DEVICE bool any(i32 begin) const { return chunk(begin) >= visible.first_chunk; }
  MONO_DEVICE Run run(i32 begin) const {
    const i32 i = begin + squad() % kSharers * kTeams, start = chunk(i) * Shape::kv_chunk;
    const i32 end = chunk(i) == visible.last_chunk ? visible.position : start + Shape::kv_chunk - 1;
    const i32 first = visible.first > start ? visible.first : start, newest = end - i32(u32(i) % Shape::kv_chunk);
    return {newest, newest - first + 1};
  }
  // Asks the cache for them. It does not have the token's own position yet: what comes for that is to be replaced.
  MONO_DEVICE Round load(i32 begin) const {
    Round round{};
    const Run of = run(begin);
    const i32 own = squad_lane(), team = own / kTeam;
    const Unit* key = reinterpret_cast<const Unit*>(keys) + i64(of.newest - team) * kUnits + own % kTeam;
    const Unit* value = reinterpret_cast<const Unit*>(values) + i64(of.newest) * kUnits + own;
    if (team < of.count) {
      MONO_UNROLLED
      for (i32 u = 0; u < kKeyUnits; ++u)
        if (own % kTeam + u * kTeam < kUnits) round.key[u] = key[u * kTeam];
    }
    MONO_UNROLLED
    for (i32 n = 0; n < kTeams; ++n)
      MONO_UNROLLED
      for (i32 u = 0; u < kValueUnits; ++u)
        if (n < of.count && own + u * kSquad < kUnits) round.value[n][u] = value[u * kSquad - n * kUnits];
    return round;
  }
  // The first of them. If one round is all, nobody looks at the others.
  MONO_DEVICE Rounds first_rounds() const {
    Rounds rounds;
    rounds.of[0] = load(0);
    if (!any(kRound)) return rounds;
    MONO_UNROLLED
    for (i32 r = 1; r < kAhead; ++r) rounds.of[r] = load(r * kRound);
    return rounds;
  }
};

template <class T>
MONO_DEVICE Rounds first_rounds(const T* keys, const T* values, const Visible& visible, i32 split, Shape h) {
  return Positions<T>(keys, values, visible, split, h).first_rounds();
}

// Puts the token's own key and value, which were received, where a squad that takes its position would have loaded them.
template <class T>
MONO_DEVICE void put_own(const float* key, const float* value, Round& round) {
  const i32 own = squad_lane();
  MONO_UNROLLED
  for (i32 u = 0; u < kKeyUnits; ++u)
    if (own < kTeam && own + u * kTeam < kUnits) round.key[u] = unit_of<T>(floats_at(key, own + u * kTeam));
  MONO_UNROLLED
  for (i32 u = 0; u < kValueUnits; ++u)
    if (own + u * kSquad < kUnits) round.value[0][u] = unit_of<T>(floats_at(value, own + u * kSquad));
}

// What a squad has found of a pair of queries. A lane looks after the maximum of one: lane % 2.
struct Found {
  float maximum = kLowest;
  float sum[2] = {}, out[2][kValueUnits * kUnit] = {};
};

// Takes kCount rounds from `begin` on together, so that their chains of instructions overlap; the scores of rounds that are not
// there are -infinity. More than one are followed by as many, which are loaded meanwhile, all into registers that nothing moves
// before the end: a move would wait for the load.
template <i32 kCount, class T>
MONO_DEVICE void take(const Positions<T>& positions, i32 begin, const float* const (&queries)[2], Rounds& rounds,
                      Found& found) {
  constexpr i32 kParts = 2 * kCount;  // scores that a team adds up: 2 r + q is of the r-th round and the q-th query
  static_assert(kTeam % kParts == 0, "every score has a lane");
  constexpr float kScale = inverse_root(Shape::head_dim);
  const i32 own = squad_lane(), team = own / kTeam;
  const Rounds now = rounds;
  if constexpr (kCount > 1) {
    MONO_UNROLLED
    for (i32 r = 0; r < kCount; ++r) rounds.of[r] = positions.load(begin + (kCount + r) * kRound);
  }
  float part[kParts] = {};
  MONO_UNROLLED
  for (i32 u = 0; u < kKeyUnits; ++u) {
    const i32 unit = own % kTeam + u * kTeam;
    if (unit >= kUnits) continue;
    MONO_UNROLLED
    for (i32 q = 0; q < 2; ++q) {
      const Floats of = floats_at(queries[q], unit);
      MONO_UNROLLED
      for (i32 r = 0; r < kCount; ++r)
        MONO_UNROLLED
        for (i32 k = 0; k < kUnit; ++k) part[2 * r + q] += of.x[k] * element<T>(now.of[r].key[u], k);
    }
  }
  // At each exchange a lane keeps half of the scores: it gets its neighbour's parts of them and gives those of the others. In
  // the end it has number lane % kParts.
  MONO_UNROLLED
  for (i32 mask = 1; mask < kParts; mask *= 2)
    MONO_UNROLLED
    for (i32 i = 0; i < kParts / (2 * mask); ++i) {
      const float even = part[2 * i], odd = part[2 * i + 1];
      part[i] = (own & mask ? odd : even) + arch::swapped(own & mask ? even : odd, mask);
    }
  float score = part[0];
  MONO_UNROLLED
  for (i32 mask = kParts; mask < kTeam; mask *= 2) score += arch::swapped(score, mask);
  score = team < positions.run(begin + own % kParts / 2 * kRound).count ? score * kScale : -kInfinity;
  float highest = score > found.maximum ? score : found.maximum;
  MONO_UNROLLED
  for (i32 mask = 2; mask < kSquad; mask *= 2) {
    if (mask >= kParts && mask < kTeam) continue;  // the same score
    const float other = arch::swapped(highest, mask);
    highest = other > highest ? other : highest;
  }
  const float weight = exp_below(score - highest);
  if (kCount > 1 || begin > 0) {  // a single round may be the first
    const float shrink = exp_below(found.maximum - highest);
    MONO_UNROLLED
    for (i32 q = 0; q < 2; ++q) {
      const float of_query = of_squad_lane(shrink, q);
      found.sum[q] *= of_query;
      MONO_UNROLLED
      for (float& x : found.out[q]) x *= of_query;
    }
  }
  found.maximum = highest;
  MONO_UNROLLED
  for (i32 r = 0; r < kCount; ++r)
    MONO_UNROLLED
    for (i32 n = 0; n < kTeams; ++n)
      MONO_UNROLLED
      for (i32 q = 0; q < 2; ++q) {
        const float of_query = of_squad_lane(weight, n * kTeam + 2 * r + q);
        found.sum[q] += of_query;
        MONO_UNROLLED
        for (i32 k = 0; k < kValueUnits * kUnit; ++k)
          found.out[q][k] += of_query * element<T>(now.of[r].value[n][k / kUnit], k % kUnit);
      }
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
  const float* own_key = s.scratch.query + kQueries * kSize;  // the value follows
  const Positions<T> positions(keys, values, visible, split, s.header);
  const i32 own = squad_lane();
  MONO_ROLLED
  for (i32 pair = squad() / kSharers; pair < kPairs; pair += kPairsAtOnce) {
    const i32 queries[2] = {2 * pair, 2 * pair + 1 < kQueries ? 2 * pair + 1 : 2 * pair};
    const float* at[2] = {s.scratch.query + queries[0] * kSize, s.scratch.query + queries[1] * kSize};
    if (positions.run(0).newest == visible.position) put_own<T>(own_key, own_key + kSize, rounds.of[0]);
    Found found;
    // All squads go round equally often, because lanes meet in shuffles.
    i32 begin = 0;
    MONO_ROLLED
    for (; positions.any(begin + kRound); begin += kAhead * kRound) take<kAhead>(positions, begin, at, rounds, found);
    if (positions.any(begin)) take<1>(positions, begin, at, rounds, found);
    if constexpr (kPairs > kPairsAtOnce) rounds = positions.first_rounds();
    const i32 sharer = squad() % kSharers;
    if (own < 2) {
      float* to = part_of(s, sharer, own ? queries[1] : queries[0]);
      to[1] = found.maximum;
      to[2] = own ? found.sum[1] : found.sum[0];
    }
    MONO_UNROLLED
    for (i32 q = 0; q < 2; ++q)
      MONO_UNROLLED
      for (i32 u = 0; u < kValueUnits; ++u)
        if (own + u * kSquad < kUnits) {
          const float* x = found.out[q] + u * kUnit;
          reinterpret_cast<Floats*>(part_of(s, sharer, queries[q]) + 4)[own + u * kSquad] = {{x[0], x[1], x[2], x[3]}};
        }
  }
  arch::sync();
  // The last threads, because the first store heads.
  MONO_ROLLED
  for (i32 i = arch::kThreads - 1 - arch::thread(); i < kSharers * kQueries; i += arch::kThreads) {
    float maximum = -kInfinity, *part = part_of(s, 0, i);
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
