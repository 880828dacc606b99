// gpu/queue.h in threads: a block is a thread, the machine holds a few at once, launches follow one another and share
// the queue's memory. What gemm1 stores for several tokens, rows of picks, and what is written where numbers are to
// come are ordinary memory, so thread sanitizer sees whether the queue orders it; numbers themselves are atomic and
// order nothing. Every interleaving of small launches is models/queue.pml's.
#include "gpu/queue.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace fourmoe {
namespace {

struct HostAtomic {
  static i32 add(i32* p, i32 value) { return std::atomic_ref(*p).fetch_add(value, std::memory_order_relaxed); }
  static void add_release(i32* p, i32 value) { std::atomic_ref(*p).fetch_add(value, std::memory_order_release); }
  static i32 load_acquire(i32* p) { return std::atomic_ref(*p).load(std::memory_order_acquire); }
  static void store(i32* p, i32 value) { std::atomic_ref(*p).store(value, std::memory_order_relaxed); }
};

enum class Broken {
  nothing,
  never_clears,
  clears_own,
  first_turns,
  first_given,
  never_waits,
  never_empties,
  empties_late  // says that a part is empty before it is
};

// What a block calls: the queue, or one with a broken step.
struct Protocol : gpu::Queue<HostAtomic> {
  Broken broken;

  int arrive() const {
    if (broken != Broken::first_turns) return Queue::arrive();
    constexpr i32 kTop = 1 << 30;
    const i32 before = HostAtomic::add(&words[0], 1);
    if (before % kTop == 0) HostAtomic::add(&words[0], before == 0 ? kTop : -kTop);
    return before >= kTop ? 1 : 0;
  }
  void clear_other(int set, i32 first, i32 step) const {
    if (broken == Broken::never_clears) return;
    Queue::clear_other(broken == Broken::clears_own ? 1 - set : set, first, step);
  }
  i32 take_first(int set, i32 block) const { return broken == Broken::first_given ? block : Queue::take(set); }
  i32 take(int set) const { return Queue::take(set) + (broken == Broken::first_given ? shape.blocks : 0); }
  bool there(int set, i32 hit, i32 rows) const {
    return broken == Broken::never_waits || Queue::rows(set, hit) >= rows;
  }
};

// Of a number that others poll.
constexpr f64 kNone = -1.0;
void put(f64* at, f64 number) { std::atomic_ref(*at).store(number, std::memory_order_relaxed); }
f64 poll(f64* at) { return std::atomic_ref(*at).load(std::memory_order_relaxed); }

struct Size {
  i32 blocks, places, hits, rows, columns, tall = 1;  // hits: at most; tall: row tiles of a tile
};

// One launch: how many hits, and what else happens.
struct Launch {
  i32 hits = 0;
  i64 polls = std::numeric_limits<i64>::max();  // of a wait, then it is given up
  bool held = false;                            // tile 0 is done only when gemm2 of its hit is
  bool single = false;                          // y is numbers that are polled, too
  bool sums_first = false;                      // before tiles: of what stands there, or not at all
  bool own = false;                             // picks have rows of their own, a piece each hit
};

class Layer {
 public:
  explicit Layer(const Size& size, Broken broken = Broken::nothing)
      : s_(size),
        words_(shape().words() + 1),
        x_(size.hits),
        y_(size.hits * size.rows),
        z_(size.hits * size.columns),
        output_(size.columns),
        added_(size.columns),
        done_(size.hits * (size.rows + size.columns)),
        queue_{{shape(), words_.data()}, broken} {
    words_.back() = kCanary;
  }

  // "" or what is wrong first. A thread a block, which live through all launches so that blocks meet more often; one
  // thread where there is one place.
  std::string run(const std::vector<Launch>& launches) {
    const i32 count = s_.places == 1 ? 1 : s_.blocks;
    std::string wrong;
    pthread_barrier_t meeting;
    pthread_barrier_init(&meeting, nullptr, count);
    const auto blocks = [&](i32 thread) {
      std::minstd_rand random(thread + 1);
      for (std::size_t n = 0; n < launches.size(); ++n) {
        if (thread == 0) prepare(launches[n], n);
        pthread_barrier_wait(&meeting);
        for (i32 b = thread; b < s_.blocks; b += count) block(b, &random);
        pthread_barrier_wait(&meeting);
        if (thread == 0 && wrong.empty()) wrong = check();
      }
    };
    std::vector<std::thread> threads;
    for (i32 thread = 0; thread < count; ++thread) threads.emplace_back(blocks, thread);
    for (std::thread& thread : threads) thread.join();
    pthread_barrier_destroy(&meeting);
    return wrong;
  }

