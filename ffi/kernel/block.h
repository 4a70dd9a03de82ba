// One block: its share of the plan, its private memory, and addresses of everything it touches.
#pragma once

#include "handoff.h"
#include "maths.h"

namespace mono::MONO_VARIANT {

// Private memory of a block in 8-byte words: residuals, histories and activations that only it reads and writes.
// Carved in one place, so that the size and the addresses cannot disagree.
template <class T>
struct Scratch {
  float* x;         // [lanes, hidden] residual stream as last received
  T* activations;   // [lanes, width] input of the product at hand, zero-padded to whole chunks
  float* residual;  // [lanes, rows] own rows of the residual stream
  float* history;   // [layers, modules, lanes, rows] module outputs of own rows, this token
  float* query;     // [queries_per_kv, head_dim]
  float* parts;     // [queries_per_kv, head_dim] unnormalised attention output
  float* key;       // [head_dim], then value [head_dim]
  float* logits;    // [head rows] of this block; later, in block 0, [vocab]
  float* scores;    // [vocab] block 0: penalised and scaled logits
  u32* seen;        // [vocab / 32] bit per token that the repetition penalty applies to
  i64 words;

  Scratch(const Plan& plan, i32 device, i32 block, u64* base) {
    const Header& h = *plan.header;
    const Device& d = plan.devices[device];
    const Block& b = plan.block(device, block);
    i64 lanes = d.lanes.count, rows = i64(b.hidden.count) * h.tile_rows, group = h.queries_per_kv;
    i64 width = h.hidden_width;
    if (d.stages[kO].width > width) width = d.stages[kO].width;
    if (d.stages[kDown].width > width) width = d.stages[kDown].width;
    words = 0;
    carve(base, x, lanes * h.hidden_size);
    carve(base, activations, lanes * width);
    carve(base, residual, lanes * rows);
    carve(base, history, i64(h.num_layers) * kModules * lanes * rows);
    carve(base, query, group * h.head_dim);
    carve(base, parts, group * h.head_dim);
    carve(base, key, 2 * h.head_dim);
    i64 head_rows = i64(b.shares[kHead].count) * h.tile_rows;
    carve(base, logits, block == 0 && h.vocab_size > head_rows ? h.vocab_size : head_rows);
    carve(base, scores, block == 0 ? i64(h.vocab_size) : 0);
    carve(base, seen, (i64(h.vocab_size) + 31) / 32);
  }

 private:
  // Every array starts on its own cache line, so that blocks never share one.
  template <class U>
  void carve(u64* base, U*& out, i64 count) {
    out = reinterpret_cast<U*>(base + words);
    words += (count * i64(sizeof(U)) + 63) / 64 * 8;
  }
};

template <class T>
struct BlockState {
  const Call& call;
  const Header& header;
  const Device& device;
  const Block& share;
  const i32 device_index, block_index;
  Scratch<T> scratch;
  Link link;
  i32 first_row, rows;  // own hidden rows

  BlockState(const Call& c, i32 block)
      : call(c),
        header(*c.plan.header),
        device(c.plan.devices[c.device]),
        share(c.plan.block(c.device, block)),
        device_index(c.device),
        block_index(block),
        scratch(c.plan, c.device, block, c.scratch),
        link{c.control, c.device, block, c.control->places + c.device * c.plan.header->num_blocks + block} {
    u64* base = c.scratch;
    for (i32 b = 0; b < block; ++b) base += Scratch<T>(c.plan, c.device, b, nullptr).words;
    scratch = Scratch<T>(c.plan, c.device, block, base);
    first_row = share.hidden.first * header.tile_rows;
    rows = share.hidden.count * header.tile_rows;
    if (first_row + rows > header.hidden_size) rows = header.hidden_size - first_row;
  }

  i32 lanes() const { return device.lanes.count; }
  i32 heads_per_lane() const { return device.kv_heads.count / device.lanes.count; }
  i32 row_capacity() const { return share.hidden.count * header.tile_rows; }
  float* history(i32 layer, i32 module, i32 lane) const {
    return scratch.history + ((i64(layer) * kModules + module) * lanes() + lane) * row_capacity();
  }
  float* residual(i32 lane) const { return scratch.residual + lane * row_capacity(); }

  // First word of a per-layer channel on some device.
  arch::Word* words(i32 on_device, i64 channel, i32 layer) const {
    const Channels& channels = call.plan.devices[on_device].channels;
    return call.exchange[on_device] + channel + channels.layer_stride * layer;
  }
  arch::Word* own_words(i64 channel, i32 layer) const { return words(device_index, channel, layer); }
  // First word of a two-copy channel; `length` is that of one copy.
  arch::Word* turn_words(i32 on_device, i64 channel, i64 length) const {
    return call.exchange[on_device] + channel + (link.tag & 1) * length;
  }

  const T* tape(StageIndex stage, i32 layer) const {
    const T* base = stage == kHead
                        ? static_cast<const T*>(call.head) + header.head_words * block_index
                        : static_cast<const T*>(call.layers) +
                              (i64(block_index) * header.num_layers + layer) * header.layer_words;
    return base + share.offsets[stage];
  }
  const float* constants(i64 offset) const { return call.constants + offset; }
};

// Writes a lane's activations, rounded to the weight type and zero-padded to whole chunks.
template <class T>
MONO_DEVICE void pad_activations(T* out, i32 count, i32 width) {
  for (i32 i = count; i < width; ++i) arch::from_float(0.0f, out[i]);
}

}  // namespace mono::MONO_VARIANT
