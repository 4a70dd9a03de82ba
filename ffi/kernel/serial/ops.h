// The loops of a block that is one thread.
#pragma once

#include "kernel/attention.h"
#include "kernel/serial/offer.h"
#include "kernel/serial/compressed.h"
#include "kernel/serial/join.h"
#include "kernel/serial/softmax.h"

namespace mono::MONO_VARIANT {

template <class T>
void prepare(Workspace<T>&, const Device&, const Block&) {}

template <class T>
Span input_lanes(const BlockState<T>& s, StageIndex stage) {
  return touched_lanes(s.device.stages[stage], s.share.shares[stage]);
}

// The product after `index` of `layer`, where the pump fetches next: the next layer's after the last of a layer, the head
// after the last layer, the first layer of the next token after the head.
template <class T>
void aim_pump(BlockState<T>& s, StageIndex index, i32 layer) {
  StageIndex next = StageIndex(index + 1);
  if (index == kHead) {
    next = kQkv;
    layer = 0;
  } else if (index == kDown && layer + 1 < s.header.num_layers) {
    next = kQkv;
    ++layer;
  }
  const i64 words = s.share.shares[next].count * s.device.stages[next].tile_words;
  s.link.pump.aim(s.tape(next, layer), words * i64(sizeof(T)));
  s.link.pump.help_with(s.call.offers, s.header.num_devices * s.header.num_blocks);
}

// A block's tiles of one stage, and what they are multiplied with.
template <class T>
struct Product {
  const T *tape, *activations;
  float* out;
  i64 part_words;  // of a tile's part
  i32 parts, part_stride, width, chunks;
  i32 piece_chunks;                // of compressed tapes, else 0
  i32 first_tile, tiles_per_lane;  // of a column parallel stage, whose tiles read the activations of their lane