 private:
  static constexpr i32 kCanary = 0x5a5a5a5a;

  static constexpr i32 kParts = 3;

  gpu::QueueShape shape() const { return {s_.blocks, s_.hits}; }
  i32 tiles1() const { return (s_.rows + s_.tall - 1) / s_.tall; }  // of a hit
  i32 tiles2() const { return (s_.columns + s_.tall - 1) / s_.tall; }
  f64 token(i32 hit) const { return static_cast<f64>(number_ * 1000 + hit * 100); }
  f64 value(i32 hit, i32 row) const { return token(hit) + row + 1; }

  void prepare(const Launch& launch, std::size_t number) {
    now_ = launch, number_ = number;
    for (auto* memory : {&x_, &y_, &z_, &output_}) std::fill(memory->begin(), memory->end(), 1e30);
    for (auto* counts : {&added_, &done_}) std::fill(counts->begin(), counts->end(), 0);
    marked_ = false, passed_ = stored_ = 0;
  }

  static void dawdle(std::minstd_rand* random) {
    for (auto n = (*random)() % 16; n > 12; --n) std::this_thread::yield();
  }

  // Relaxed, for a block that comes when another has ended sees nothing of it but through the queue.
  bool enter() {
    i32 free = free_.load(std::memory_order_relaxed);
    return free > 0 && free_.compare_exchange_weak(free, free - 1, std::memory_order_relaxed);
  }

  void block(i32 b, std::minstd_rand* random) {
    while (!enter()) std::this_thread::yield();
    dawdle(random);
    const int set = queue_.arrive();
    i32 tile = queue_.take_first(set, b), sum = queue_.take_sum(set);
    dawdle(random);
    queue_.clear_other(set, b, s_.blocks);
    for (i32 part = queue_.take_part(set); part < kParts; part = queue_.take_part(set)) empty(set, part);
    for (i32 hit = now_.own ? queue_.take_piece(set) : now_.hits; hit < now_.hits; hit = queue_.take_piece(set)) {
      dawdle(random);
      x_[hit] = token(hit);
      queue_.report_piece(set);
    }
    bool late = false;
    await([&] { return queue_.parts(set) == kParts; }, &late);
    const auto add_all = [&] {
      for (; sum < s_.columns; sum = queue_.take_sum(set)) add_up(sum, &late);
    };
    if (now_.sums_first) add_all();
    const i32 first = now_.hits * tiles1(), all = first + now_.hits * tiles2();
    for (; tile < all; tile = queue_.take(set)) {
      dawdle(random);
      ++done_[tile];
      if (tile < first) multiply_first(set, tile, &late);
      else multiply_second(set, tile - first, &late);
    }
    add_all();
    free_.fetch_add(1, std::memory_order_relaxed);
  }

  void empty(int set, i32 part) {
    if (queue_.broken == Broken::empties_late) {
      queue_.report_part(set);
      while (part == 0 && stored_.load() == 0) std::this_thread::yield();
      for (f64& number : z_) put(&number, kNone);
      return;
    }
    for (auto* memory : {&y_, &z_}) {
      if (queue_.broken == Broken::never_empties || (memory == &y_ && !now_.single)) continue;
      for (std::size_t i = part; i < memory->size(); i += kParts) (*memory)[i] = kNone;
    }
    queue_.report_part(set);
  }

  // Until done(), or so many times that the block gives up, this wait and all others.
  template <class Done>
  void await(const Done& done, bool* late) {
    for (i64 polls = 0; !done() && !*late; ++polls) {
      if (polls >= now_.polls) *late = true, marked_ = true;
      else std::this_thread::yield();
    }
  }

