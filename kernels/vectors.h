/* Vectors of LANES floats, which GCC and Clang compile to the processor's vector instructions. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __FMA__
#include <immintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

/* Sums are taken over groups of GROUP floats and memory is padded to them, whatever LANES is, so that results do not
 * depend on it. A file may define LANES before it includes this one. */
#define GROUP 16
#ifndef LANES
#define LANES GROUP
#endif
#define PARTS (GROUP / LANES) /* vectors of a group */

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* Round a number of values up to whole groups. */
INLINE int64_t padded(int64_t values) { return (values + GROUP - 1) / GROUP * GROUP; }

INLINE vector splat(float value) { return value - (vector){0}; }

/* Load `count` values, filled up with zeros to LANES. */
INLINE vector load(const float *from, int64_t count) {
    if (count >= LANES) return *(const unaligned *)from;
    vector value = {0};
    memcpy(&value, from, 4 * count);
    return value;
}

INLINE void store(float *to, vector value, int64_t count) {
    if (count >= LANES)
        *(unaligned *)to = value;
    else
        memcpy(to, &value, 4 * count);
}

INLINE vector choose(mask which, vector yes, vector no) {
    return (vector)((which & (mask)yes) | (~which & (mask)no));
}

/* Return a * b + c, rounded once if the processor can. In loops GCC splits what it could fuse when it tunes for some
 * processors, to shorten a chain of dependent sums; the kernels have enough independent ones. */
INLINE vector multiply_add(vector a, vector b, vector c) {
#if defined __FMA__ && LANES == 8
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

/* ReLU: zero for negative values; NaN stays NaN. */
INLINE vector vector_relu(vector value) { return choose(value < splat(0), splat(0), value); }

/* Add the lanes of a group. */
INLINE float sum_of_group(const vector *parts) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    /* Unions, because __builtin_shufflevector needs GCC 12. */
    union { vector given[PARTS]; eight parts[2]; } halves;
    for (int part = 0; part < PARTS; part++) halves.given[part] = parts[part];
    union { eight whole; four parts[2]; } quarters = {halves.parts[0] + halves.parts[1]};
    four quarter = quarters.parts[0] + quarters.parts[1];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

#if LANES == GROUP
INLINE float sum_of(vector value) { return sum_of_group(&value); }
#endif

/* Return value^power for values >= 0, by products if the power is 0, 1, 2, 3, 4, 7 or 8. */
INLINE vector raised(vector value, float power) {
    if (power == 4) {
        vector square = value * value;
        return square * square;
    }
    if (power == 3) return value * value * value;
    if (power == 0) return splat(1);
    if (power == 1) return value;
    vector square = value * value;
    if (power == 2) return square;
    if (power == 8) {
        square *= square;
        return square * square;
    }
    if (power == 7) return square * square * square * value;
    for (int lane = 0; lane < LANES; lane++) value[lane] = powf(value[lane], power);
    return value;
}
