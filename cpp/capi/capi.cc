#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/version.h"
#include "capi/moerun.h"
#include "model/forward.h"
#include "model/generation.h"
#include "model/model.h"
#include "model/stats.h"

struct moerun_model {
  std::shared_ptr<moerun::Model> model;
};

struct moerun_generation {
  moerun::OwnedGeneration generation;
};

namespace {

using moerun::InvalidArgument;
using moerun::message;

std::string& last_error() {
  thread_local std::string text;
  return text;
}

moerun_status fail(moerun_status status, const char* what) noexcept {
  try {
    last_error() = what;
  } catch (...) {
    last_error().clear();
  }
  return status;
}

// Runs `body`, which returns a status; no exception leaves.
template <typename Body>
moerun_status guarded(Body&& body) noexcept {
  try {
    last_error().clear();
    return body();
  } catch (const InvalidArgument& error) {
    return fail(MOERUN_INVALID_ARGUMENT, error.what());
  } catch (const moerun::FileError& error) {
    return fail(MOERUN_FILE_ERROR, error.what());
  } catch (const moerun::FormatError& error) {
    return fail(MOERUN_FORMAT_ERROR, error.what());
  } catch (const moerun::UnsupportedModel& error) {
    return fail(MOERUN_UNSUPPORTED_MODEL, error.what());
  } catch (const moerun::OutOfMemory& error) {
    return fail(MOERUN_OUT_OF_MEMORY, error.what());
  } catch (const moerun::DeviceError& error) {
    return fail(MOERUN_DEVICE_ERROR, error.what());
  } catch (const moerun::ForkError& error) {
    return fail(MOERUN_FORK_ERROR, error.what());
  } catch (const std::bad_alloc&) {
    return fail(MOERUN_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(MOERUN_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(MOERUN_INTERNAL_ERROR, "unknown error");
  }
}

template <typename T>
T& given(T* pointer, const char* name) {
  if (pointer == nullptr) throw InvalidArgument(message(name, ": expected a pointer, found null"));
  return *pointer;
}

#define MOERUN_END_OF(type, field) (offsetof(type, field) + sizeof(type::field))

// Where the fields of a structure end, so that no size cuts a field in two.
std::vector<std::size_t> field_ends(const moerun_options&) {
  return {
      MOERUN_END_OF(moerun_options, device),        MOERUN_END_OF(moerun_options, threads),
      offsetof(moerun_options, context_length),     MOERUN_END_OF(moerun_options, context_length),
      MOERUN_END_OF(moerun_options, prefill_chunk), MOERUN_END_OF(moerun_options, cpu_kernels),
      MOERUN_END_OF(moerun_options, struct_size)};
}

std::vector<std::size_t> field_ends(const moerun_sampling&) {
  return {MOERUN_END_OF(moerun_sampling, struct_size),
          MOERUN_END_OF(moerun_sampling, max_new_tokens),
          MOERUN_END_OF(moerun_sampling, temperature),
          MOERUN_END_OF(moerun_sampling, top_k),
          MOERUN_END_OF(moerun_sampling, top_p),
          MOERUN_END_OF(moerun_sampling, min_p),
          MOERUN_END_OF(moerun_sampling, repetition_penalty),
          MOERUN_END_OF(moerun_sampling, seed),
          MOERUN_END_OF(moerun_sampling, stop_token_ids),
          MOERUN_END_OF(moerun_sampling, num_stop_token_ids)};
}

#undef MOERUN_END_OF

// A caller built against another version has a smaller or larger structure: what it lacks keeps its
// default, what this version does not know must not be relied on.
template <typename T>
T merged(const T* given_struct, T defaults, const char* name) {
  if (given_struct == nullptr) return defaults;
  const std::size_t size = given_struct->struct_size;
  const std::vector<std::size_t> ends = field_ends(defaults);
  if (std::find(ends.begin(), ends.end(), size) == ends.end()) {
    throw InvalidArgument(message(name, ".struct_size: expected ", sizeof(T),
                                  " (or the end of an earlier field), found ", size,
                                  "; initialise it with the _default function"));
  }
  std::memcpy(static_cast<void*>(&defaults), given_struct, size);
  return defaults;
}

moerun_options default_options() {
  return {sizeof(moerun_options), "auto", 0, 0, moerun::ModelOptions{}.prefill_chunk, "auto"};
}

moerun_sampling default_sampling() {
  return {sizeof(moerun_sampling), 0, 0.0, 0, 1.0, 0.0, 1.0, 0, nullptr, 0};
}

template <typename T>
moerun_status fill_default(T* target, std::size_t struct_size, T defaults, const char* name) {
  return guarded([&] {
    given(target, name);
    defaults.struct_size = struct_size;
    const T checked = merged(&defaults, defaults, name);
    std::memcpy(static_cast<void*>(target), &checked, struct_size);
    return MOERUN_OK;
  });
}

// To be checked against the context's length before it is read.
std::span<const std::int32_t> ids_of(const std::int32_t* token_ids, std::size_t num_tokens) {
  if (num_tokens != 0) given(token_ids, "token_ids");
  return {token_ids, num_tokens};
}

}  // namespace

const char* moerun_version(void) { return moerun::version(); }

const char* moerun_last_error(void) { return last_error().c_str(); }

moerun_status moerun_options_default(moerun_options* options, size_t struct_size) {
  return fill_default(options, struct_size, default_options(), "options");
}

moerun_status moerun_sampling_default(moerun_sampling* sampling, size_t struct_size) {
  return fill_default(sampling, struct_size, default_sampling(), "sampling");
}

moerun_status moerun_open(const char* path, const moerun_options* options, moerun_model** model) {
  return guarded([&] {
    given(model, "model") = nullptr;
    given(path, "path");
    const moerun_options merged_options = merged(options, default_options(), "options");
    moerun::ModelOptions loaded;
    loaded.device = &given(merged_options.device, "options.device");
    loaded.threads = merged_options.threads;
    loaded.context_length = merged_options.context_length;
    loaded.prefill_chunk = merged_options.prefill_chunk;
    loaded.cpu_kernels = &given(merged_options.cpu_kernels, "options.cpu_kernels");
    *model = new moerun_model{moerun::Model::load(path, loaded)};
    return MOERUN_OK;
  });
}

void moerun_close(moerun_model* model) { delete model; }

int64_t moerun_vocab_size(const moerun_model* model) {
  return model != nullptr ? model->model->config().vocab_size : 0;
}

int64_t moerun_context_length(const moerun_model* model) {
  return model != nullptr ? static_cast<int64_t>(model->model->context_length()) : 0;
}

moerun_status moerun_forward(moerun_model* model, const int32_t* token_ids, size_t num_tokens,
                             float* logits, size_t num_logits) {
  return guarded([&] {
    const auto& loaded = given(model, "model").model;
    const auto ids = ids_of(token_ids, num_tokens);
    loaded->check_prompt(ids);
    given(logits, "logits");
    const std::size_t expected = num_tokens * static_cast<std::size_t>(loaded->config().vocab_size);
    if (num_logits != expected) {
      throw InvalidArgument(
          message("num_logits: expected ", expected, " (tokens x vocabulary), found ", num_logits));
    }
    moerun::forward(loaded, ids, {logits, num_logits});
    return MOERUN_OK;
  });
}

moerun_status moerun_generate(moerun_model* model, const int32_t* token_ids, size_t num_tokens,
                              const moerun_sampling* sampling, moerun_generation** generation) {
  return guarded([&] {
    given(generation, "generation") = nullptr;
    const auto& loaded = given(model, "model").model;
    const auto ids = ids_of(token_ids, num_tokens);
    loaded->check_prompt(ids);  // its length, before anything is copied
    const moerun_sampling merged_sampling = merged(sampling, default_sampling(), "sampling");
    if (merged_sampling.max_new_tokens < 0) {
      throw InvalidArgument(message("sampling.max_new_tokens: expected 0 or more, found ",
                                    merged_sampling.max_new_tokens));
    }
    moerun::GenerationParams params;
    params.max_new_tokens = merged_sampling.max_new_tokens != 0
                                ? static_cast<std::size_t>(merged_sampling.max_new_tokens)
                                : loaded->context_length();
    params.sampling = {merged_sampling.temperature,
                       merged_sampling.top_k,
                       merged_sampling.top_p,
                       merged_sampling.min_p,
                       merged_sampling.repetition_penalty,
                       merged_sampling.seed};
    if (merged_sampling.stop_token_ids != nullptr) {
      const auto most = static_cast<std::size_t>(loaded->config().vocab_size);
      if (merged_sampling.num_stop_token_ids > most) {
        throw InvalidArgument(message("sampling.num_stop_token_ids: expected at most ", most,
                                      " (the vocabulary), found ",
                                      merged_sampling.num_stop_token_ids));
      }
      params.stop_token_ids.assign(
          merged_sampling.stop_token_ids,
          merged_sampling.stop_token_ids + merged_sampling.num_stop_token_ids);
    } else {
      for (const auto id : loaded->config().eos_token_ids) {
        params.stop_token_ids.push_back(static_cast<std::int32_t>(id));
      }
    }
    moerun::OwnedGeneration started(
        new moerun::Generation(loaded, std::vector<std::int32_t>(ids.begin(), ids.end()), params));
    *generation = new moerun_generation{std::move(started)};
    return MOERUN_OK;
  });
}

moerun_status moerun_generation_next(moerun_generation* generation, int32_t* token_id) {
  return guarded([&] {
    given(token_id, "token_id");
    const auto token = given(generation, "generation").generation->next();
    if (!token) return MOERUN_END;
    *token_id = *token;
    return MOERUN_OK;
  });
}

void moerun_generation_close(moerun_generation* generation) { delete generation; }

moerun_status moerun_stats_json(const moerun_model* model, char* buffer, size_t capacity,
                                size_t* length) {
  return guarded([&] {
    const std::string text = moerun::stats_json(*given(model, "model").model);
    given(length, "length") = text.size();
    if (capacity != 0) {
      const std::size_t count = std::min(text.size(), capacity - 1);
      std::memcpy(&given(buffer, "buffer"), text.data(), count);
      buffer[count] = '\0';
    }
    return MOERUN_OK;
  });
}
