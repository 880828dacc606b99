// The queue of sm90's one launch (backends/sm90/whole.cuh), as a model of which every interleaving is visited: blocks
// take tiles of both GEMMs by tickets, know some of them ahead, load a tile of gemm2 when its hit's tiles of gemm1 are
// reported, multiply, and hand the sums to an epilogue, which reports tiles one behind the other; whoever reports the
// last hit of some columns adds them up. Searched for deadlocks, tiles done twice or too early, and sums taken twice or
// before their terms.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <deque>
#include <string>
#include <unordered_set>
#include <vector>

#include "format/number.h"

namespace fourmoe {
namespace {

// The world, and what a mutant of the protocol would do.
struct World {
  int blocks = 3;
  int places = 3;  // blocks that the machine holds at once: others come when one has ended
  int hits = 2;
  int rows1 = 2;  // row tiles of gemm1, of a hit
  int rows2 = 2;
  int ahead = 2;             // tiles that a block knows and has not multiplied
  int handed = 1;            // and that it has multiplied and not reported
  bool tickets = true;       // false: tiles are dealt to the blocks in turn, come or not
  bool first_given = false;  // true: a block's first tile is its own number, and only the others are taken
  bool first_first = true;   // false: tiles of gemm2 stand before those of gemm1
  bool waits = true;         // false: gemm2 does not wait
  bool cleared = true;       // false: a counter keeps what a call before it left

  int tiles1() const { return hits * rows1; }
  int tiles() const { return hits * (rows1 + rows2); }
};

struct Block {
  enum State : u8 { absent, running, ended };
  State state = absent;
  bool drained = false;  // it has been told that no tile is left
  u8 taken = 0;          // tiles so far
  u8 loaded = 0;         // of those in the feed, from the front
  std::vector<u8> feed;  // oldest first
  std::vector<u8> handed;
};

struct State {
  int tickets = 0;
  std::vector<Block> blocks;
  std::vector<u8> ready, done, executed, summed;

  std::string key() const {
    std::string k(1, static_cast<char>(tickets));
    for (const Block& b : blocks) {
      k += {static_cast<char>(b.state), static_cast<char>(b.drained), static_cast<char>(b.taken),
            static_cast<char>(b.loaded), static_cast<char>(b.feed.size())};
      k.append(b.feed.begin(), b.feed.end());
      k += static_cast<char>(b.handed.size());
      k.append(b.handed.begin(), b.handed.end());
    }
    for (const auto* part : {&ready, &done, &executed, &summed}) k.append(part->begin(), part->end());
    return k;
  }
};

class Search {
 public:
  explicit Search(const World& world) : w_(world) {}

  // "" or the first thing found to be wrong.
  std::string run() {
    State start;
    start.blocks.resize(w_.blocks);
    start.ready.assign(w_.hits, w_.cleared ? 0 : 1);
    start.done.assign(w_.rows2, 0);
    start.executed.assign(w_.tiles(), 0);
    start.summed.assign(w_.rows2, 0);
    visit(start);
    while (!open_.empty() && wrong_.empty()) {
      const State state = open_.front();
      open_.pop_front();
      const std::size_t before = moves_;
      for (int b = 0; b < w_.blocks; ++b) advance(state, b);
      if (moves_ == before) finish(state);
    }
    return wrong_;
  }
  std::size_t states() const { return seen_.size(); }

 private:
  bool second(int tile) const { return w_.first_first ? tile >= w_.tiles1() : tile < w_.hits * w_.rows2; }
  int within(int tile) const {
    return second(tile) == w_.first_first ? tile - (w_.first_first ? w_.tiles1() : w_.hits * w_.rows2) : tile;
  }
  int hit(int tile) const { return within(tile) / (second(tile) ? w_.rows2 : w_.rows1); }
  int row(int tile) const { return within(tile) % (second(tile) ? w_.rows2 : w_.rows1); }

  void visit(const State& state) {
    ++moves_;
    if (seen_.insert(state.key()).second) open_.push_back(state);
  }

  // Every move that one block can make.
  void advance(const State& state, int b) {
    const Block& block = state.blocks[b];
    if (block.state == Block::absent) return arrive(state, b);
    if (block.state == Block::ended) return;
    if (!block.drained && static_cast<int>(block.feed.size()) < w_.ahead) take(state, b);
    if (block.loaded < block.feed.size()) load(state, b);
    if (block.loaded > 0 && static_cast<int>(block.handed.size()) < w_.handed) multiply(state, b);
    if (!block.handed.empty()) report(state, b);
    if (block.drained && block.feed.empty() && block.handed.empty()) {
      State next = state;
      next.blocks[b].state = Block::ended;
      visit(next);
    }
  }

