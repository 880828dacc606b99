// What every level's source needs of the compiler.
#pragma once

// Functions of a level are inlined or unnamed: no code of one level can end up in another.
#define FOURMOE_INLINE __attribute__((always_inline)) inline

// Loops over vectors and tokens unroll, so that their arrays are registers.
#if defined(__clang__)
#define FOURMOE_UNROLL _Pragma("unroll")
#else
#define FOURMOE_UNROLL _Pragma("GCC unroll 32")
#endif
