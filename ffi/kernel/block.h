// One block: its share of the plan, its private memory, and addresses of everything it touches.
//
// A block is one thread on a CPU and many on a GPU. Stage code is written for many: every thread runs it, arch::for_each
// deals out the items, arch::sync() stands between writing near memory and reading what other threads wrote. With one
// thread both are nothing. The family (serial or simt) supplies the loops that are worth writing twice:
//
//   product<stage>(s, layer, out, part_stride, receive)   a block's tiles of one stage, with what receive() waits for
//   norm_words / norm_embedding(s, ...)                   RMSNorm of a vector as it arrives
//   lane_inverses(s, ...)                                 1 / RMS of whole lanes
//   input_lanes(s, stage)                                 lanes that a block's tiles of a column parallel stage read
//   attend(s, keys, values, ...), attention_payload(...)  softmax(q K) V over the positions of one split
//   join_parts(s, layer, parts)                           the splits' outputs, joined
//   prepare(work, device, share)                          sets up the family's own memory
#pragma once

#include "kernel/compressed.h"
#include "kernel/handoff.h"
#include "kernel/maths.h"
#include "kernel/scratch.h"

namespace mono::MONO_VARIANT {

// Whether all blocks have the same number of hidden rows, in full words. A program that is compiled for one model then knows
// where rows and words are.
MONO_DEVICE bool even_rows(Shape h) { return h.hidden_size == h.num_blocks * h.hidden_run * kFloatsPerWord; }

// The die that a block belongs to; the even_counts of place() in jax_mono/placement.py.
MONO_DEVICE i32 die_of(Shape h, i32 block) {
  if (h.num_dies == 1) return 0;
  const i32 each = h.num_blocks / h.num_dies, more = h.num_blocks % h.num_dies, in_larger = more * (each + 1);
  return block < in_larger ? block / (each + 1) : more + (block - in_larger) / (each > 0 ? each : 1);
}

template <class T>
struct BlockState {
  const Call& call;
  Shape header;
  const arch::Known device_index, block_index;
  Scratch<T, Workspace<T>> scratch;
  const Device& device;
  const Block& share;
  Link link;
  i32 first_row, rows;  // own hidden rows

  MONO_DEVICE BlockState(const Call& c, i32 block, void* near, void* far)
      : call(c),
        header(shape_of(c.plan)),
        device_index(c.device),
        block_index(block),
        scratch(header, extents_of(c.plan, c.device, block), block == 0, near, far),
        device(*scratch.device),
        share(*scratch.share),
        link{c.control, c.control->places + c.device * header.num_blocks + block, scratch.flags, scratch.flags + 1} {
    if (arch::thread() == 0) {
      *scratch.device = c.plan.devices[c.device];
      *scratch.share = c.plan.block(c.device, block);
      const Control& control = *c.control;
      scratch.flags[0] = 0;
      scratch.flags[1] = control.lost_device == c.device && control.lost_block == block
                             ? Link::hand_off(Channel(control.lost_channel), control.lost_layer)
                             : -1;
    }
    arch::for_each(header.num_devices, [&](i32 i) { scratch.channels[i] = c.plan.devices[i].channels; });
    arch::for_each(header.num_layers, [&](i32 i) { scratch.layers[i] = c.plan.layers[i]; });
    arch::for_each(header.num_blocks, [&](i32 i) {
      const Span& tiles = c.plan.block(c.device, i).shares[kUp];
      scratch.up_tiles[i] = tiles.first;
      if (i + 1 == header.num_blocks) scratch.up_tiles[i + 1] = tiles.first + tiles.count;
    });
    arch::sync();
    prepare(scratch.work, device, share);
    arch::sync();
    first_row = share.hidden.first * arch::kTileRows;
    rows = row_capacity();
    if (!even_rows(header) && first_row + rows > header.hidden_size) rows = header.hidden_size - first_row;
  }

  // Of this device. From the header, which is a constant where the program is compiled for one model.
  MONO_DEVICE i32 lanes() const { return lanes_of_device(header); }
  MONO_DEVICE i32 kv_heads() const { return header.num_lanes > 1 ? header.max_kv_heads : device.kv_heads.count; }
  MONO_DEVICE i32 heads_per_lane() const { return kv_heads() / lanes(); }
  MONO_DEVICE i32 row_capacity() const {
    return even_rows(header) ? header.hidden_run * kFloatsPerWord : share.hidden.count * arch::kTileRows;
  }
  MONO_DEVICE float* history(i32 layer, i32 module, i32 lane) const {
    return scratch.history + ((layer % header.history_layers * kModules + module) * lanes() + lane) * row_capacity();
  }
  MONO_DEVICE float* arrived(i32 lane) const { return scratch.arrived + lane * row_capacity(); }
  MONO_DEVICE float* residual(i32 lane) const { return scratch.residual + lane * row_capacity(); }

