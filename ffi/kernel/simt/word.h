// Words of the exchange memory on GPUs: 16 bytes, three of four registers are payload. Included by the architecture
// headers.
#pragma once

namespace mono::MONO_VARIANT::arch {

struct alignas(16) Word {
  u32 payload[3] = {};
  u32 tag = 0;
};
constexpr int kFloatsPerWord = 3;
template <class T>
constexpr int kWeightsPerWord = 6;

MONO_DEVICE u32 float_bits(float x) { return __builtin_bit_cast(u32, x); }
MONO_DEVICE float bits_float(u32 x) { return __builtin_bit_cast(float, x); }

MONO_DEVICE u32 tag_of(const Word& word) { return word.tag; }
MONO_DEVICE Word pack(u32 tag, const u32 (&payload)[3]) { return {{payload[0], payload[1], payload[2]}, tag}; }
MONO_DEVICE Word pack(u32 tag, const float (&payload)[3]) {
  return {{float_bits(payload[0]), float_bits(payload[1]), float_bits(payload[2])}, tag};
}
template <class T>
MONO_DEVICE Word pack(u32 tag, const T (&payload)[6]) {
  Word word;
  for (int i = 0; i < 3; ++i) word.payload[i] = payload[2 * i].bits | u32(payload[2 * i + 1].bits) << 16;
  word.tag = tag;
  return word;
}
MONO_DEVICE void unpack(const Word& word, u32 (&payload)[3]) {
  for (int i = 0; i < 3; ++i) payload[i] = word.payload[i];
}
MONO_DEVICE void unpack(const Word& word, float (&payload)[3]) {
  for (int i = 0; i < 3; ++i) payload[i] = bits_float(word.payload[i]);
}
template <class T>
MONO_DEVICE void unpack(const Word& word, T (&payload)[6]) {
  for (int i = 0; i < 3; ++i) {
    payload[2 * i].bits = u16(word.payload[i]);
    payload[2 * i + 1].bits = u16(word.payload[i] >> 16);
  }
}
// Writes a word's weights where the others of the vector are.
template <class T>
MONO_DEVICE void store_weights(const Word& word, T* at) {
  for (int i = 0; i < 3; ++i) reinterpret_cast<u32*>(at)[i] = word.payload[i];
}

}  // namespace mono::MONO_VARIANT::arch
