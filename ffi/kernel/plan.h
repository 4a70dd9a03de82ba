// The plan as the resident program reads it: flat records written by jax_mono/record.py.
//
// Layout of the words: Header, Layer[num_layers], then per device a Device, and per device and block a Block.
// Every record is a multiple of eight bytes and free of padding; jax_mono/record.py mirrors the fields by name and a
// test compares both sides.
#pragma once

#include "kernel/types.h"

namespace mono {

enum StageIndex : int { kQkv, kO, kUp, kDown, kHead, kStages };
enum ModuleIndex : int { kAttention, kMlp, kModules };
enum HeadKind : int { kDense, kMeanOfNorms, kNormOfSum, kPerLane };

constexpr int kMaxDevices = 16;
constexpr int kMaxLanes = 16;
constexpr int kMaxDies = 16;
constexpr i32 kPlanMagic = 0x6d6f6e6f;

struct Span {
  i32 first, count;
};

struct Header {
  i64 layer_words, head_words;  // length of one block's layer tape and head tape, in words: weights, unless compressed
  i32 magic, size;              // size: bytes of the whole record, header included
  i32 num_devices, num_blocks, num_layers, num_lanes;
  i32 hidden_size, vocab_size, head_dim, queries_per_kv;
  i32 kv_splits, kv_chunk, max_kv_heads, max_vocab;
  i32 tile_rows, tile_cols;
  i32 rope_interleaved, qkv_bias, qk_norm, head_kind;
  float norm_eps;
  i32 hidden_width;  // hidden_size padded to whole tile columns
  i32 floats_per_word, weights_per_word;       // payload of one word of the exchange memory
  i32 hidden_run, activation_run, logits_run;  // words that one block publishes there
  i32 history_layers;                          // whose outputs are kept: a layer takes what it adds before its own replace them
  i32 num_dies;                                // that share no cache; 1: it does not matter where a block runs
  i32 tape_rows;                               // of the tapes' arrays: one per block, and padding
  i32 granule_words, period;                   // see in_granules()
  Span roles[kMaxDies];                        // per die, the blocks that belong on it
  i64 copy_words;                              // from one die's copies of channels to the next die's; see handoff.h
  i64 region_periods;                          // see touched_regions(); 0: no granules are ever exchanged
  i64 compressed;                              // whether tapes are, see compressed.h
  i64 flat_activations;                        // whether the i-th word of the activations holds the i-th few columns of down's input
  i64 layers_swizzle, head_swizzle;            // of these tapes' arrays, see set_swizzle(): where in a device's constants, in floats
};

// A tape has one granule of every `period` of the array that it lies in: how far from its start a word or byte of it is.
// Granules are powers of two; where the period is one, tapes are in one piece.
template <class U>
constexpr U in_granules(U offset, U granule, U period) {
  return offset + (offset & ~(granule - 1)) * (period - 1);
}

// In every region of so many periods the granules of a period are exchanged: what would be the i-th is the (i ^ x)-th, by the
// region's x. Regions that a tape of so many granules touches, at most, wherever it starts.
constexpr i64 touched_regions(i64 granules, i64 region_periods) {
  return region_periods ? (granules + 2 * region_periods - 2) / region_periods : 0;
}

// What reaches the residual stream after a module; see ModelConfig.mixing.
struct Layer {
  i32 window;           // positions attended to, 0 for all
  i32 source[kModules];  // layer whose outputs arrive, -1 for none
  i32 pushed[kModules];  // whether any layer reads this layer's outputs on another device
  float own_scale[kModules];
  i32 reserved;
};

struct Stage {
  i64 tile_words;
  i32 rows, width, lanes, tiles_per_lane;  // rows: per lane, unpadded; width: columns per lane, padded
};

// Word offsets into a device's exchange memory; see handoff.h. Per layer channels repeat every layer_stride words.
struct Channels {
  i64 words;  // the whole exchange memory
  i64 layer_stride;
  i64 qkv, attention, activation;
  i64 residual[kModules], inbox[kModules];
  i64 final_inbox, final_sum, summary, logits, choice;
  i64 arrivals;  // counters, one per die; see roles.h
};

// Offsets into a device's constants, in floats.
struct Constants {
  i64 attention_norm, ffn_norm, final_norm;  // [layers, hidden], [layers, hidden], [hidden]
  i64 qkv_bias;                              // [layers, lanes, rows]
  i64 q_norm, k_norm;                        // [layers, head_dim]
  i64 floats;                                // length
};

struct Device {
  Stage stages[kStages];
  Channels channels;
  Constants constants;
  Span lanes, kv_heads, neurons, vocab;
};

struct Block {
  i64 layers, head;      // where its tapes start in the arrays of tapes, in words
  i64 offsets[kStages];  // start of the stage's tiles in the block's layer (or head) tape
  Span shares[kStages];  // tiles of each stage
  Span hidden;           // tiles of hidden rows
  Span attention;        // attention items, see DevicePlan.attention
};

static_assert(sizeof(Header) == 8 * 8 + 32 * 4 + kMaxDies * 8, "no padding");
static_assert(sizeof(Layer) == 8 * 4, "no padding");
static_assert(sizeof(Stage) == 8 + 4 * 4, "no padding");
static_assert(sizeof(Block) == 2 * 8 + kStages * 16 + 16, "no padding");
static_assert(sizeof(Device) == kStages * sizeof(Stage) + 15 * 8 + 7 * 8 + 4 * 8, "no padding");

// A view of the record; copies nothing.
struct Plan {
  const Header* header;
  const Layer* layers;
  const Device* devices;
  const Block* blocks;

  explicit Plan(const void* words) {
    const char* at = static_cast<const char*>(words);
    header = reinterpret_cast<const Header*>(at);
    at += sizeof(Header);
    layers = reinterpret_cast<const Layer*>(at);
    at += sizeof(Layer) * header->num_layers;
    devices = reinterpret_cast<const Device*>(at);
    at += sizeof(Device) * header->num_devices;
    blocks = reinterpret_cast<const Block*>(at);
  }

  const Block& block(int device, int index) const { return blocks[device * header->num_blocks + index]; }

  // Bytes the record must have, from its header alone.
  static i64 size(const Header& header) {
    return sizeof(Header) + sizeof(Layer) * header.num_layers + sizeof(Device) * header.num_devices +
           sizeof(Block) * i64(header.num_devices) * header.num_blocks;
  }
};

}  // namespace mono
