#include "host/gpu_shape.h"

#include <algorithm>
#include <set>
#include <sstream>
#include <stdexcept>

#include "host/trace.h"

// The sizes of the scratch memory, as the kernel carves it; nothing of this namespace runs here.
#define MONO_VARIANT gpu_sizes
#define MONO_DEVICE inline
#define MONO_OUTLINE inline
#define MONO_ROLLED
#define MONO_UNROLLED
#include "kernel/simt/workspace.h"

namespace mono {
namespace {

constexpr i64 kBarrierBytes = 16, kStopBytes = 8;  // of a slot, and of the ring
constexpr i64 kRingAlignment = 128;

struct Sizes {
  Extents extents{};
  i64 near_bytes = 0, far_bytes = 0;
};

// The most that any block needs.
template <i32 kThreads>
Sizes sizes_of(const Plan& plan) {
  Sizes most;
  for (i32 device = 0; device < plan.header->num_devices; ++device)
    for (i32 block = 0; block < plan.header->num_blocks; ++block)
      most.extents = larger(most.extents, block_extents(plan, device, block));
  using Workspace = gpu_sizes::WarpWorkspace<bf16, kThreads / kSquad>;
  const gpu_sizes::Scratch<bf16, Workspace> scratch(*plan.header, most.extents, true, nullptr, nullptr);
  most.near_bytes = scratch.near_bytes;
  most.far_bytes = scratch.far_bytes;
  return most;
}

// What is known of an architecture before its compiler runs.
struct Architecture {
  const char* name;
  i32 stage_threads;       // of a block: they run the stages
  i32 pump_threads;        // beside those
  i32 fewest_slots;        // of the ring in shared memory; 0 if weights stream through registers
  i32 most_chunks;         // of a piece, if that leaves few enough pieces
  i32 copies_in_flight;    // of the ring; more of them slow each other down
  i32 static_bytes;        // of shared memory that the kernel declares itself, at most, apart from the tapes' swizzle
  bool dies;               // whether blocks can tell on which die they run
  bool compressed;         // whether tapes may be
  Sizes (*sizes)(const Plan& plan);
};
constexpr Architecture kArchitectures[] = {
    {"sm_90a", 256, 128, 16, 12, 8, 1024, false, true, sizes_of<256>},  // 6 KiB a copy
    // 6 KiB a wave, 48 KiB a block: what its memory needs under way, and one tile of 3072 columns.
    {"gfx942", 512, 0, 0, 12, 0, 512, true, false, sizes_of<512>},
    {"fibers", 64, 0, 0, 24, 0, 0, true, true, sizes_of<64>},  // no GPU: ffi/test/fibers runs the same stage code on a CPU
};

// Chunks of a stage's pieces.
i32 stage_piece(const Plan& plan, const Stage& stage, i32 slot_chunks) {
  return piece_chunks(stage.width / plan.header->tile_cols, slot_chunks, plan.header->compressed);
}

// Pieces of one of its tiles.
i32 tile_pieces(const Plan& plan, const Stage& stage, i32 slot_chunks) {
  const i32 chunks = stage_piece(plan, stage, slot_chunks);
  return chunks ? i32(stage.tile_words / piece_words(chunks, plan.header->compressed)) : 0;
}

// The same of the stage that has most.
i32 most_pieces(const Plan& plan, i32 slot_chunks) {
  i32 most = 0;
  for (i32 device = 0; device < plan.header->num_devices; ++device)
    for (const Stage& stage : plan.devices[device].stages) most = std::max(most, tile_pieces(plan, stage, slot_chunks));
  return most;
}

// Words of the longest piece.
i64 longest_piece(const Plan& plan, i32 slot_chunks) {
  i64 longest = 0;
  for (i32 device = 0; device < plan.header->num_devices; ++device)
    for (const Stage& stage : plan.devices[device].stages)
      longest = std::max(longest, i64(piece_words(stage_piece(plan, stage, slot_chunks), plan.header->compressed)));
  return longest;
}

// What the program knows of pieces: per stage, and of all.
std::string piece_constants(const Plan& plan, i32 slot_chunks) {
  std::ostringstream stages, out;
  std::set<i32> all;
  for (i32 index = 0; index < kStages; ++index) {
    std::set<i32> lengths;
    i32 fewest = INT32_MAX;
    for (i32 device = 0; device < plan.header->num_devices; ++device) {
      const Stage& stage = plan.devices[device].stages[index];
      lengths.insert(stage_piece(plan, stage, slot_chunks));
      for (i32 block = 0; block < plan.header->num_blocks; ++block)
        fewest = std::min(fewest, plan.block(device, block).shares[index].count * tile_pieces(plan, stage, slot_chunks));
    }
    stages << (index ? ", {" : "{") << (lengths.size() == 1 ? *lengths.begin() : 0) << ", " << fewest << "}";
    all.merge(lengths);
  }
  all.erase(0);
  out << "constexpr StagePieces kStagePieces[kStages] = {" << stages.str() << "};\n"
      << "constexpr PieceLengths kPieceLengths = {" << all.size() << ", {";
  for (const i32 chunks : all) out << chunks << ", ";
  out << "}};\n";
  return out.str();
}

// Regions of memory that a block's tapes touch, for each of which it keeps a byte.
i64 touched_by_block(const Header& h) {
  return touched_regions(h.num_layers * h.layer_words / h.granule_words, h.region_periods) +
         touched_regions(h.head_words / h.granule_words, h.region_periods);
}

// The header's fields as static constants of a struct, so that code written for Header finds them at compile time.
std::string shape_struct(const Header& h) {
  std::ostringstream out;
  out << std::hexfloat << "struct Shape {\n";
  auto field = [&out](const char* name, i64 value) { out << "  static constexpr i32 " << name << " = " << value << ";\n"; };
  field("num_devices", h.num_devices);
  field("num_blocks", h.num_blocks);
  field("num_layers", h.num_layers);
  field("num_lanes", h.num_lanes);
  field("hidden_size", h.hidden_size);
  field("vocab_size", h.vocab_size);
  field("head_dim", h.head_dim);
  field("queries_per_kv", h.queries_per_kv);
  field("kv_splits", h.kv_splits);
  field("kv_chunk", h.kv_chunk);
  field("max_kv_heads", h.max_kv_heads);
  field("max_vocab", h.max_vocab);
  field("tile_rows", h.tile_rows);
  field("tile_cols", h.tile_cols);
  field("rope_interleaved", h.rope_interleaved);
  field("qkv_bias", h.qkv_bias);
  field("qk_norm", h.qk_norm);
  field("head_kind", h.head_kind);
  field("hidden_width", h.hidden_width);
  field("floats_per_word", h.floats_per_word);
  field("weights_per_word", h.weights_per_word);
  field("hidden_run", h.hidden_run);
  field("activation_run", h.activation_run);
  field("logits_run", h.logits_run);
  field("history_layers", h.history_layers);
  field("num_dies", h.num_dies);
  field("granule_words", h.granule_words);
  field("period", h.period);
  field("region_periods", h.region_periods);
  field("compressed", h.compressed);
  field("flat_activations", h.flat_activations);
  field("layers_swizzle", h.layers_swizzle);
  field("head_swizzle", h.head_swizzle);
  out << "  static constexpr i64 layer_words = " << h.layer_words << "LL, head_words = " << h.head_words
      << "LL, copy_words = " << h.copy_words << "LL;\n"
      << "  static constexpr float norm_eps = " << h.norm_eps << "f;\n};\n";
  return out.str();
}

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

}  // namespace

GpuShape gpu_shape(const Plan& plan, WeightType type, const std::string& architecture, i64 shared_limit) {
  const Architecture* arch = nullptr;
  for (const Architecture& known : kArchitectures)
    if (architecture == known.name) arch = &known;
  if (!arch) refuse("no kernel for " + architecture + "; sm_90a (NVIDIA H100, H200) and gfx942 (AMD MI300X) have one");
  if (type == WeightType::kFloat32) refuse("GPU kernels take bfloat16 and float16 weights, not float32");
  const Header& h = *plan.header;
  if (h.floats_per_word != 3 || h.weights_per_word != 6)
    refuse("the plan was made for CPUs; make it with target=jax_mono.plan.GPU");
  if (h.num_dies > 1 && !arch->dies)
    refuse("the plan was made for a device of " + std::to_string(h.num_dies) + " dies, and " + architecture +
           " has one; make it with the topology of this device, or without one");
  if (h.head_dim % 4) refuse("GPU kernels need a head_dim that is a multiple of 4, not " + std::to_string(h.head_dim));

  if (h.compressed && !arch->compressed)
    refuse("the program for " + architecture + " reads no compressed tapes; make the plan without");
  if (h.compressed && type != WeightType::kBfloat16) refuse("compressed tapes hold bfloat16 weights only");
  auto slot_bytes_of = [&](i32 chunks) { return i64(piece_words(chunks, h.compressed)) * 2; };

  const Sizes sizes = arch->sizes(plan);
  const i64 own_bytes = arch->static_bytes + touched_by_block(h), room = shared_limit - own_bytes - sizes.near_bytes;
  // A compressed piece is as long as the tape says.
  i32 slot_chunks = h.compressed ? kLongestPiece : arch->most_chunks;
  const i32 fewest_chunks = h.compressed ? kLongestPiece : 1;
  i64 slots = 0, ring = 0;
  if (arch->fewest_slots) {
    auto slot_bytes = [&] { return slot_bytes_of(slot_chunks) + kBarrierBytes; };
    const i64 for_slots = room - kRingAlignment - kStopBytes;
    while (slot_chunks > fewest_chunks && for_slots / slot_bytes() < arch->fewest_slots) --slot_chunks;
    slots = for_slots / slot_bytes() / 2 * 2;  // two warps fill it in turn
    ring = (slots * slot_bytes() + kStopBytes + kRingAlignment - 1) / kRingAlignment * kRingAlignment;
    if (slots < arch->fewest_slots)
      refuse("the model needs " + std::to_string(sizes.near_bytes) + " bytes of shared memory per block, which leaves too little of " +
             std::to_string(shared_limit) + " to stream weights through; spread it over more devices");
  } else {
    if (room < 0)
      refuse("the model needs " + std::to_string(sizes.near_bytes + own_bytes) + " bytes of shared memory per block, of " +
             std::to_string(shared_limit) + "; spread it over more devices");
    while (!h.compressed && slot_chunks < 2 * arch->most_chunks && most_pieces(plan, slot_chunks) > kMaxPieces) ++slot_chunks;
  }
  if (most_pieces(plan, slot_chunks) > kMaxPieces) refuse("a row of weights is too long for this kernel; spread the model over more devices");
  if (h.region_periods && ((h.period & (h.period - 1)) || h.region_periods * h.granule_words < longest_piece(plan, slot_chunks)))
    refuse("granules of a period cannot be exchanged: their number must be a power of two, and a piece of " +
           std::to_string(longest_piece(plan, slot_chunks)) + " weights must reach no farther than the next region");

  std::ostringstream out;
  out << "// The plan's numbers as constants.\n#pragma once\n\n#include \"kernel/extents.h\"\n#include \"kernel/simt/tuning.h\"\n\n"
      << "namespace mono {\n\n"
      << shape_struct(h)
      << "constexpr i32 kStageThreads = " << arch->stage_threads << ";\n"
      << "constexpr Extents kExtents = {" << sizes.extents.touched_lanes << ", " << sizes.extents.inputs << ", "
      << sizes.extents.tiles << ", " << sizes.extents.hidden_rows << "};\n"
      << "constexpr i32 kSlotChunks = " << slot_chunks << ";\n"
      << piece_constants(plan, slot_chunks)
      << "constexpr u32 kSlots = " << slots << ", kSlotBytes = " << slot_bytes_of(slot_chunks)
      << ", kCopiesInFlight = " << arch->copies_in_flight << ";\n"
      << "constexpr i64 kFarBytes = " << sizes.far_bytes << ";\n"
      << "constexpr bool kTraceCalls = " << (trace_wish().path.empty() ? "false" : "true") << ";\n"
      << "using Weight = " << (type == WeightType::kBfloat16 ? "bf16" : "f16") << ";\n\n}  // namespace mono\n";
  GpuShape shape;
  shape.header = out.str();
  shape.threads = arch->stage_threads + arch->pump_threads;
  shape.shared_bytes = i32(ring + sizes.near_bytes);
  shape.scratch_words = sizes.far_bytes * h.num_blocks / 8;
  return shape;
}

}  // namespace mono
