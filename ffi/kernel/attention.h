// Attention with the positions of one KV head spread over several blocks.
//
// Item (head, split) of a device handles the positions p with (p / kv_chunk) % kv_splits == split, for ever: it writes
// them to the KV cache and is the only one to read them. What it publishes is a partial softmax; the O stage joins them.
// Splits that hold no visible position publish nothing, and nobody waits for them.
#pragma once

#include "kernel/layer.h"

namespace mono::MONO_VARIANT {

// Words of one query's part: maximum and sum first, then the unnormalised output.
constexpr i32 kPartHead = words_for(2, kFloatsPerWord);
MONO_DEVICE i32 part_words(Shape h) { return kPartHead + words_for(h.head_dim, kFloatsPerWord); }

// Positions that a token attends to, in chunks.
struct Visible {
  i32 first, position;        // first to position
  i32 first_chunk, last_chunk;
  i32 splits;                 // that hold any of them: first_chunk % kv_splits and those that follow

  MONO_DEVICE Visible(Shape h, i32 window, i32 at) {
    position = at;
    first = window > 0 && at >= window ? at - window + 1 : 0;
    first_chunk = first / h.kv_chunk;
    last_chunk = position / h.kv_chunk;
    splits = last_chunk - first_chunk + 1;
    if (splits > h.kv_splits) splits = h.kv_splits;
  }
  // Whether a split is the one that holds the position itself.
  MONO_DEVICE bool owned_by(Shape h, i32 split) const { return last_chunk % h.kv_splits == split; }
  // First visible chunk of a split; beyond last_chunk if it has none.
  MONO_DEVICE i32 first_of(Shape h, i32 split) const {
    return first_chunk + (split - first_chunk % h.kv_splits + h.kv_splits) % h.kv_splits;
  }
};

// Rotates heads in place (Su et al., RoFormer, 2021).
template <class T>
MONO_DEVICE void rotate(const BlockState<T>& s, float* heads, i32 count) {
  const i32 size = s.header.head_dim, half = size / 2;
  arch::for_each(count * half, [&](i32 k) {
    const i32 head = k / half, i = k - head * half;
    float* x = heads + head * size;
    float& a = s.header.rope_interleaved ? x[2 * i] : x[i];
    float& b = s.header.rope_interleaved ? x[2 * i + 1] : x[half + i];
    const float cosine = s.scratch.rope[2 * i], sine = s.scratch.rope[2 * i + 1], a0 = a, b0 = b;
    a = arch::rounded<T>(a0 * cosine - b0 * sine);
    b = arch::rounded<T>(b0 * cosine + a0 * sine);
  });
}

// Normalises heads in place (Qwen3).
template <class T>
MONO_DEVICE void norm_heads(BlockState<T>& s, float* heads, i32 count, i64 norm, i32 layer) {
  const i32 size = s.header.head_dim;
  const float* scale = s.constants(norm + i64(layer) * size);
  MONO_ROLLED
  for (i32 head = 0; head < count; ++head) {
    float* x = heads + head * size;
    const float squares = arch::sum_of_squares(x, size);
    const float inverse = 1.0f / arch::sqrt(squares / float(size) + s.header.norm_eps);
    arch::for_each(size, [&](i32 i) { x[i] = x[i] * inverse * scale[i]; });
  }
  arch::sync();
}

// A range of rows of one lane, as words of the QKV channel: runs are tiles. Its values go to `offset` of some vector.
struct RowWords {
  i32 first_row, rows, first_tile, words, offset;

