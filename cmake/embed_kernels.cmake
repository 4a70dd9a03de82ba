# Writes the text of the resident program into a C++ source.
#
#   cmake -DROOT=ffi -DOUTPUT=kernel_sources_embedded.cc -P embed_kernels.cmake
file(GLOB_RECURSE headers RELATIVE "${ROOT}" "${ROOT}/kernel/*.h")
list(SORT headers)
set(text "// Written by cmake/embed_kernels.cmake.\n#include \"host/kernel_sources.h\"\n\nnamespace mono {\n\n")
string(APPEND text "const EmbeddedSource kEmbeddedSources[] = {\n")
foreach(header IN LISTS headers)
  file(READ "${ROOT}/${header}" source)
  string(APPEND text "{\"${header}\", R\"MONO_TEXT(" "${source}" ")MONO_TEXT\"},\n")
endforeach()
string(APPEND text "{nullptr, nullptr}};\n\n}  // namespace mono\n")
file(WRITE "${OUTPUT}" "${text}")
