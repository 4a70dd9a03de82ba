// The stages of one layer, in the order of a token: QKV, attention (attention.h), O, up and gate, down.
#pragma once

#include "kernel/block.h"

namespace mono::MONO_VARIANT {

MONO_DEVICE Channel residual_channel(i32 module) { return module == kAttention ? kAttentionResidual : kMlpResidual; }
MONO_DEVICE Channel inbox_channel(i32 module) { return module == kAttention ? kAttentionInbox : kMlpInbox; }

// Where a product's input comes from: a token's embedding, or the residual stream after a module of a layer.
struct Input {
  i32 token;  // >= 0: its embedding
  i32 layer, module;
};

// RMSNorm of the lanes that a stage's tiles read. Recomputed by every block: cheaper than a hand-off.
template <class T>
MONO_DEVICE void norm_input(BlockState<T>& s, StageIndex stage, i64 scale_offset, const Input& input) {
  const Span lanes = input_lanes(s, stage);
  if (lanes.count == 0) return;  // no tiles, nothing to wait for
  const float* scale = s.constants(scale_offset);
  if (input.token >= 0) {
    norm_embedding(s, static_cast<const T*>(s.call.embed) + i64(input.token) * s.header.hidden_size, lanes.count, scale);
  } else {
    const arch::Word* from = s.own_copy(s.own_words(s.device.channels.residual[input.module], input.layer));
    norm_words(s, from + i64(lanes.first) * hidden_words(s.header), lanes.count, residual_channel(input.module), input.layer,
               scale);
  }
}

// The family's; see block.h.
template <StageIndex kStage, class T, class Receive>
MONO_DEVICE void product(BlockState<T>& s, i32 layer, float* out, i32 part_stride, Receive receive);

// Multiplies a block's tiles of a column parallel stage with what receive() makes the activations; leaves the results in
// scratch.rows.
template <StageIndex kStage, class T, class Receive>
MONO_DEVICE void column_product(BlockState<T>& s, i32 layer, Receive receive) {
  product<kStage>(s, layer, s.scratch.rows, 0, receive);
}

// The same of a row parallel stage: per own hidden row one value per lane, into history(layer, module).
template <StageIndex kStage, class T, class Receive>
MONO_DEVICE void row_product(BlockState<T>& s, i32 layer, i32 module, Receive receive) {
  product<kStage>(s, layer, s.history(layer, module, 0), s.row_capacity(), receive);
}

template <class T>
MONO_DEVICE void qkv_stage(BlockState<T>& s, i32 layer, const Input& input) {
  const Stage& stage = s.device.stages[kQkv];
  const Span& run = s.share.shares[kQkv];
  column_product<kQkv>(s, layer, [&] {
    norm_input(s, kQkv, s.device.constants.attention_norm + i64(layer) * s.header.hidden_size, input);
    s.note(kQkvInput, layer);
  });
  const i64 bias_stride = (s.device.constants.q_norm - s.device.constants.qkv_bias) / s.header.num_layers;
  const float* bias = s.constants(s.device.constants.qkv_bias + bias_stride * layer);
  arch::Word* to = s.own_words(s.device.channels.qkv, layer) + i64(run.first) * kTileWords;
  const i32 words = run.count * kTileWords;
  publish_run(s.header, Blocks::kOfDevice, to, words, s.link.out_tag(kQkvRows, layer), words * kFloatsPerWord, [&](i32 i) {
    const i32 tile = i / (kTileWords * kFloatsPerWord), r = i - tile * kTileWords * kFloatsPerWord;
    if (r >= arch::kTileRows) return 0.0f;
    const float value = s.scratch.rows[tile * arch::kTileRows + r];
    if (!s.header.qkv_bias) return value;
    const i32 lane = (run.first + tile) / stage.tiles_per_lane;
    const i32 row = (run.first + tile - lane * stage.tiles_per_lane) * arch::kTileRows + r;
    return row < stage.rows ? value + bias[i64(lane) * stage.rows + row] : value;
  });
  arch::sync();  // attention reuses the rows' memory
  s.note(kQkvProduct, layer);
}

// Takes in the delayed sums that arrive after a module, before the product: their words have been there for long, and the block
// waits for others' anyway.
template <class T>
MONO_DEVICE void past_sums(BlockState<T>& s, i32 layer, i32 module) {
  const i32 source = arch::agreed(s.scratch.layers[layer].source[module]);
  if (source >= 0 && source != layer) take_sums(s, source, module, true);  // read after the barriers of the product
}

// Adds what arrives after a module to the block's own rows of the residual stream and publishes them; see
// ModelConfig.mixing.
template <class T>
MONO_DEVICE void mix_stage(BlockState<T>& s, i32 layer, i32 module) {
  const Layer& rule = s.scratch.layers[layer];  // field by field: a copy with a variable index would lie in memory
  const i32 source = arch::agreed(rule.source[module]), pushed = arch::agreed(rule.pushed[module]);
  const bool immediate = source == layer;
  const float own_scale = arch::agreed(rule.own_scale[module]);
  // What others need at once goes out first; what they need layers later goes out last.
  if (immediate) {
    if (pushed) push_sums(s, layer, module);
    take_sums(s, layer, module, false);
    arch::sync();
  }
  mix_rows(s, layer, module, source >= 0, immediate, own_scale);
  if (pushed && !immediate) push_sums(s, layer, module);
  s.note(module == kAttention ? kAttentionMixed : kMlpMixed, layer);
}

template <class T>
MONO_DEVICE void up_stage(BlockState<T>& s, i32 layer) {
  constexpr i32 half = arch::kTileRows / 2;  // a tile is half gate rows, half up rows of the same neurons
  const i32 neurons = s.share.shares[kUp].count * half;
  column_product<kUp>(s, layer, [&] {
    norm_input(s, kUp, s.device.constants.ffn_norm + i64(layer) * s.header.hidden_size, Input{-1, layer, kAttention});
    s.note(kUpInput, layer);
  });
  arch::Word* to = s.own_words(s.device.channels.activation, layer) + i64(s.block_index) * s.header.activation_run;
  const u32 tag = s.link.out_tag(kActivations, layer);
  auto gate_of = [&](i32 i) { return s.scratch.rows + i / half * arch::kTileRows + i % half; };
  arch::for_each(neurons, [&](i32 i) { gate_of(i)[0] = silu(gate_of(i)[0]) * gate_of(i)[half] * activation_scale(s.header); });
  arch::sync();
  arch::for_each(s.header.activation_run, [&](i32 w) {
    T payload[kWeightsPerWord<T>];
    for (i32 k = 0; k < kWeightsPerWord<T>; ++k) {
      const i32 i = w * kWeightsPerWord<T> + k;
      arch::from_float(i < neurons ? gate_of(i)[0] : 0.0f, payload[k]);
    }
    publish(s.header, Blocks::kOfDevice, to + w, arch::pack(tag, payload));
  });
  s.note(kUpProduct, layer);
}

// Receives the activations of all neurons; runs follow the blocks' tiles, which may end in padding.
template <class T>
MONO_DEVICE void read_activations(BlockState<T>& s, i32 layer) {
  constexpr i32 half = arch::kTileRows / 2;
  const i32 run = s.header.activation_run, width = s.device.stages[kDown].width;
  const i32 neurons = s.device.neurons.count / s.lanes(), per_lane = s.device.stages[kUp].tiles_per_lane * half;
  const arch::Word* from = s.own_copy(s.own_words(s.device.channels.activation, layer));
  if (s.header.flat_activations) {
    s.link.template read<2>(
        s.header.num_blocks * run, kActivations, layer, [&](i32 i) { return from + i; },
        [&](i32 i, const arch::Word& word) { arch::store_weights(word, s.scratch.activations + i * kWeightsPerWord<T>); });
    arch::sync();
    return;
  }
  // Two at once: the code for more of them takes longer to fetch than the words that it would save a trip.
  s.link.template read<2>(
      s.header.num_blocks * run, kActivations, layer, [&](i32 i) { return from + i; },
      [&](i32 i, const arch::Word& word) {
        const i32 block = i / run, end = s.scratch.up_tiles[block + 1] * half;
        i32 slot = s.scratch.up_tiles[block] * half + (i - block * run) * kWeightsPerWord<T>;
        i32 lane = 0;
        MONO_ROLLED
        while (slot - lane * per_lane >= per_lane) ++lane;  // few lanes: shorter than a division
        i32 neuron = slot - lane * per_lane;
        T values[kWeightsPerWord<T>];
        arch::unpack(word, values);
        MONO_UNROLLED
        for (i32 k = 0; k < kWeightsPerWord<T>; ++k, ++slot, ++neuron) {
          if (neuron == per_lane) neuron = 0, ++lane;
          if (slot < end && neuron < neurons) s.scratch.activations[lane * width + neuron] = values[k];
        }
      });
  MONO_ROLLED
  for (i32 lane = 0; lane < s.lanes(); ++lane) pad_activations(s.scratch.activations + i64(lane) * width, neurons, width);
  arch::sync();
}

template <class T>
MONO_DEVICE void down_stage(BlockState<T>& s, i32 layer) {
  row_product<kDown>(s, layer, kMlp, [&] {
    read_activations(s, layer);
    s.note(kDownInput, layer);
  });
  s.note(kDownProduct, layer);
}

}  // namespace mono::MONO_VARIANT
