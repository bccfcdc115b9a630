// What most devices do the same way.
#include "device/backend.h"

#include "base/error.h"

namespace moerun {
namespace {

[[noreturn]] void refuse(const Backend& backend, const char* what) {
  throw InvalidArgument(message("the device ", backend.name(), " cannot ", what));
}

}  // namespace

void Backend::choose_experts(Stream& stream, const RouterParams& params,
                             std::span<const RouteRequest> requests) {
  for (const RouteRequest& request : requests) {
    const Activations& x = request.norm != nullptr ? request.normed : request.x;
    if (request.norm != nullptr) norm(stream, *request.norm, request.x, request.normed);
    if (!request.router.empty()) {
      linear(stream, {request.router, nullptr}, x, request.logits,
             {1, /*accumulate=*/false, /*is_routing=*/true});
      route(stream, params, request.logits, request.routing);
    }
    if (request.has_shared) {
      route_shared(stream, request.shared_gate, static_cast<std::int32_t>(request.router.rows), x,
                   request.routing);
    }
  }
}

void Backend::check_sequences(std::string_view operation, std::span<const SequenceRows> sequences,
                              const Activations& rows) {
  std::size_t num_rows = 0;
  for (const SequenceRows& each : sequences) {
    num_rows += each.num_rows;
    const std::size_t end = each.first_position + each.num_rows;
    if (end > each.kv.capacity) {
      throw InvalidArgument(message(operation, ": position ", end - 1, " in a KV cache of ",
                                    each.kv.capacity, " tokens; give the sequence a larger one"));
    }
  }
  if (num_rows != rows.rows) {
    throw InvalidArgument(message(operation, ": expected the ", num_rows, " rows of ",
                                  sequences.size(), " sequences, found ", rows.rows));
  }
}

void Backend::rotate_and_store_batch(Stream& stream, const AttentionShape& shape,
                                     const RotaryParams& rotary,
                                     std::span<const SequenceRows> sequences, Activations qkv) {
  check_sequences("rotate_and_store", sequences, qkv);
  std::size_t row = 0;
  for (const SequenceRows& each : sequences) {
    rotate_and_store(stream, shape, rotary, each.first_position, qkv.slice(row, each.num_rows),
                     each.kv);
    row += each.num_rows;
  }
}

void Backend::attention_batch(Stream& stream, const AttentionShape& shape,
                              const AttentionParams& params,
                              std::span<const SequenceRows> sequences, Activations qkv,
                              Activations out) {
  check_sequences("attention", sequences, qkv);
  std::size_t row = 0;
  for (const SequenceRows& each : sequences) {
    attention(stream, shape, params, each.first_position, qkv.slice(row, each.num_rows), each.kv,
              out.slice(row, each.num_rows));
    row += each.num_rows;
  }
}

void Backend::wait_for_choice(Stream& stream, std::size_t) { stream.synchronize(); }

std::unique_ptr<DeviceBuffer> Backend::make_expert_table(const ExpertShape&,
                                                         std::span<const Segment>) {
  return nullptr;
}

void Backend::compute_all(Stream&, const DeviceBuffer&) {
  refuse(*this, "look experts up by itself");
}

void Backend::embed_token(Stream&, const MatrixView&, const std::int32_t*, float, Activations) {
  refuse(*this, "take token ids from its own memory");
}

std::unique_ptr<RecordedWork> Backend::record(Stream&, const std::function<void()>&) {
  refuse(*this, "record work");
}

}  // namespace moerun
