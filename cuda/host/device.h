// A device that is not there: streams, events, memory and copies on the host, for tests.
//
// Work runs when somebody waits for it, on the thread that waits, in any order that streams and
// events allow. An asynchronous copy reads its source and lands as late as it may, or at a random
// time. So a wait that is missing gives wrong numbers here every time, not on a card now and then.
// Several threads may use it: they take turns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>

#include "device/memory_state.h"
#include "host/grid.h"

namespace moerun::cuda_host {

enum class Order { late_copies, random };

// Of all work that is issued from now on.
void set_order(Order order, std::uint64_t seed);

void* make_stream();
void destroy_stream(void* stream);  // runs what is left first
void* make_event();
void destroy_event(void* event);

// Memory of the device or page-locked memory of the host, filled with signalling NaNs. Freeing it
// waits for everything, and throws where something wrote outside of it. `what` stands in messages.
enum class Place { device, pinned_host };
void* allocate(std::size_t bytes, const char* what, Place place = Place::device);
void free_memory(void* memory);
std::size_t bytes_allocated(Place place = Place::device);
// The most that allocate() gives out; OutOfMemory beyond it.
void set_memory_limit(std::size_t bytes, Place place = Place::device);
MemoryState memory_state();  // of the device

void issue_kernel(void* stream, const Grid& grid, std::function<void()> kernel, const char* name);
void issue_copy(void* stream, void* destination, const void* source, std::size_t bytes);
void record_event(void* stream, void* event);
void wait_for_event(void* stream, void* event);  // the stream does

// What is issued to the stream in between is kept and not run; waiting for the stream, recording
// and waiting for events are errors there, as is allocating memory.
void begin_recording(void* stream);
void* end_recording(void* stream);  // a graph
void launch_graph(void* stream, const void* graph);
void destroy_graph(void* graph);

// From now on every call that runs work throws this.
void spoil(std::exception_ptr failure);
// The n-th kernel or copy that runs from now on fails, which spoils the device; 0: none.
void fail_after(std::uint64_t n);
// As a new process would find the device: forgets its failure and all work that is left.
void reset();

// Run work until the stream, event or everything is done, or `is_done` says so. Throw what a kernel
// threw, which spoils the device for good.
void synchronize_stream(void* stream);
void synchronize_event(void* event);
void synchronize_device();
void run_until(const std::function<bool()>& is_done);
bool is_event_done(void* event);  // also lets one piece of work run

// For tests that show that the harness can fail: the next so many waits of streams for events are
// forgotten.
void forget_waits(std::uint64_t count);

}  // namespace moerun::cuda_host