  MONO_DEVICE void multiply(i32 tile) const {
    const T* part_of = tape + i64(tile) * parts * part_words;
    for (i32 part = 0; part < parts; ++part, part_of += part_words) {
      const i32 lane = part_stride ? part : (first_tile + tile) / tiles_per_lane - first_tile / tiles_per_lane;
      float* sums = out + i64(part) * part_stride + tile * arch::kTileRows;
      if (piece_chunks) {
        dot_compressed(part_of, activations + i64(lane) * width, chunks, piece_chunks, sums);
      } else {
        arch::dot_tile(part_of, activations + i64(lane) * width, chunks, sums);
      }
    }
  }
};

// Multiplies a block's tiles of a stage with the activations, which receive() waits for and writes. A tile has one part per lane in a
// row parallel stage, else one part: out[part * part_stride + row].
template <StageIndex kStage, class T, class Receive>
MONO_DEVICE void product(BlockState<T>& s, i32 layer, float* out, i32 part_stride, Receive receive) {
  receive();
  const Stage& stage = s.device.stages[kStage];
  const Span& run = s.share.shares[kStage];
  const i32 parts = part_stride ? stage.lanes : 1;
  const i32 chunks = stage.width / arch::kTileCols;
  const i32 piece = s.header.compressed ? piece_chunks(chunks, kLongestPiece, true) : 0;
  const Product<T> product{s.tape(kStage, layer), s.scratch.activations, out,    stage.tile_words / parts,
                           parts,                part_stride,           i32(stage.width), chunks,
                           piece,                run.first,             stage.tiles_per_lane};
  aim_pump(s, kStage, layer);
  if (piece) {
    const i32 lanes = part_stride ? parts : touched_lanes(stage, run).count;
    arrange(s.scratch.activations, i64(lanes) * stage.width);
  }
  if (s.call.offers && run.count <= OpenTiles::kMost) {
    const i32 own = s.device_index * s.header.num_blocks + s.block_index;
    multiply_with_help(s.call.offers[own], product, run.count, s.link.pump);
  } else {
    for (i32 tile = 0; tile < run.count; ++tile) product.multiply(tile);
  }
}

// Turns lanes in work.x into activations: normalised with a scale, or as they are without one.
template <class T>
void store_normed(BlockState<T>& s, i32 lanes, const float* scale) {
  const i32 hidden = s.header.hidden_size, width = s.header.hidden_width;
  const float stored = activation_scale(s.header);
  constexpr i32 kPart = 512;
  for (i32 lane = 0; lane < lanes; ++lane) {
    const float* x = s.scratch.work.x + i64(lane) * width;
    T* out = s.scratch.activations + i64(lane) * width;
    if (scale) {
      const float inverse = stored / arch::sqrt(arch::sum_of_squares(x, hidden) / float(hidden) + s.header.norm_eps);
      for (i32 i = 0; i < hidden; i += kPart) {
        arch::scale_vector(x + i, inverse, scale + i, out + i, hidden - i < kPart ? hidden - i : kPart);
        s.link.pump.steps(kPart / 16);
      }
    } else {
      for (i32 i = 0; i < hidden; ++i) arch::from_float(x[i] * stored, out[i]);
    }
    pad_activations(out, hidden, width);
  }
}

// RMSNorm of `lanes` consecutive vectors, published in runs from `from` on, into the activations.
template <class T>
void norm_words(BlockState<T>& s, const arch::Word* from, i32 lanes, Channel channel, i32 layer, const float* scale) {
  static_assert(kFloatsPerWord == 1, "one value per word");
  Shape h = s.header;
  for (i32 lane = 0; lane < lanes; ++lane) {
    for (i32 block = 0; block < h.num_blocks; ++block) {
      const HiddenRun run(h, block);
      const arch::Word* words = from + i64(lane) * hidden_words(h) + i64(block) * h.hidden_run;
      float* x = s.scratch.work.x + i64(lane) * h.hidden_width + run.first;
      s.link.read(
          run.count, channel, layer, [&](i32 i) { return words + i; },
          [&](i32 i, const arch::Word& word) { x[i] = arch::value_of(word); });
    }
  }
  store_normed(s, lanes, scale);
}

// RMSNorm of a token's embedding into the activations, the same for all lanes.
template <class T>
void norm_embedding(BlockState<T>& s, const T* row, i32 lanes, const float* scale) {
  for (i32 lane = 0; lane < lanes; ++lane)
    for (i32 i = 0; i < s.header.hidden_size; ++i)
      s.scratch.work.x[i64(lane) * s.header.hidden_width + i] = arch::to_float(row[i]);
  store_normed(s, lanes, scale);
}

// 1 / RMS of every lane of this device, from the residual stream after the last layer.
template <class T>
void lane_inverses(BlockState<T>& s, const arch::Word* from, i32 layer, float* inverse) {
  Shape h = s.header;
  float* x = s.scratch.work.x;  // one lane at a time
  for (i32 lane = 0; lane < s.lanes(); ++lane) {
    for (i32 block = 0; block < h.num_blocks; ++block) {
      const HiddenRun run(h, block);
      const arch::Word* words = from + i64(lane) * hidden_words(h) + i64(block) * h.hidden_run;
      s.link.read(
          run.count, kMlpResidual, layer, [&](i32 i) { return words + i; },
          [&](i32 i, const arch::Word& word) { x[run.first + i] = arch::value_of(word); });
    }
    inverse[lane] = 1.0f / arch::sqrt(arch::sum_of_squares(x, h.hidden_size) / float(h.hidden_size) + h.norm_eps);
  }
}

// Nothing is read ahead: caches and their prefetchers are fast enough.
struct NoRounds {};
template <class T>
NoRounds first_rounds(const T*, const T*, const Visible&, i32, Shape) {
  return {};
}

// Softmax(q K) V over the visible positions of one split, for all queries of a KV head, into work.parts. All queries see a
// chunk before the next one comes, so that keys and values pass once through the caches.
template <class T>
void attend(BlockState<T>& s, T* keys, T* values, const Visible& visible, i32 split, NoRounds) {
  Shape h = s.header;
  if (visible.owned_by(h, split)) store_heads(s, keys, values, visible.position);
  const i32 size = h.head_dim, chunk = h.kv_chunk, queries = h.queries_per_kv;
  const float scale = 1.0f / arch::sqrt(float(size));
  constexpr i32 kMaxChunk = 64;
  auto part = [&](i32 g) { return s.scratch.work.parts + i64(g) * (size + 2); };  // then its maximum and sum
  for (i32 g = 0; g < queries; ++g) {
    for (i32 i = 0; i < size + 2; ++i) part(g)[i] = 0.0f;
    part(g)[size] = -kInfinity;
  }
  for (i32 c = visible.first_of(h, split); c <= visible.last_chunk; c += h.kv_splits) {
    const i32 from = c * chunk > visible.first ? c * chunk : visible.first;
    const i32 until = (c + 1) * chunk < visible.position + 1 ? (c + 1) * chunk : visible.position + 1;
    if (c + h.kv_splits <= visible.last_chunk) {
      arch::ask_for(keys + i64(c + h.kv_splits) * chunk * size, chunk * size);
      arch::ask_for(values + i64(c + h.kv_splits) * chunk * size, chunk * size);
    }
    for (i32 g = 0; g < queries; ++g) {
      float *out = part(g), &maximum = out[size], &total = out[size + 1];
      float score[kMaxChunk] = {}, highest = maximum;
      arch::dot_heads(s.scratch.query + i64(g) * size, keys + i64(from) * size, size, until - from, score);
      for (i32 i = 0; i < until - from; ++i) {
        score[i] *= scale;
        if (score[i] > highest) highest = score[i];
      }
      if (highest > maximum) {
        const float shrink = exp(maximum - highest);
        total *= shrink;
        for (i32 i = 0; i < size; ++i) out[i] *= shrink;
        maximum = highest;
      }
      total = weigh(score, until - from, maximum, total);
      arch::add_heads(out, score, values + i64(from) * size, size, until - from);
    }
  }
}

// The w-th word of a query's part.
template <class T>
void attention_payload(const BlockState<T>& s, i32 query, i32 w, float (&payload)[kFloatsPerWord]) {
  const i32 size = s.header.head_dim;
  payload[0] = s.scratch.work.parts[i64(query) * (size + 2) + (w < 2 ? size + w : w - 2)];
}

}  // namespace mono::MONO_VARIANT
