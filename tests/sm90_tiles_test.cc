// The order of tiles and their choice, against brute force.
#include <gtest/gtest.h>

#include <random>
#include <utility>

#include "backends/sm90/tiles.h"
#include "gpu/tile_order.h"

namespace fourmoe::sm90 {
namespace {

template <class T>
int narrowest(int slots) {
  int n = T::size(0);
  for (int width = 0; width < T::kWidths; ++width) n = T::size(width) >= slots ? T::size(width) : n;
  return n;
}

// The slots of the tiles of one row block, in order of slots, and their N.
struct Cut {
  std::vector<int> slots, sizes;
};

// The tiles of an expert with slots [begin, begin + count) as they are counted: widths, row blocks and slots ascend,
// and every row block has the same.
template <class T>
Cut cut(int expert, int begin, int count, int row_blocks) {
  using Order = gpu::TileOrder<T>;
  std::vector<Cut> cuts(row_blocks);
  std::vector<int> next(row_blocks, begin);
  for (int width = 0; width < T::kWidths; ++width) {
    const int tiles = Order::tiles(count, width);
    for (int within = 0; within < tiles * row_blocks; ++within) {
      const gpu::Tile tile = Order::tile(width, expert, begin, begin + count, tiles, within);
      EXPECT_EQ(tile.width, width);
      EXPECT_EQ(tile.expert, expert);
      EXPECT_EQ(tile.row_block, within / tiles);
      EXPECT_EQ(tile.slot, next.at(tile.row_block));
      next.at(tile.row_block) += tile.slots;
      cuts[tile.row_block].slots.push_back(tile.slots);
      cuts[tile.row_block].sizes.push_back(T::size(width));
    }
  }
  for (int block = 0; block < row_blocks; ++block) {
    EXPECT_EQ(next[block], begin + count);  // with tile.slot above: every slot is in one tile
    EXPECT_EQ(cuts[block].slots, cuts[0].slots);
  }
  return cuts[0];
}

// As few tiles as the widest N allows; all but the last of one N and full; no narrower N would do.
template <class T>
void expect_cut(const Cut& cut, int count) {
  const int tiles = static_cast<int>(cut.slots.size());
  ASSERT_EQ(tiles, (count + T::size(0) - 1) / T::size(0));
  for (int i = 0; i < tiles; ++i) {
    ASSERT_GE(cut.slots[i], 1);
    ASSERT_EQ(cut.sizes[i], i + 1 < tiles ? cut.sizes[0] : narrowest<T>(cut.slots[i]));
    if (i + 1 < tiles) {
      ASSERT_EQ(cut.slots[i], cut.sizes[i]);
    }
  }
  for (int width = 0; width < T::kWidths && tiles > 0; ++width) {
    if (T::size(width) < cut.sizes[0]) {
      ASSERT_LT(T::size(width) * tiles, count);
    }
  }
}

template <class T>
void expect_cover(int most, int row_blocks) {
  for (int width = 0; width < T::kWidths; ++width) {
    ASSERT_EQ(T::size(width) % 8, 0);
    if (width > 0) {
      ASSERT_LT(T::size(width), T::size(width - 1));
    }
  }
  int begin = 0;
  for (int count = 0; count <= most; begin += count, ++count) {
    SCOPED_TRACE(::testing::Message() << "an expert of " << count << " slots, widest N " << T::size(0));
    expect_cut<T>(cut<T>(count, begin, count, row_blocks), count);
    if (::testing::Test::HasFailure()) return;
  }
}

template <int... kTiles>
void expect_cover_of_all(int most, std::integer_sequence<int, kTiles...>) {
  (expect_cover<Tiles<kTiles>>(most, 3), ...);
}

TEST(TileOrder, CoversEverySlotOnce) { expect_cover_of_all(1600, std::make_integer_sequence<int, kTileShapeCount>()); }

// Two tiles of like N, not a full one and one of few slots.
TEST(TileOrder, CutsEvenly) {
  using T = Tiles<7>;
  static_assert(T::size(0) == 256);
  EXPECT_EQ(cut<T>(0, 0, 256, 1).slots, (std::vector<int>{256}));
  for (int count = 257; count < 288; ++count) {
    const Cut found = cut<T>(0, 0, count, 1);
    ASSERT_EQ(found.slots.size(), 2u);
    EXPECT_LE(found.slots[0] - found.slots[1], 32) << count;
  }
}

// The best of all plans by far in bench/results/2026-11-30-sm90-choices.json, as the rule has to take them for layers
// that no table knows.
TEST(TileChoice, TakesWhatWasBest) {
  const auto whole = [](int rows1, int rows2, i32 experts, i64 picks, bool split) {
    return name_of(kTileShapes[choose_whole({{rows1, rows2}, experts, picks, split}, 132)]);
  };
  EXPECT_EQ(whole(16, 32, 256, 8, true), "4x1x7s:8,8+h3");         // H2048 I512, one token
  EXPECT_EQ(whole(16, 32, 256, 4 * 8, true), "4x1x7s:8,8+f3+h3");  // four: others 5 % and more behind
  EXPECT_EQ(whole(29, 42, 128, 8 * 6, true), "4x1x4:8,8+h3+d4");   // Nemotron-3 Nano, eight: 7 %
  EXPECT_EQ(whole(90, 45, 32, 24 * 4, false), "4x1x4:8,8+h3+d4");  // gpt-oss-20b, 24: 7 %
  EXPECT_EQ(whole(90, 45, 128, 24 * 4, false),
            "4x1x4:8,8+h3+d4");                                  // gpt-oss-120b, 24, whose rows fill no blocks: 3.6 %
  EXPECT_EQ(whole(24, 32, 128, 64 * 8, false), "4x2x4:8,8+h2");  // Qwen3-30B, 64: 5 %
  EXPECT_EQ(whole(48, 64, 128, 64 * 8, false), "4x2x4:8,8+h2");  // Qwen3-235B, 64: 5 %
  const auto by_pick = [](int rows1, int rows2, i32 experts, i64 picks) {  // 2026-11-30-sm90-w4a4.json
    LayerLoad load{{rows1, rows2}, experts, picks, true};
    load.by_pick = true;
    return name_of(kTileShapes[choose_whole(load, 132)]);
  };
  EXPECT_EQ(by_pick(64, 64, 256, 3 * 6), "4x1x7s:8,8+f3+h3");  // V4-Flash, three: 10 %
  EXPECT_EQ(by_pick(29, 42, 128, 6 * 6), "4x1x7s:8,8+f3+h3");  // Nemotron-3 Nano, six: 5 %
  EXPECT_EQ(by_pick(64, 112, 256, 2 * 8), "4x1x4:8,8+h3+d4");  // DSV3, two: 4 %
  EXPECT_EQ(by_pick(16, 32, 256, 32 * 8), "4x1x4:8,8+h3+d4");  // H2048 I512, 32: 5 %
  EXPECT_EQ(by_pick(64, 112, 256, 8 * 8), "4x2x4:8,8+h2");     // DSV3, eight: 1 %
  const auto gemm = [](bool first, int rows, i32 experts, i64 picks) {
    return name_of(kTileShapes[choose({rows, experts, picks, true, first}, 132)]);
  };
  EXPECT_EQ(gemm(true, 90, 32, 256 * 4), "4x2x2:48,40,32,24,16,8+d4");       // gpt-oss-20b, 256: 6 %
  EXPECT_EQ(gemm(false, 45, 32, 256 * 4), "4x1x3:64,56,48,40,32,16+f3+d4");  // likewise: 4 %
  EXPECT_EQ(gemm(false, 32, 128, 64 * 8), "4x1x4:24,16,8+f3+d4");            // Qwen3-30B, 64
  EXPECT_EQ(gemm(true, 64, 256, 512 * 8), "4x2x2:48,40,32,24,16,8+d4");      // DSV3, 512
  EXPECT_EQ(gemm(false, 112, 256, 1024 * 8), "4x2x2:48,40,32,24,16,8+d4");   // DSV3, 1024
  EXPECT_EQ(gemm(true, 64, 256, 2048 * 8), "3x2x4:88,80,72,64,56,48");       // DSV3, 2048: 9 %
}

TEST(TileChoice, FollowsTheSlotsOfAnExpert) {
  const auto most = [](i64 slots, bool split) {
    return kTileShapes[choose({32, 128, slots, split, false}, 132)].sizes[0];
  };
  EXPECT_TRUE(kTileShapes[choose({32, 128, 8, true, false}, 132)].split);
  EXPECT_FALSE(kTileShapes[choose({32, 128, 8, false, false}, 132)].split);
  EXPECT_TRUE(
      kTileShapes[choose({16, 128, 400, true, true}, 132)].split);  // gemm1 of few slots and rows an expert alone
  EXPECT_FALSE(kTileShapes[choose({16, 128, 400, true, false}, 132)].split);
  EXPECT_FALSE(kTileShapes[choose({32, 128, 400, true, true}, 132)].split);
  EXPECT_FALSE(kTileShapes[choose({32, 128, 1200, true, true}, 132)].split);
  EXPECT_LE(most(8, false), 24);
  EXPECT_LE(most(64 * 8, true), 40);
  EXPECT_EQ(most(32768 * 8, true), 256);
  for (i64 slots = 1, before = 0; slots < 1 << 20; slots *= 2) {
    EXPECT_GE(most(slots, false), before);
    before = most(slots, false);
  }
}

}  // namespace
}  // namespace fourmoe::sm90
