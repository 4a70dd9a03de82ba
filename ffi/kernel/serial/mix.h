// Sums over lanes and the residual stream, a tile's rows at a time.
#pragma once

#include "kernel/layer.h"

namespace mono::MONO_VARIANT {

// A block has whole tiles of rows, of which the last may be padded. Vectors are passed by reference: how they are returned
// depends on the instruction set.
typedef float Rows __attribute__((vector_size(arch::kTileRows * sizeof(float))));
MONO_DEVICE void load(const float* at, Rows& out) { __builtin_memcpy(&out, at, sizeof out); }
MONO_DEVICE void store(const Rows& rows, float* at) { __builtin_memcpy(at, &rows, sizeof rows); }

// Publishes rows, `count` of which there are.
MONO_DEVICE void publish_rows(Shape h, Blocks readers, arch::Word* to, i32 count, u32 tag, const Rows& rows) {
  static_assert(kFloatsPerWord == 1, "one value per word");
  for (i32 i = 0; i < arch::kTileRows && i < count; ++i) {
    const float payload[1] = {rows[i]};
    publish(h, readers, to + i, arch::pack(tag, payload));
  }
}

// Calls body(row) for the first row of each of the block's tiles.
template <class T, class Body>
MONO_DEVICE void for_own_tiles(const BlockState<T>& s, Body body) {
  for (i32 row = 0; row < s.rows; row += arch::kTileRows) body(row);
}

// Sum over this device's lanes of a module's output of own rows; `outputs` is the first lane's, see BlockState::history.
MONO_DEVICE void own_sums(const float* outputs, i32 lanes, i32 lane_stride, i32 row, Rows& out) {
  Rows parts[kMaxLanes];
  for (i32 lane = 0; lane < lanes; ++lane) load(outputs + i64(lane) * lane_stride + row, parts[lane]);
  out = tree_sum(parts, lanes);
}

// Pushes the sums of own rows to the block of the same number on every other device.
template <class T>
MONO_DEVICE void push_sums(const BlockState<T>& s, i32 layer, i32 module) {
  const u32 tag = s.link.out_tag(inbox_channel(module), layer);
  const i64 run = (i64(s.device_index) * s.header.num_blocks + s.block_index) * s.header.hidden_run;
  arch::Word* to[kMaxDevices];
  for (i32 peer = 0; peer < s.header.num_devices; ++peer)
    to[peer] = s.peer_words(peer, s.scratch.channels[peer].inbox[module], layer) + run;
  const float* outputs = s.history(layer, module, 0);
  const i32 lanes = s.lanes(), stride = s.row_capacity();
  for_own_tiles(s, [&](i32 row) {
    Rows sums;
    own_sums(outputs, lanes, stride, row, sums);
    for (i32 peer = 0; peer < s.header.num_devices; ++peer)
      if (peer != s.device_index) publish_rows(s.header, Blocks::kOfAll, to[peer] + row, s.rows - row, tag, sums);
  });
}

// Sums over all lanes of all devices of a module's output of own rows, without each lane's own output if that is delayed, into
// scratch.arrived. A peer's word is its lanes' sum; the order of additions is the same on every device.
template <class T>
MONO_DEVICE void take_sums(BlockState<T>& s, i32 layer, i32 module, bool delayed) {
  const arch::Word* inbox = s.own_words(s.device.channels.inbox[module], layer) + i64(s.block_index) * s.header.hidden_run;
  const i64 run = i64(s.header.num_blocks) * s.header.hidden_run;
  const float* outputs = s.history(layer, module, 0);
  const i32 lanes = s.lanes(), stride = s.row_capacity();
  for_own_tiles(s, [&](i32 row) {
    Rows parts[kMaxDevices];
    for (i32 peer = 0; peer < s.header.num_devices; ++peer) {
      parts[peer] = Rows{};
      if (peer == s.device_index) {
        own_sums(outputs, lanes, stride, row, parts[peer]);
        continue;
      }
      for (i32 i = 0; i < arch::kTileRows && row + i < s.rows; ++i)
        parts[peer][i] = arch::value_of(s.link.wait(inbox + peer * run + row + i, inbox_channel(module), layer));
    }
    const Rows total = tree_sum(parts, s.header.num_devices);
    for (i32 lane = 0; lane < lanes; ++lane) {
      Rows own;
      load(outputs + i64(lane) * stride + row, own);
      store(delayed ? total - own : total, s.arrived(lane) + row);
    }
  });
}

// Adds a module's output and what has arrived (if any: `arrives`) to the block's own rows of the residual stream, and publishes
// them. Where sums arrive at once, they have the output already.
template <class T>
MONO_DEVICE void mix_rows(BlockState<T>& s, i32 layer, i32 module, bool arrives, bool immediate, float own_scale) {
  const u32 tag = s.link.out_tag(residual_channel(module), layer);
  const i32 run = s.header.hidden_run;
  arch::Word* to = s.own_words(s.device.channels.residual[module], layer) + i64(s.block_index) * run;
  for (i32 lane = 0; lane < s.lanes(); ++lane, to += hidden_words(s.header)) {
    float* x = s.residual(lane);
    const float *own = s.history(layer, module, lane), *others = s.arrived(lane);
    for_own_tiles(s, [&](i32 row) {
      Rows value, output, arrived;
      load(x + row, value);
      load(own + row, output);
      load(others + row, arrived);
      if (!immediate) value += own_scale * output;
      if (arrives) value += arrived;  // immediate: bit-identical in all lanes
      store(value, x + row);
      publish_rows(s.header, Blocks::kOfDevice, to + row, s.rows - row, tag, value);
      s.link.pump.steps(arch::kTileRows);
    });
  }
}

}  // namespace mono::MONO_VARIANT