  void multiply_first(int set, i32 tile, bool* late) {
    const i32 hit = tile / tiles1(), begin = tile % tiles1() * s_.tall, end = std::min(begin + s_.tall, s_.rows);
    while (now_.held && tile == 0 && passed_.load() < tiles2()) std::this_thread::yield();
    if (now_.own) await([&] { return queue_.pieces(set) == now_.hits; }, late);
    const f64 first = !now_.own ? token(hit) : *late ? std::nan("") : x_[hit];
    for (i32 row = begin; row < end; ++row) {
      f64* at = &y_[hit * s_.rows + row];
      if (now_.single) put(at, first + row + 1);
      else *at = first + row + 1;
    }
    if (!now_.single) queue_.report_rows(set, hit, end - begin);
  }

  // What is read after a wait was given up is never used: here it is not even read, since that is a race.
  void multiply_second(int set, i32 tile, bool* late) {
    const i32 hit = tile / tiles2(), begin = tile % tiles2() * s_.tall, end = std::min(begin + s_.tall, s_.columns);
    f64 sum = 0.0;
    if (!now_.single) await([&] { return queue_.there(set, hit, s_.rows); }, late);
    for (i32 row = 0; row < s_.rows && !*late; ++row) {
      f64 number = kNone, *at = &y_[hit * s_.rows + row];
      if (now_.single) await([&] { return (number = poll(at)) != kNone; }, late);
      else number = *at;
      sum += number;
    }
    if (*late) sum = std::nan("");
    if (now_.held && hit == 0) ++passed_;
    for (i32 c = begin; c < end; ++c) put(&z_[hit * s_.columns + c], sum * (c + 1));
    ++stored_;
  }

  void add_up(i32 c, bool* late) {
    ++added_[c];
    f64 sum = 0.0;
    for (i32 hit = 0; hit < now_.hits; ++hit) {
      f64 number = kNone;
      await([&] { return (number = poll(&z_[hit * s_.columns + c])) != kNone; }, late);
      sum += number == kNone ? std::nan("") : number;
    }
    output_[c] = sum;
  }

  std::string check() const {
    for (i32 tile = 0; tile < now_.hits * (tiles1() + tiles2()); ++tile) {
      if (done_[tile] != 1) return "a tile was done " + std::to_string(done_[tile]) + " times";
    }
    for (i32 c = 0; c < s_.columns; ++c) {
      if (added_[c] != 1) return "columns were added up " + std::to_string(added_[c]) + " times";
      f64 expected = 0.0;
      for (i32 hit = 0; hit < now_.hits; ++hit) {
        for (i32 row = 0; row < s_.rows; ++row) expected += value(hit, row) * (c + 1);
      }
      if (output_[c] != expected && !(marked_ && std::isnan(output_[c]))) return "wrong numbers";
    }
    if (marked_ != now_.held) return marked_ ? "marked" : "not marked";
    return words_.back() == kCanary ? "" : "memory behind the queue was written";
  }

