// Sizes of a block's private memory that depend on its tiles. A GPU's program takes the most that any block needs, so that it knows
// where everything lies.
#pragma once

#include "kernel/plan.h"

namespace mono {

struct Extents {
  i64 touched_lanes;  // whose activations a column parallel product of the block reads
  i64 inputs;         // activations of the widest product
  i64 tiles;          // of the largest column parallel product
  i64 hidden_rows;    // own ones
};

// Of a device. h: a Header, or the constants that a program was compiled with.
template <class H>
constexpr i32 lanes_of_device(const H& h) {
  return h.num_lanes > 1 ? h.num_lanes / h.num_devices : 1;
}

// Lanes whose activations a block's tiles of a column parallel stage read.
constexpr Span touched_lanes(const Stage& stage, const Span& tiles) {
  if (tiles.count == 0) return {0, 0};
  const i32 first = tiles.first / stage.tiles_per_lane;
  return {first, (tiles.first + tiles.count - 1) / stage.tiles_per_lane - first + 1};
}

constexpr i64 larger(i64 a, i64 b) { return a > b ? a : b; }
constexpr Extents larger(const Extents& a, const Extents& b) {
  return {larger(a.touched_lanes, b.touched_lanes), larger(a.inputs, b.inputs), larger(a.tiles, b.tiles),
          larger(a.hidden_rows, b.hidden_rows)};
}

inline Extents block_extents(const Plan& plan, i32 device, i32 block) {
  const Header& h = *plan.header;
  const Device& d = plan.devices[device];
  const Block& b = plan.block(device, block);
  Extents most{0, 0, 0, i64(b.hidden.count) * h.tile_rows};
  constexpr i32 column_parallel[] = {kQkv, kUp, kHead}, row_parallel[] = {kO, kDown};
  for (const i32 stage : column_parallel) {
    const i64 lanes = touched_lanes(d.stages[stage], b.shares[stage]).count;
    most = larger(most, {lanes, lanes * h.hidden_width, b.shares[stage].count, 0});
  }
  for (const i32 stage : row_parallel) most = larger(most, {0, i64(lanes_of_device(h)) * d.stages[stage].width, 0, 0});
  return most;
}

}  // namespace mono