  MONO_DEVICE RowWords(i32 first, i32 count, i32 to) : first_row(first), rows(count), offset(to) {
    first_tile = first / arch::kTileRows;
    words = ((first + count - 1) / arch::kTileRows - first_tile + 1) * kTileWords;
  }
  // Hands on the rows of the w-th word that belong to the range: sink(index in the range, value).
  template <class Sink>
  MONO_DEVICE void unpack(Shape h, i32 w, const arch::Word& word, Sink sink) const {
    const bool whole = h.head_dim % arch::kTileRows == 0;  // heads are whole tiles
    const i32 tile = w / kTileWords, at = (w - tile * kTileWords) * kFloatsPerWord;
    const i32 first = tile * arch::kTileRows + at - (whole ? 0 : first_row - first_tile * arch::kTileRows);
    float values[kFloatsPerWord];
    arch::unpack(word, values);
    for (i32 k = 0; k < kFloatsPerWord; ++k)
      if (at + k < arch::kTileRows && (whole || (first + k >= 0 && first + k < rows))) sink(first + k, values[k]);
  }
};

// Receives the queries of one KV head and, for the split that owns the position, its key and value: into scratch.query,
// normalised (where the model does), rotated and rounded to the weight type.
template <class T>
MONO_DEVICE void read_heads(BlockState<T>& s, i32 layer, i32 head, bool owner) {
  Shape h = s.header;
  const i32 size = h.head_dim, group = h.queries_per_kv;
  const i32 lane = head / s.heads_per_lane(), in_lane = head - lane * s.heads_per_lane();
  const i32 q_rows = s.heads_per_lane() * group * size, kv_rows = s.heads_per_lane() * size;
  // Queries, key or value. Made when needed: a choice among objects would keep them in memory.
  auto range = [&](i32 part) -> RowWords {
    if (part == 0) return {in_lane * group * size, group * size, 0};
    return {q_rows + (part - 1) * kv_rows + in_lane * size, size, (group + part - 1) * size};
  };
  const i32 query_words = range(0).words, key_words = range(1).words;
  const arch::Word* from =
      s.own_copy(s.own_words(s.device.channels.qkv, layer)) + i64(lane) * s.device.stages[kQkv].tiles_per_lane * kTileWords;
  float* const out = s.scratch.query;
  auto place = [&](i32& w) {
    i32 part = 0;
    if (w >= query_words) w -= query_words, part = 1;
    if (part == 1 && w >= key_words) w -= key_words, part = 2;
    return range(part);
  };
  s.link.template read<1>(  // seldom more words than threads
      query_words + (owner ? key_words + range(2).words : 0), kQkvRows, layer,
      [&](i32 w) {
        const RowWords range = place(w);
        return from + range.first_tile * kTileWords + w;
      },
      [&](i32 w, const arch::Word& word) {
        const RowWords range = place(w);
        range.unpack(h, w, word, [&](i32 i, float x) { out[range.offset + i] = x; });
      });
  arch::sync();
  if (h.qk_norm) {
    norm_heads(s, out, group, s.device.constants.q_norm, layer);
    if (owner) norm_heads(s, out + group * size, 1, s.device.constants.k_norm, layer);
  }
  rotate(s, out, owner ? group + 1 : group);
  arch::sync();
}

// Writes the received key and value into the cache. Only later tokens read them there.
template <class T>
MONO_DEVICE void store_heads(const BlockState<T>& s, T* keys, T* values, i32 position) {
  const i32 size = s.header.head_dim;
  const float *key = s.scratch.query + s.header.queries_per_kv * size, *value = key + size;
  arch::for_each(size, [&](i32 i) {
    arch::from_float(key[i], keys[i64(position) * size + i]);
    arch::from_float(value[i], values[i64(position) * size + i]);
  });
}

template <class T>
MONO_DEVICE void attention_item(BlockState<T>& s, i32 layer, const Visible& visible, i32 head, i32 split) {
  Shape h = s.header;
  const i32 size = h.head_dim, group = h.queries_per_kv;
  const bool owner = visible.owned_by(h, split);
  const i64 cache = (i64(layer) * h.max_kv_heads + head) * s.call.kv_capacity * size;
  T* keys = static_cast<T*>(s.call.k_cache) + cache;
  T* values = static_cast<T*>(s.call.v_cache) + cache;
  auto first = first_rounds(keys, values, visible, split, h);  // before the queries come
  read_heads(s, layer, head, owner);
  s.note(kHeadsReceived, layer);
  attend(s, keys, values, visible, split, first);
  const i32 words = part_words(h);
  arch::Word* to = s.own_words(s.device.channels.attention, layer) + (i64(head) * h.kv_splits + split) * group * words;
  const u32 tag = s.link.out_tag(kAttentionParts, layer);
  arch::for_each(group * words, [&](i32 i) {
    const i32 query = i / words, w = i - query * words;
    float payload[kFloatsPerWord];
    for (i32 k = 0; k < kFloatsPerWord; ++k) payload[k] = 0.0f;
    attention_payload(s, query, w, payload);
    publish(h, Blocks::kOfDevice, to + i, arch::pack(tag, payload));
  });
  arch::sync();
}

template <class T>
MONO_DEVICE void attention_stage(BlockState<T>& s, i32 layer, i32 position) {
  const Visible visible(s.header, arch::agreed(s.scratch.layers[layer].window), position);
  const Span& run = s.share.attention;
  MONO_ROLLED
  for (i32 item = run.first; item < run.first + run.count; ++item) {
    const i32 head = item / s.header.kv_splits, split = item - head * s.header.kv_splits;
    if (visible.first_of(s.header, split) <= visible.last_chunk) attention_item(s, layer, visible, head, split);
  }
  s.note(kAttended, layer);
}

// Where the parts of a device's queries are.
struct Parts {
  const arch::Word* from;
  i32 first_split, splits, words;  // so many splits have visible positions, from the first on and round again

  template <class T>
  MONO_DEVICE Parts(const BlockState<T>& s, i32 layer, const Visible& visible)
      : from(s.own_copy(s.own_words(s.device.channels.attention, layer))),
        first_split(visible.first_chunk % s.header.kv_splits),
        splits(visible.splits),
        words(part_words(s.header)) {}
  // First word of a query's part of the first split; those of the others are as far from each other.
  MONO_DEVICE const arch::Word* of(Shape h, i32 query) const {
    const i32 group = h.queries_per_kv, head = query / group;
    return from + (head * h.kv_splits * group + query - head * group) * words;
  }
  MONO_DEVICE i32 stride(Shape h) const { return h.queries_per_kv * words; }
  // Whether a split has visible positions.
  MONO_DEVICE bool has(Shape h, i32 split) const {
    const i32 after = split - first_split;
    return (after < 0 ? after + h.kv_splits : after) < splits && split < h.kv_splits;
  }
};

// Joins the splits' partial softmaxes of all heads into the O product's input, then multiplies.
template <class T>
MONO_DEVICE void o_stage(BlockState<T>& s, i32 layer, i32 position) {
  row_product<kO>(s, layer, kAttention, [&] {
    const Visible visible(s.header, arch::agreed(s.scratch.layers[layer].window), position);
    join_parts(s, layer, Parts(s, layer, visible));
    const i32 width = s.device.stages[kO].width, rows = s.heads_per_lane() * s.header.queries_per_kv * s.header.head_dim;
    MONO_ROLLED
    for (i32 lane = 0; lane < s.lanes(); ++lane) pad_activations(s.scratch.activations + i64(lane) * width, rows, width);
    arch::sync();
    s.note(kOInput, layer);
  });
  s.note(kOProduct, layer);
}

}  // namespace mono::MONO_VARIANT