  Size s_;
  std::vector<i32> words_;
  Launch now_;
  std::size_t number_ = 0;
  std::vector<f64> x_, y_, z_,
      output_;                     // [hits], [hits, rows], [hits, columns], [columns]; at first what a launch left
  std::vector<i32> added_, done_;  // times; [columns], [tiles]
  Protocol queue_;
  std::atomic<i32> free_{s_.places};  // places
  std::atomic<bool> marked_{false};
  std::atomic<i32> passed_{0}, stored_{0};  // tiles of hit 0's gemm2; of gemm2
};

constexpr Size kSizes[] = {{2, 2, 2, 2, 2},      {3, 2, 3, 1, 4}, {4, 4, 1, 5, 3, 2}, {3, 1, 2, 2, 1},
                           {5, 3, 33, 1, 31, 4}, {6, 6, 2, 3, 2}, {1, 1, 3, 2, 5, 3}};

std::vector<Launch> random_launches(i32 count, i32 most_hits) {
  std::minstd_rand random(7);
  std::vector<Launch> launches(count);
  for (Launch& launch : launches) {
    launch.hits = static_cast<i32>(random() % (most_hits + 1));
    launch.single = random() % 2 == 0;
    launch.own = random() % 2 == 0;
  }
  return launches;
}

TEST(Queue, ManyLaunchesShareItsMemory) {
  for (const Size& size : kSizes) {
    EXPECT_EQ(Layer(size).run(random_launches(1000, size.hits)), "")
        << size.blocks << " blocks in " << size.places << " places, " << size.hits << " hits";
  }
}

TEST(Queue, LaunchesAreRightAfterAWaitWasGivenUp) {
  for (const Size& size : {Size{2, 2, 2, 2, 2}, Size{4, 3, 3, 3, 5, 2}}) {
    std::vector<Launch> launches = random_launches(300, size.hits);
    for (std::size_t n = 0; n < launches.size(); n += 5 + n % 2)
      launches[n] = {size.hits, 20, true, n % 4 < 2, false, n % 3 == 0};
    EXPECT_EQ(Layer(size).run(launches), "") << size.blocks << " blocks";
  }
}

// Mostly with one place, where every run is the same.
TEST(Queue, MutantsAreFound) {
  const Size one{3, 1, 2, 3, 2}, two{2, 2, 2, 2, 2};
  const std::vector<Launch> launches(4, Launch{2, 50});
  EXPECT_EQ(Layer(one).run(launches), "");
  EXPECT_EQ(Layer(one, Broken::never_clears).run(launches), "a tile was done 0 times");
  EXPECT_EQ(Layer(one, Broken::clears_own).run(launches), "a tile was done 2 times");
  EXPECT_EQ(Layer(one, Broken::first_turns).run(launches), "a tile was done 2 times");
  EXPECT_EQ(Layer(one, Broken::first_given).run(launches), "marked");
  EXPECT_EQ(Layer(two, Broken::never_waits).run({{2, 50, true}}), "wrong numbers");
  EXPECT_EQ(Layer(one, Broken::never_empties).run({{2, 50, false, false, true}}), "wrong numbers");
  EXPECT_EQ(Layer(one).run({{2, 50, false, false, true}}), "marked");
  EXPECT_EQ(Layer(two, Broken::empties_late).run({{2, 50}}), "marked");
}

// Notes which words are touched.
struct Touched {
  static inline std::set<i32*> words;
  static i32 add(i32* p, i32) { return words.insert(p), 0; }
  static void add_release(i32* p, i32) { words.insert(p); }
  static i32 load_acquire(i32* p) { return words.insert(p), 0; }
  static void store(i32* p, i32) { words.insert(p); }
};

TEST(Queue, SetsShareNoWord) {
  for (const i32 hits : {1, 2, 31, 257, 33, 96}) {
    const gpu::QueueShape shape{7, hits};
    std::vector<i32> memory(shape.words());
    const gpu::Queue<Touched> queue{shape, memory.data()};
    std::set<i32*> all;
    for (const int set : {0, 1}) {
      Touched::words.clear();
      queue.take(set), queue.take_part(set), queue.take_sum(set);
      queue.report_part(set), queue.parts(set);
      queue.take_piece(set), queue.report_piece(set), queue.pieces(set);
      for (i32 h = 0; h < hits; ++h) queue.report_rows(set, h, 1), queue.rows(set, h);
      const std::set<i32*> used = std::exchange(Touched::words, {});
      EXPECT_EQ(used.size(), std::size_t{6} + hits);
      EXPECT_GE(*used.begin(), memory.data() + gpu::QueueShape::kLine);  // arrivals have a line of their own
      EXPECT_LT(*used.rbegin(), memory.data() + shape.words());
      for (i32 b = 0; b < shape.blocks; ++b) queue.clear_other(1 - set, b, shape.blocks);
      EXPECT_TRUE(std::includes(Touched::words.begin(), Touched::words.end(), used.begin(), used.end()));
      EXPECT_EQ(static_cast<i32>(Touched::words.size()), shape.set_words());
      all.insert(Touched::words.begin(), Touched::words.end());
    }
    EXPECT_EQ(static_cast<i32>(all.size()), 2 * shape.set_words());
  }
}

}  // namespace
}  // namespace fourmoe
