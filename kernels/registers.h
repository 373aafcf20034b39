/* Bytes of a vector register. Compilers keep wider vectors in memory and compare them lane by lane. */
#pragma once

#ifdef __AVX512F__
#define REGISTER 64
#elif defined __AVX2__
#define REGISTER 32
#else
#define REGISTER 16
#endif