  void arrive(const State& state, int b) {
    const auto running = [](const Block& x) { return x.state == Block::running; };
    if (std::count_if(state.blocks.begin(), state.blocks.end(), running) >= w_.places) return;
    State next = state;
    next.blocks[b].state = Block::running;
    visit(next);
  }

  void take(const State& state, int b) {
    State next = state;
    Block& block = next.blocks[b];
    int tile = block.taken * w_.blocks + b;
    if (w_.tickets && !w_.first_given) tile = next.tickets++;
    if (w_.tickets && w_.first_given) tile = block.taken == 0 ? b : w_.blocks + next.tickets++;
    ++block.taken;
    if (tile < w_.tiles()) block.feed.push_back(static_cast<u8>(tile));
    else block.drained = true;
    visit(next);
  }

  void load(const State& state, int b) {
    const int tile = state.blocks[b].feed[state.blocks[b].loaded];
    if (second(tile) && w_.waits && state.ready[hit(tile)] < w_.rows1) return;
    State next = state;
    ++next.blocks[b].loaded;
    if (second(tile)) expect(terms(state, hit(tile)) == w_.rows1, "gemm2 read what gemm1 had not written");
    visit(next);
  }

  int terms(const State& state, int of) const {
    int count = 0;
    for (int tile = 0; tile < w_.tiles(); ++tile) count += !second(tile) && hit(tile) == of ? state.executed[tile] : 0;
    return count;
  }

  void multiply(const State& state, int b) {
    State next = state;
    Block& block = next.blocks[b];
    block.handed.push_back(block.feed.front());
    block.feed.erase(block.feed.begin());
    --block.loaded;
    visit(next);
  }

  void report(const State& state, int b) {
    State next = state;
    Block& block = next.blocks[b];
    const int tile = block.handed.front();
    block.handed.erase(block.handed.begin());
    expect(next.executed[tile]++ == 0, "a tile was done twice");
    if (!second(tile)) {
      ++next.ready[hit(tile)];
    } else if (++next.done[row(tile)] == w_.hits) {
      expect(next.summed[row(tile)]++ == 0, "columns were added up twice");
      for (int t = 0; t < w_.tiles(); ++t) {
        if (second(t) && row(t) == row(tile)) expect(next.executed[t] == 1, "a sum came before its terms");
      }
    }
    visit(next);
  }

  void finish(const State& state) {
    for (const u8 times : state.executed) expect(times == 1, "deadlock");
    for (const u8 times : state.summed) expect(times == 1, "columns were not added up");
  }

  void expect(bool holds, const char* words) {
    if (!holds && wrong_.empty()) wrong_ = words;
  }

  World w_;
  std::unordered_set<std::string> seen_;
  std::deque<State> open_;
  std::size_t moves_ = 0;
  std::string wrong_;
};

TEST(WholeModel, EveryInterleavingEndsRight) {
  for (const int places : {1, 2, 3}) {
    World world;
    world.places = places;
    world.rows2 = places == 3 ? 1 : 2;
    Search search(world);
    EXPECT_EQ(search.run(), "") << places << " places";
    EXPECT_GT(search.states(), 20u);
  }
  for (const auto& [hits, rows1, rows2] : {std::array{1, 3, 1}, {3, 1, 2}, {1, 1, 4}, {3, 2, 1}}) {
    World world;
    world.blocks = world.places = 2;
    world.hits = hits, world.rows1 = rows1, world.rows2 = rows2;
    EXPECT_EQ(Search(world).run(), "") << hits << " hits of " << rows1 << " and " << rows2;
  }
  World deep;
  deep.blocks = deep.places = 2;
  deep.ahead = 3, deep.handed = 3;
  EXPECT_EQ(Search(deep).run(), "");
}

TEST(WholeModel, MutantsAreFound) {
  World dealt;  // a block that comes late holds tiles that others wait for
  dealt.tickets = false, dealt.places = 1;
  EXPECT_EQ(Search(dealt).run(), "deadlock");
  World given;  // so does one whose first tile is not taken but given
  given.first_given = true, given.places = 2;
  EXPECT_EQ(Search(given).run(), "deadlock");
  World reversed;
  reversed.first_first = false, reversed.places = 1;
  EXPECT_EQ(Search(reversed).run(), "deadlock");
  World hasty;
  hasty.waits = false;
  EXPECT_EQ(Search(hasty).run(), "gemm2 read what gemm1 had not written");
  World stale;
  stale.cleared = false;
  EXPECT_EQ(Search(stale).run(), "gemm2 read what gemm1 had not written");
}

}  // namespace
}  // namespace fourmoe
