/* `atom_fast.ops.matching`: one thread per class and block of columns. */
#include "vectors.h"

#define COLUMNS 256

#define VALUE float
#define OF(name) name##_float32
#include "matching.h"
#undef VALUE
#undef OF

#define VALUE double
#define OF(name) name##_float64
#include "matching.h"
