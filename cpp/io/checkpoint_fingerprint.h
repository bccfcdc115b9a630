// Tells checkpoints apart by what is in their tensors: the one notion of "the same weights".
#pragma once

#include <string>

#include "io/checkpoint.h"

namespace moerun {

// 16 hexadecimal digits each. Neither depends on the folder, on the times of the files, or on which
// file holds a tensor.
struct CheckpointFingerprint {
  std::string headers;   // names, types and shapes of all tensors
  std::string contents;  // these, and samples of every tensor's bytes
};

// Samples are 4 KiB: the first, the last and evenly spaced ones between them, three for each matrix
// of a tensor and one for each 2 MiB. A tensor of up to 64 KiB is read whole. Of a checkpoint of
// 60 GB about 300 MB are read. Throws FileError where a file cannot be read or has changed since it
// was opened.
CheckpointFingerprint fingerprint_of(const Checkpoint& checkpoint);

}  // namespace moerun
