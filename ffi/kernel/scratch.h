// Private memory of a block: what only it reads and writes. Carved in one place, so that sizes and addresses cannot
// disagree; the host carves from null to learn the sizes.
//
// Near memory is small and fast (shared memory on a GPU), far memory is the rest. Vectors over the hidden size are rounded
// up to whole tile columns.
#pragma once

#include "kernel/plan.h"

namespace mono::MONO_VARIANT {

// Hands out parts of a piece of memory. Every part starts on its own cache line, so that blocks never share one.
class Carver {
 public:
  MONO_DEVICE explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class U>
  MONO_DEVICE void operator()(U*& out, i64 count) {
    out = reinterpret_cast<U*>(base_ + bytes);
    bytes += (count * i64(sizeof(U)) + 63) / 64 * 64;
  }
  i64 bytes = 0;

 private:
  char* base_;
};

MONO_DEVICE i64 larger(i64 a, i64 b) { return a > b ? a : b; }

// Lanes whose activations a block's tiles of a column parallel stage read.
MONO_DEVICE Span touched_lanes(const Stage& stage, const Span& tiles) {
  if (tiles.count == 0) return {0, 0};
  const i32 first = tiles.first / stage.tiles_per_lane;
  return {first, (tiles.first + tiles.count - 1) / stage.tiles_per_lane - first + 1};
}
MONO_DEVICE i32 most_touched_lanes(const Device& d, const Block& b) {
  const i64 qkv = touched_lanes(d.stages[kQkv], b.shares[kQkv]).count, up = touched_lanes(d.stages[kUp], b.shares[kUp]).count;
  return i32(larger(larger(qkv, up), touched_lanes(d.stages[kHead], b.shares[kHead]).count));
}

// What every target needs. Workspace is the family's own part (serial/workspace.h, simt/workspace.h).
template <class T, class Workspace>
struct Scratch {
  // Near.
  Device* device;  // copies of the records that every stage looks at
  Block* share;
  Channels* channels;  // of all devices
  Layer* layers;
  i32* up_tiles;    // [blocks + 1] where each block's tiles of the up stage start
  float* rope;      // [head_dim / 2, 2] cosines and sines of the position at hand
  i32* flags;       // [2] see Link
  T* activations;   // [lanes, width] input of the product at hand, zero-padded to whole chunks
  float* rows;      // [tiles, tile rows] results of a column parallel product; those of the head stay until sampling
  float* query;     // [queries_per_kv, head_dim], then key [head_dim], then value [head_dim]; shares memory with rows
  float* residual;  // [lanes, rows] own rows of the residual stream
  float* history;   // [history_layers, modules, lanes, rows] module outputs of own rows
  float* total;     // [rows] sum over all lanes
  Workspace work;
  // Far.
  float* logits;  // block 0: [vocab]
  float* scores;  // block 0: [vocab] penalised and scaled
  u32* seen;      // [vocab / 32] bit per token that the repetition penalty applies to

  i64 near_bytes, far_bytes;

  MONO_DEVICE Scratch(const Plan& plan, i32 device_index, i32 block, void* near, void* far) {
    const Header& h = *plan.header;
    const Device& d = plan.devices[device_index];
    const Block& b = plan.block(device_index, block);
    const i64 lanes = d.lanes.count, own_rows = i64(b.hidden.count) * h.tile_rows, group = h.queries_per_kv;
    const i64 inputs = larger(i64(most_touched_lanes(d, b)) * h.hidden_width,
                              lanes * larger(d.stages[kO].width, d.stages[kDown].width));
    const i64 tiles = larger(larger(b.shares[kQkv].count, b.shares[kUp].count), b.shares[kHead].count);
    Carver carve_near(near), carve_far(far);
    carve_near(device, 1);
    carve_near(share, 1);
    carve_near(channels, h.num_devices);
    carve_near(layers, h.num_layers);
    carve_near(up_tiles, h.num_blocks + 1);
    carve_near(rope, h.head_dim);
    carve_near(flags, 2);
    carve_near(activations, larger(inputs, Workspace::kernel_bytes(h) / i64(sizeof(T))));
    const i64 heads = (group + 2) * h.head_dim;
    carve_near(rows, larger(tiles * h.tile_rows, heads));
    query = rows;
    carve_near(residual, lanes * own_rows);
    carve_near(history, i64(h.history_layers) * kModules * lanes * own_rows);
    carve_near(total, own_rows);
    work.carve(carve_near, h, d, b);
    const i64 vocab = block == 0 ? h.vocab_size : 0;
    carve_far(logits, vocab);
    carve_far(scores, vocab);
    carve_far(seen, (i64(h.vocab_size) + 31) / 32);
    near_bytes = carve_near.bytes;
    far_bytes = carve_far.bytes;
  }
};

}  // namespace mono::MONO_VARIANT
