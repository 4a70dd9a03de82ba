// The stages of one layer, in the order of a token: QKV, attention (attention.h), O, up and gate, down.
#pragma once

#include "block.h"

namespace mono::MONO_VARIANT {

// The product after `index` of `layer`, where the pump fetches next: the next layer's after the last of a layer, the head
// after the last layer, the first layer of the next token after the head.
template <class T>
MONO_DEVICE void aim_pump(BlockState<T>& s, StageIndex index, i32 layer) {
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
}

// Runs a block's tiles of a column parallel stage. done(lane, row, value) gets every row, `row` counted per lane.
template <class T, class Done>
MONO_DEVICE void column_product(BlockState<T>& s, StageIndex index, i32 layer, Done done) {
  const Stage& stage = s.device.stages[index];
  const Span& run = s.share.shares[index];
  const T* tile = s.tape(index, layer);
  float out[arch::kTileRows];
  for (i32 t = run.first; t < run.first + run.count; ++t, tile += stage.tile_words) {
    i32 lane = t / stage.tiles_per_lane, first = (t - lane * stage.tiles_per_lane) * arch::kTileRows;
    arch::dot_tile(tile, s.scratch.activations + i64(lane) * stage.width, stage.width / arch::kTileCols, out);
    done(lane, first, out);
  }
  aim_pump(s, index, layer);
}

// Runs a block's tiles of a row parallel stage: per own hidden row one value per lane, into history(layer, module).
template <class T>
MONO_DEVICE void row_product(BlockState<T>& s, StageIndex index, i32 layer, i32 module) {
  const Stage& stage = s.device.stages[index];
  const Span& run = s.share.shares[index];
  const T* tile = s.tape(index, layer);
  i64 lane_words = stage.tile_words / stage.lanes;
  for (i32 t = 0; t < run.count; ++t) {
    for (i32 lane = 0; lane < stage.lanes; ++lane, tile += lane_words) {
      float* out = s.history(layer, module, lane) + t * arch::kTileRows;
      arch::dot_tile(tile, s.scratch.activations + i64(lane) * stage.width, stage.width / arch::kTileCols, out);
    }
  }
  aim_pump(s, index, layer);
}

template <class T>
MONO_DEVICE float inverse_rms(const BlockState<T>& s, const float* x) {
  return 1.0f / arch::sqrt(arch::sum_of_squares(x, s.header.hidden_size) / float(s.header.hidden_size) + s.header.norm_eps);
}

// RMSNorm of the first lanes of scratch.x into the activations. Recomputed by every block: cheaper than a hand-off.
template <class T>
MONO_DEVICE void norm_to_activations(BlockState<T>& s, i32 lanes, i64 scale_offset) {
  const i32 hidden = s.header.hidden_size, width = s.header.hidden_width;
  const float* scale = s.constants(scale_offset);
  for (i32 lane = 0; lane < lanes; ++lane) {
    const float* x = s.scratch.x + i64(lane) * hidden;
    T* out = s.scratch.activations + i64(lane) * width;
    float inverse = inverse_rms(s, x);
    constexpr i32 part = 512;
    for (i32 i = 0; i < hidden; i += part) {
      arch::scale_vector(x + i, inverse, scale + i, out + i, hidden - i < part ? hidden - i : part);
      s.link.pump.steps(part / 16);
    }
    pad_activations(out, hidden, width);
  }
}

// Receives the whole residual stream of this device's lanes.
template <class T>
MONO_DEVICE void read_residual(BlockState<T>& s, i32 layer, i32 module) {
  const arch::Word* from = s.own_words(s.device.channels.residual[module], layer);
  Channel channel = module == kAttention ? kAttentionResidual : kMlpResidual;
  s.link.read(from, i64(s.lanes()) * s.header.hidden_size, channel, layer,
              [&](i64 i, float value) { s.scratch.x[i] = value; });
}

template <class T>
MONO_DEVICE void qkv_stage(BlockState<T>& s, i32 layer) {
  const Stage& stage = s.device.stages[kQkv];
  norm_to_activations(s, s.lanes(), s.device.constants.attention_norm + i64(layer) * s.header.hidden_size);
  const i64 bias_stride = (s.device.constants.q_norm - s.device.constants.qkv_bias) / s.header.num_layers;
  const float* bias = s.constants(s.device.constants.qkv_bias + bias_stride * layer);
  arch::Word* to = s.own_words(s.device.channels.qkv, layer);
  u32 tag = s.link.out_tag(kQkvRows, layer);
  column_product(s, kQkv, layer, [&](i32 lane, i32 first, const float* out) {
    for (i32 r = 0; r < arch::kTileRows && first + r < stage.rows; ++r) {
      i64 at = i64(lane) * stage.rows + first + r;
      publish(to + at, tag, s.header.qkv_bias ? out[r] + bias[at] : out[r]);
    }
  });
}

// Sum over this device's lanes of a module's output, for one tile of own rows.
template <class T>
MONO_DEVICE void own_sum(const BlockState<T>& s, i32 layer, i32 module, i32 first, float* out) {
  float parts[kMaxLanes][arch::kTileRows];
  for (i32 lane = 0; lane < s.lanes(); ++lane)
    for (i32 k = 0; k < arch::kTileRows; ++k) parts[lane][k] = s.history(layer, module, lane)[first + k];
  tree_sum(parts, s.lanes());
  for (i32 k = 0; k < arch::kTileRows; ++k) out[k] = parts[0][k];
}

// Pushes the sums of own rows to the block of the same number on every other device.
template <class T>
MONO_DEVICE void push_sums(const BlockState<T>& s, i32 layer, i32 module) {
  const Channel inbox = module == kAttention ? kAttentionInbox : kMlpInbox;
  const u32 tag = s.link.out_tag(inbox, layer);
  for (i32 first = 0; first < s.rows; first += arch::kTileRows) {
    float sums[arch::kTileRows];
    own_sum(s, layer, module, first, sums);
    for (i32 peer = 0; peer < s.header.num_devices; ++peer) {
      if (peer == s.device_index) continue;
      arch::Word* to = s.words(peer, s.call.plan.devices[peer].channels.inbox[module], layer) +
                       i64(s.device_index) * s.header.hidden_size + s.first_row + first;
      for (i32 k = 0; k < arch::kTileRows && first + k < s.rows; ++k) publish(to + k, tag, sums[k]);
    }
  }
}

// Sum over all lanes of all devices of a module's output, for one tile of own rows. A peer's word is its lanes' sum; the
// order of additions is the same on every device.
template <class T>
MONO_DEVICE void total_sum(BlockState<T>& s, i32 layer, i32 module, i32 first, float* out) {
  const Channel inbox = module == kAttention ? kAttentionInbox : kMlpInbox;
  const arch::Word* from = s.own_words(s.device.channels.inbox[module], layer) + s.first_row + first;
  float parts[kMaxDevices][arch::kTileRows] = {};
  for (i32 peer = 0; peer < s.header.num_devices; ++peer) {
    if (peer == s.device_index) {
      own_sum(s, layer, module, first, parts[peer]);
      continue;
    }
    for (i32 k = 0; k < arch::kTileRows && first + k < s.rows; ++k)
      parts[peer][k] = arch::bits_float(s.link.wait(from + i64(peer) * s.header.hidden_size + k, inbox, layer));
  }
  tree_sum(parts, s.header.num_devices);
  for (i32 k = 0; k < arch::kTileRows; ++k) out[k] = parts[0][k];
}

// Adds what arrives after a module to the block's own rows of the residual stream and publishes them; see
// ModelConfig.mixing.
template <class T>
MONO_DEVICE void mix_stage(BlockState<T>& s, i32 layer, i32 module) {
  const Layer& rule = s.call.plan.layers[layer];
  const i32 source = rule.source[module];
  const float own_scale = rule.own_scale[module];
  const Channel residual = module == kAttention ? kAttentionResidual : kMlpResidual;
  if (rule.pushed[module]) push_sums(s, layer, module);
  arch::Word* to = s.own_words(s.device.channels.residual[module], layer) + s.first_row;
  const u32 tag = s.link.out_tag(residual, layer);
  for (i32 first = 0; first < s.rows; first += arch::kTileRows) {
    float total[arch::kTileRows] = {};
    if (source >= 0) total_sum(s, source, module, first, total);
    for (i32 lane = 0; lane < s.lanes(); ++lane) {
      float* x = s.residual(lane) + first;
      const float* own = s.history(layer, module, lane) + first;
      if (source == layer) {
        for (i32 k = 0; k < arch::kTileRows; ++k) x[k] += total[k];  // bit-identical in all lanes
      } else {
        for (i32 k = 0; k < arch::kTileRows; ++k) x[k] += own_scale * own[k];
      }
      if (source >= 0 && source != layer) {
        const float* past = s.history(source, module, lane) + first;
        for (i32 k = 0; k < arch::kTileRows; ++k) x[k] += total[k] - past[k];
      }
      for (i32 k = 0; k < arch::kTileRows && first + k < s.rows; ++k)
        publish(to + i64(lane) * s.header.hidden_size + first + k, tag, x[k]);
      s.link.pump.step();
    }
  }
}

template <class T>
MONO_DEVICE void up_stage(BlockState<T>& s, i32 layer) {
  constexpr i32 half = arch::kTileRows / 2;  // a tile is half gate rows, half up rows of the same neurons
  const i32 neurons = s.device.neurons.count / s.lanes();
  norm_to_activations(s, s.lanes(), s.device.constants.ffn_norm + i64(layer) * s.header.hidden_size);
  arch::Word* to = s.own_words(s.device.channels.activation, layer);
  u32 tag = s.link.out_tag(kActivations, layer);
  column_product(s, kUp, layer, [&](i32 lane, i32 first, const float* out) {
    for (i32 r = 0; r < half && first / 2 + r < neurons; ++r)
      publish(to + i64(lane) * neurons + first / 2 + r, tag, silu(out[r]) * out[half + r]);
  });
}

template <class T>
MONO_DEVICE void down_stage(BlockState<T>& s, i32 layer) {
  const i32 width = s.device.stages[kDown].width, neurons = s.device.neurons.count / s.lanes();
  const arch::Word* from = s.own_words(s.device.channels.activation, layer);
  for (i32 lane = 0; lane < s.lanes(); ++lane) {
    T* out = s.scratch.activations + i64(lane) * width;
    s.link.read(from + i64(lane) * neurons, neurons, kActivations, layer,
                [&](i64 i, float value) { arch::from_float(value, out[i]); });
    pad_activations(out, neurons, width);
  }
  row_product(s, kDown, layer, kMlp);
}

}  // namespace mono::MONO_VARIANT
