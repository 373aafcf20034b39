/* `atom_fast.ops.attention`: attention maps and their gradient for features [B, C, H, W] of any strides, one thread per
 * sample. Half precision is computed in float.
 *
 * A sample is read as a matrix whose rows are adjacent in memory: a row per channel if positions are adjacent, a row
 * per position if channels are. One map is then the sums of rows of |f|^p, the other the sums of columns. */
#include "registers.h"
#include "vectors.h"

#define ROWS 4 /* rows at once: their powers are added before they are added to the sums of columns */

/* Where the rows or columns of a matrix are: `run` of them `near` apart, the next ones `far` from these. */
typedef struct {
    int64_t count, run, near, far;
} Axis;

typedef struct {
    Axis rows, columns;
    int by_place; /* a row per position */
} Matrix;

INLINE int64_t offset_of(Axis axis, int64_t i) { return i / axis.run * axis.far + i % axis.run * axis.near; }

INLINE int is_adjacent(Axis axis) {
    return (axis.near == 1 || axis.run == 1) && (axis.far == axis.run || axis.run == axis.count);
}

INLINE int has_adjacent_channels(const int64_t *strides, int64_t channels) { return strides[1] == 1 && channels > 1; }

INLINE Matrix matrix_of(const int64_t *strides, int64_t channels, int64_t height, int64_t width, int by_place) {
    Axis of_channels = {channels, channels, strides[1], 0}, of_places = {height * width, width, strides[3], strides[2]};
    return by_place ? (Matrix){of_places, of_channels, 1} : (Matrix){of_channels, of_places, 0};
}

#define IDENTITY(value) (value)

#define STORED float
#define VALUE float
#define BITS uint32_t
#define WIDENED IDENTITY
#define NARROWED IDENTITY
#define LEAST_NORM 1e-15
#define MOST_NORM 1e15
#define LEAST_PEAK 0x1p-126f
#define OF(name) name##_float32
#include "attention.h"
#undef OF
#undef STORED

#define STORED uint16_t
#undef WIDENED
#undef NARROWED
typedef uint32_t words __attribute__((vector_size(REGISTER)));
typedef uint16_t halves __attribute__((vector_size(REGISTER / 2)));
typedef float floats __attribute__((vector_size(REGISTER)));

INLINE words where(words which, words yes, words no) { return (which & yes) | (~which & no); }

INLINE floats widened_bfloat16(halves value) { return (floats)(__builtin_convertvector(value, words) << 16); }

/* Round to nearest, ties to even; NaN stays NaN. */
INLINE halves narrowed_bfloat16(floats value) {
    words bits = (words)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    words nan = (words)((bits & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector(where(nan, (bits >> 16) | 0x40, rounded), halves);
}

#define WIDENED widened_bfloat16
#define NARROWED narrowed_bfloat16
#define OF(name) name##_bfloat16
#include "attention.h"
#undef OF
#undef WIDENED
#undef NARROWED

INLINE floats widened_float16(halves value) {
    words bits = __builtin_convertvector(value, words), sign = (bits & 0x8000) << 16;
    words finite = (words)((floats)((bits & 0x7fff) << 13) * 0x1p112f); /* the exponents' biases differ by 112 */
    words not_finite = (words)((bits & 0x7c00) == 0x7c00);
    return (floats)(sign | where(not_finite, finite | 0x7f800000, finite));
}

/* Round to nearest, ties to even; NaN stays NaN. */
INLINE halves narrowed_float16(floats value) {
    words bits = (words)value, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    words normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    words subnormal = (words)((floats)magnitude + 0.5f) - 0x3f000000; /* 0.5 has units of 2^-24, the smallest half */
    words result = where((words)(magnitude < 0x38800000), subnormal, normal);
    result = where((words)(magnitude >= 0x47800000), (words){0} + 0x7c00, result);
    result = where((words)(magnitude > 0x7f800000), (words){0} + 0x7e00, result);
    return __builtin_convertvector(sign | result, halves);
}

#define WIDENED widened_float16
#define NARROWED narrowed_float16
#define OF(name) name##_float16
#include "attention.h"
#undef OF
#undef STORED
#undef VALUE
#undef BITS
#undef WIDENED
#undef NARROWED
#undef LEAST_NORM
#undef MOST_NORM
#undef LEAST_PEAK

#define STORED double
#define VALUE double
#define BITS uint64_t
#define WIDENED IDENTITY
#define NARROWED IDENTITY
#define LEAST_NORM 1e-150
#define MOST_NORM 1e150
#define LEAST_PEAK 0x1p-1022
#define OF(name) name##_float64
#include "attention.h"
