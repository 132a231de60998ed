// Tasks over torch's own threads, and memory for a thread to work in.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// a function that Python calls: sala.ops.native.Function
#define SALA_EXPORT extern "C" __attribute__((visibility("default")))

// the same function with its arguments in memory, for a tape of calls: sala.ops.native.tape
#define SALA_REPLAY(name) \
  SALA_EXPORT void name##_words(const int64_t* words) { sala::call_with(&name, words); }

namespace sala {

template <class A>
A from_word(const int64_t& word) {
  static_assert(sizeof(A) == 8, "an argument of a call on a tape has 64 bits");
  A argument;
  std::memcpy(&argument, &word, 8);
  return argument;
}
template <class... A, size_t... I>
void call_with(void (*function)(A...), const int64_t* words, std::index_sequence<I...>) {
  function(from_word<A>(words[I])...);
}
template <class... A>
void call_with(void (*function)(A...), const int64_t* words) {
  call_with(function, words, std::index_sequence_for<A...>{});
}

// GOMP_parallel of the OpenMP library that torch runs on: a second pool of threads would fight with the first for the
// cores. Set once after loading; null where torch has no such library.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline GompParallel gomp_parallel = nullptr;

// Run body(task) for every task in 0..tasks-1 on at most `threads` threads. Which thread takes which task depends on
// timing, so a task's result must not depend on the thread.
template <class Body>
void parallel_for(int64_t tasks, int64_t threads, const Body& body) {
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  struct Job {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const Body* body;
    static void run(void* self) {
      Job& job = *static_cast<Job*>(self);
      for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) (*job.body)(task);
    }
  } job;
  job.tasks = tasks;
  job.body = &body;
  if (gomp_parallel) {
    gomp_parallel(&Job::run, &job, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(&Job::run, &job);
  Job::run(&job);
  for (auto& other : others) other.join();
}

// Ask for large pages under memory that is about to be written for the first time: a fault for every 4 KB of a fresh
// output was a sixth of a kernel's time. Advice only; what the system makes of it changes no result.
inline void expect_writes([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t LARGE = 2 << 20;
  uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + LARGE - 1) / LARGE * LARGE;
  uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / LARGE * LARGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Memory for the task at hand: taken piece by piece, all given back when the Scratch ends, kept by the thread for the
// next task. One at a time a thread. The pieces stand on cache lines and hold whatever was there before.
class Scratch {
 public:
  Scratch() { arena().used = 0; }

  // Sizes first, so that the arena grows once, before any piece is taken.
  void reserve(size_t bytes) {
    Arena& a = arena();
    if (a.size >= bytes) return;
    std::free(a.memory);
    a.size = (bytes + 4095) / 4096 * 4096;
    a.memory = static_cast<char*>(std::aligned_alloc(4096, a.size));
    if (!a.memory) std::abort();  // the caller's tensors are already larger than this
  }

  template <class T>
  static constexpr size_t bytes(int64_t count) {
    return (size_t(count) * sizeof(T) + 63) / 64 * 64;
  }

  template <class T>
  T* take(int64_t count) {
    Arena& a = arena();
    char* piece = a.memory + a.used;
    a.used += bytes<T>(count);
    if (a.used > a.size) std::abort();  // reserve() was told too little
    return reinterpret_cast<T*>(piece);
  }

 private:
  struct Arena {
    char* memory = nullptr;
    size_t size = 0, used = 0;
    ~Arena() { std::free(memory); }
  };
  static Arena& arena() {
    static thread_local Arena a;
    return a;
  }
};

}  // namespace sala
