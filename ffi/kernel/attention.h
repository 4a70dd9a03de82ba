// Attention with the positions of one KV head spread over several blocks.
//
// Item (head, split) of a device handles the positions p with (p / kv_chunk) % kv_splits == split, for ever: it writes
// them to the KV cache and is the only one to read them. What it publishes is a partial softmax; the O stage joins them.
#pragma once

#include "layer.h"

namespace mono::MONO_VARIANT {

// Rotates one head in place (Su et al., RoFormer, 2021). table: [head_dim / 2, 2] cosines and sines.
MONO_DEVICE void rotate(float* head, const float* table, i32 head_dim, bool interleaved) {
  const i32 half = head_dim / 2;
  for (i32 i = 0; i < half; ++i) {
    float& a = interleaved ? head[2 * i] : head[i];
    float& b = interleaved ? head[2 * i + 1] : head[half + i];
    float cosine = table[2 * i], sine = table[2 * i + 1], a0 = a, b0 = b;
    a = a0 * cosine - b0 * sine;
    b = b0 * cosine + a0 * sine;
  }
}

// Receives one head of q or k, normalises (where the model does), rotates and rounds it to the weight type.
template <class T>
MONO_DEVICE void read_head(BlockState<T>& s, const arch::Word* from, i32 layer, i64 norm, const float* rope, float* out) {
  const i32 size = s.header.head_dim;
  s.link.read(from, size, kQkvRows, layer, [&](i64 i, float value) { out[i] = value; });
  if (s.header.qk_norm) {
    const float* scale = s.constants(norm + i64(layer) * size);
    float inverse = 1.0f / arch::sqrt(arch::sum_of_squares(out, size) / float(size) + s.header.norm_eps);
    for (i32 i = 0; i < size; ++i) out[i] = out[i] * inverse * scale[i];
  }
  rotate(out, rope, size, s.header.rope_interleaved);
  for (i32 i = 0; i < size; ++i) out[i] = arch::rounded<T>(out[i]);
}

template <class T>
MONO_DEVICE void attention_item(BlockState<T>& s, i32 layer, i32 position, i32 head, i32 split) {
  const Header& h = s.header;
  const i32 size = h.head_dim, group = h.queries_per_kv, chunk = h.kv_chunk;
  const i32 lane = head / s.heads_per_lane(), in_lane = head - lane * s.heads_per_lane();
  const i32 q_rows = s.heads_per_lane() * group * size, kv_rows = s.heads_per_lane() * size;
  const arch::Word* rows = s.own_words(s.device.channels.qkv, layer) + i64(lane) * s.device.stages[kQkv].rows;
  const float* rope = s.call.rope + i64(position) * size;
  const i64 cache = (i64(layer) * h.max_kv_heads + head) * s.call.kv_capacity * size;
  T* keys = static_cast<T*>(s.call.k_cache) + cache;
  T* values = static_cast<T*>(s.call.v_cache) + cache;

  for (i32 g = 0; g < group; ++g)
    read_head(s, rows + (i64(in_lane) * group + g) * size, layer, s.device.constants.q_norm, rope,
              s.scratch.query + i64(g) * size);
  if ((position / chunk) % h.kv_splits == split) {
    float* key = s.scratch.key;
    float* value = key + size;
    read_head(s, rows + q_rows + i64(in_lane) * size, layer, s.device.constants.k_norm, rope, key);
    s.link.read(rows + q_rows + kv_rows + i64(in_lane) * size, size, kQkvRows, layer,
                [&](i64 i, float v) { value[i] = v; });
    for (i32 i = 0; i < size; ++i) {
      arch::from_float(key[i], keys[i64(position) * size + i]);
      arch::from_float(value[i], values[i64(position) * size + i]);
    }
  }

  const i32 window = s.call.plan.layers[layer].window;
  const i32 first = window > 0 && position >= window ? position - window + 1 : 0;
  const float scale = 1.0f / arch::sqrt(float(size));
  arch::Word* to = s.own_words(s.device.channels.attention, layer) +
                   (i64(head) * h.kv_splits + split) * group * (size + 2);
  const u32 tag = s.link.out_tag(kAttentionParts, layer);
  constexpr i32 kMaxChunk = 64;
  for (i32 g = 0; g < group; ++g, to += size + 2) {
    const float* q = s.scratch.query + i64(g) * size;
    float* out = s.scratch.parts + i64(g) * size;
    float maximum = -kInfinity, total = 0.0f;
    for (i32 i = 0; i < size; ++i) out[i] = 0.0f;
    for (i32 c = first / chunk; c <= position / chunk; ++c) {
      if (c % h.kv_splits != split) continue;
      i32 from = c * chunk > first ? c * chunk : first;
      i32 until = (c + 1) * chunk < position + 1 ? (c + 1) * chunk : position + 1;
      float score[kMaxChunk], highest = maximum;
      for (i32 p = from; p < until; ++p) {
        float value = scale * arch::dot_head(q, keys + i64(p) * size, size);
        score[p - from] = value;
        if (value > highest) highest = value;
      }
      if (highest > maximum) {
        float shrink = exp(maximum - highest);
        total *= shrink;
        for (i32 i = 0; i < size; ++i) out[i] *= shrink;
        maximum = highest;
      }
      for (i32 p = from; p < until; ++p) {
        float weight = exp(score[p - from] - maximum);
        total += weight;
        arch::add_scaled(out, weight, values + i64(p) * size, size);
      }
    }
    for (i32 i = 0; i < size; ++i) publish(to + i, tag, out[i]);
    publish(to + size, tag, maximum);
    publish(to + size + 1, tag, total);
  }
}

template <class T>
MONO_DEVICE void attention_stage(BlockState<T>& s, i32 layer, i32 position) {
  const Span& run = s.share.attention;
  for (i32 item = run.first; item < run.first + run.count; ++item)
    attention_item(s, layer, position, item / s.header.kv_splits, item % s.header.kv_splits);
}

// Joins the splits' partial softmaxes of all heads into the O product's input, then multiplies.
template <class T>
MONO_DEVICE void o_stage(BlockState<T>& s, i32 layer) {
  const Header& h = s.header;
  const i32 size = h.head_dim, group = h.queries_per_kv, splits = h.kv_splits, width = s.device.stages[kO].width;
  const i32 queries = s.heads_per_lane() * group;  // per lane
  const arch::Word* from = s.own_words(s.device.channels.attention, layer);
  for (i32 lane = 0; lane < s.lanes(); ++lane) {
    T* out = s.scratch.activations + i64(lane) * width;
    for (i32 q = 0; q < queries; ++q) {
      const i32 query = lane * queries + q;
      auto part = [&](i32 split) { return from + ((i64(query / group) * splits + split) * group + query % group) * (size + 2); };
      auto value = [&](i32 split, i32 i) { return arch::bits_float(s.link.wait(part(split) + i, kAttentionParts, layer)); };
      float maximum = -kInfinity, total = 0.0f;
      for (i32 split = 0; split < splits; ++split) {
        float m = value(split, size);
        if (m > maximum) maximum = m;
      }
      float* joined = s.scratch.parts;
      for (i32 i = 0; i < size; ++i) joined[i] = 0.0f;
      for (i32 split = 0; split < splits; ++split) {
        float weight = exp(value(split, size) - maximum);
        total += weight * value(split, size + 1);
        for (i32 i = 0; i < size; ++i) joined[i] += weight * value(split, i);
      }
      for (i32 i = 0; i < size; ++i) arch::from_float(joined[i] / total, out[i64(q) * size + i]);
    }
    pad_activations(out, queries * size, width);
  }
  row_product(s, kO, layer, kAttention);
}

}  // namespace mono::MONO_VARIANT