  // First word of a per-layer channel, of this device and of a peer: where it is written, and its only copy or the first.
  MONO_DEVICE arch::Word* own_words(i64 channel, i32 layer) const {
    return exchange(device_index) + channel + device.channels.layer_stride * layer;
  }
  MONO_DEVICE arch::Word* peer_words(i32 peer, i64 channel, i32 layer) const {
    return exchange(peer) + channel + scratch.channels[peer].layer_stride * layer;
  }
  // First word of a once-per-token channel.
  MONO_DEVICE arch::Word* exchange(i32 on_device) const { return static_cast<arch::Word*>(call.exchange[on_device]); }
  // The same of a channel in which even and odd tokens take turns; `length` is that of one turn.
  MONO_DEVICE arch::Word* turn_words(i32 on_device, i64 channel, i64 length) const {
    return exchange(on_device) + channel + (link.tag & 1) * length;
  }
  // Where this block polls a channel that has a copy per die.
  MONO_DEVICE const arch::Word* own_copy(const arch::Word* first) const {
    return first + die_of(header, block_index) * header.copy_words;
  }

  // First weight of a stage. Programs that read tapes in granules have a walk of their own (simt/walk.h).
  MONO_DEVICE const T* tape(StageIndex stage, i32 layer) const {
    const T* base = stage == kHead ? static_cast<const T*>(call.head) + share.head
                                   : static_cast<const T*>(call.layers) + share.layers + layer * header.layer_words;
    return base + share.offsets[stage];
  }
  MONO_DEVICE const float* constants(i64 offset) const { return call.constants + offset; }

  // Notes that the token at hand has come to a moment. Costs nothing where arch::kTraces is false.
  MONO_DEVICE void note(Mark mark, i32 layer = 0) const {
    if constexpr (!arch::kTraces) return;
    const i32 token = i32(link.tag) - 1 - call.trace.first;
    if (!call.trace.times || token < 0 || token >= call.trace.tokens || arch::thread() != 0) return;
    const i32 per_token = marks_per_token(header.num_layers);
    const i32 index = mark <= kMlpMixed ? mark + layer * kLayerMarks : mark + (header.num_layers - 1) * kLayerMarks;
    call.trace.times[(i64(block_index) * call.trace.tokens + token) * per_token + index] = arch::trace_clock();
  }
};

// Where a block's hidden rows start, and how many it has; the same on every device. Words of a run of hidden rows, with
// the block they belong to: even_counts, or spread_counts over several dies, in jax_mono/plan.py.
struct HiddenRun {
  i32 first, count;

  MONO_DEVICE HiddenRun(Shape h, i32 block) {
    const i32 tiles = (h.hidden_size + h.tile_rows - 1) / h.tile_rows;
    if (h.num_dies == 1) {
      const i32 each = tiles / h.num_blocks, more = tiles % h.num_blocks;
      first = (block * each + (block < more ? block : more)) * h.tile_rows;
      count = (each + (block < more)) * h.tile_rows;
    } else {
      first = block * tiles / h.num_blocks * h.tile_rows;
      count = (block + 1) * tiles / h.num_blocks * h.tile_rows - first;
    }
    if (first + count > h.hidden_size) count = h.hidden_size - first;
  }
};

// Of a vector over the hidden size, published in runs: the values of its w-th word.
struct HiddenWord {
  i32 first, count;  // hidden rows

  MONO_DEVICE HiddenWord(Shape h, i32 w) : first(w * kFloatsPerWord), count(kFloatsPerWord) {
    if (even_rows(h)) return;
    const i32 block = w / h.hidden_run, at = (w - block * h.hidden_run) * kFloatsPerWord;
    const HiddenRun run(h, block);
    first = run.first + at;
    count = run.count - at;
    if (count > kFloatsPerWord) count = kFloatsPerWord;
  }
};
MONO_DEVICE i32 hidden_words(Shape h) { return h.num_blocks * h.hidden_run; }

// Writes zeros behind a lane's activations, up to whole chunks.
template <class T>
MONO_DEVICE void pad_activations(T* out, i32 count, i32 width) {
  arch::for_each(width - count, [&](i32 i) { arch::from_float(0.0f, out[count + i]); });
}

}  // namespace mono::MONO_VARIANT
