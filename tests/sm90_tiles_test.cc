// The order of tiles and their choice, against brute force.
#include <gtest/gtest.h>

#include <random>
#include <utility>

#include "backends/sm90/tiles.h"
#include "gpu/tile_order.h"

namespace fourmoe::sm90 {
namespace {

// Every (slot, row block) of every expert is in one tile, whose N no narrower one of the list could replace.
template <class T>
void expect_cover(const std::vector<int>& counts, int row_blocks) {
  using Order = gpu::TileOrder<T>;
  int begin = 0;
  for (int expert = 0; expert < static_cast<int>(counts.size()); ++expert) {
    const int count = counts[expert], end = begin + count;
    std::vector<int> seen(static_cast<std::size_t>(count) * row_blocks, 0);
    for (int width = 0; width < T::kWidths; ++width) {
      const int tiles = Order::tiles(count, width);
      for (int within = 0; within < tiles * row_blocks; ++within) {
        const gpu::Tile tile = Order::tile(width, expert, begin, end, tiles, within);
        ASSERT_EQ(tile.expert, expert);
        ASSERT_GE(tile.slots, 1);
        ASSERT_LE(tile.slots, T::size(width));
        if (width + 1 < T::kWidths) {
          ASSERT_GT(tile.slots, T::size(width + 1)) << count;
        }
        for (int slot = tile.slot; slot < tile.slot + tile.slots; ++slot) {
          ++seen[static_cast<std::size_t>(slot - begin) * row_blocks + tile.row_block];
        }
      }
    }
    for (const int times : seen) ASSERT_EQ(times, 1) << "expert of " << count << " slots";
    begin = end;
  }
}

template <int... kTiles>
void expect_cover_of_all(const std::vector<int>& counts, std::integer_sequence<int, kTiles...>) {
  (expect_cover<Tiles<kTiles>>(counts, 3), ...);
}

TEST(TileOrder, CoversEverySlotOnce) {
  std::vector<int> counts;
  for (int count = 0; count <= 600; ++count) counts.push_back(count);
  expect_cover_of_all(counts, std::make_integer_sequence<int, kTileShapeCount>());
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
