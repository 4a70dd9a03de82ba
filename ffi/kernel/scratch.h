// Private memory of a block: what only it reads and writes. Carved in one place, so that sizes and addresses cannot
// disagree; the host carves from null to learn the sizes.
//
// Near memory is small and fast (shared memory on a GPU), far memory is the rest. Vectors over the hidden size are rounded
// up to whole tile columns.
#pragma once

#include "kernel/extents.h"

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
  float* arrived;   // [lanes, rows] what a module's end adds to own rows besides the lane's own output
  Workspace work;
  // Far.
  float* logits;  // block 0: [vocab]
  float* scores;  // block 0: [vocab] penalised and scaled
  u32* seen;      // [vocab / 32] bit per token that the repetition penalty applies to

  i64 near_bytes, far_bytes;

  // h: as for lanes_of_device().
  template <class H>
  MONO_DEVICE Scratch(const H& h, const Extents& extents, bool first_block, void* near, void* far) {
    const i64 lanes = lanes_of_device(h), own_rows = extents.hidden_rows;
    Carver carve_near(near), carve_far(far);
    carve_near(device, 1);
    carve_near(share, 1);
    carve_near(channels, h.num_devices);
    carve_near(layers, h.num_layers);
    carve_near(up_tiles, h.num_blocks + 1);
    carve_near(rope, h.head_dim);
    carve_near(flags, 2);
    carve_near(activations, larger(extents.inputs, Workspace::kernel_bytes(h) / i64(sizeof(T))));
    const i64 heads = i64(h.queries_per_kv + 2) * h.head_dim;
    carve_near(rows, larger(extents.tiles * h.tile_rows, heads));
    query = rows;
    carve_near(residual, lanes * own_rows);
    carve_near(history, i64(h.history_layers) * kModules * lanes * own_rows);
    carve_near(arrived, lanes * own_rows);
    work.carve(carve_near, h, extents);
    const i64 vocab = first_block ? h.vocab_size : 0;
    carve_far(logits, vocab);
    carve_far(scores, vocab);
    carve_far(seen, (i64(h.vocab_size) + 31) / 32);
    near_bytes = carve_near.bytes;
    far_bytes = carve_far.bytes;
  }
};

}  // namespace mono::MONO_VARIANT
