"""Differentiable siamese augmentation: one operation per image, or its transpose, in one launch.

Each operation is ``mask * colour(bilinear(image, source(pixel)))`` with an affine ``source`` in pixels. A crop or a
flip has whole-pixel sources, so its weights are exactly 0 and 1 and its result is a copy. The transpose is a gather
too: an input pixel sums the output pixels that read it, in a fixed order.
"""

import triton
import triton.language as tl

# Indices into atom_fast.names.OPERATIONS; any other code leaves an image unchanged.
COLOR = tl.constexpr(0)
CROP = tl.constexpr(1)
CUTOUT = tl.constexpr(2)
FLIP = tl.constexpr(3)
SCALE = tl.constexpr(4)
ROTATE = tl.constexpr(5)

BLOCK = 512  # values per tile: one 128-bit store of float32 per thread
WARPS = 4
PROGRAMS = 2048  # about as many as the largest GPUs hold at once; fewer images are split over several programs


def split(batch: int, values: int) -> tuple[int, int]:
    """Return the number of programs that share an image of ``values`` numbers, and of tiles per program."""
    tiles = triton.cdiv(values, BLOCK)
    each = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, batch)))
    return triton.cdiv(tiles, each), each


@triton.jit
def augmentation_kernel(
    images,
    operations,
    uniforms,
    groups,
    output,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    CUT_Y: tl.constexpr,
    CUT_X: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    MAX_ANGLE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OFFSET: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Augment image ``program_id(0)``; the programs along axis 1 compute ``TILES`` * ``BLOCK`` of its values each.

    Args:
        images: [B, C, H, W], any float type and strides (in values); a gradient when ``TRANSPOSED``.
        operations: int64 [G], contiguous, one code per group.
        uniforms: float32 [G, 3], contiguous, in [0, 1).
        groups: int64 [B], contiguous; without ``HAS_GROUPS`` image i belongs to group i.
        output: [B, C, H, W], contiguous in NCHW or, with ``CHANNELS_LAST``, in channels_last.
        PAD_Y, PAD_X: largest shift of a crop, pixels.
        CUT_Y, CUT_X: height and width of a cutout, pixels.
        REACH_Y, REACH_X: largest distance, pixels, of the output pixels that read an input pixel from its image.
        MAX_SCALE: largest ratio of a scale; the smallest is its inverse.
        MAX_ANGLE: largest angle of a rotation, radians.
        TRANSPOSED: apply the transpose of the linear part.
        OFFSET: add the brightness, the part that does not depend on the image.
    """
    COMPUTE: tl.constexpr = tl.float64 if images.dtype.element_ty == tl.float64 else tl.float32
    VALUES: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    image = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + image) if HAS_GROUPS else image
    operation = tl.load(operations + group)
    first = tl.load(uniforms + group * 3)
    second = tl.load(uniforms + group * 3 + 1)
    third = tl.load(uniforms + group * 3 + 2)
    strides = (tl.cast(channel_stride, tl.int64), tl.cast(row_stride, tl.int64), tl.cast(column_stride, tl.int64))
    images += image * batch_stride
    output += image * VALUES

    own, pixel, level, brightness = _colour(first, second, third, COMPUTE)
    shift = _crop_shift(operation, first, second, PAD_Y, PAD_X, COMPUTE)
    move, back = _moves(operation, first, second, shift, HEIGHT, WIDTH, MAX_SCALE, MAX_ANGLE, COMPUTE)
    cut_y, cut_x = _cut_corner(operation, first, second, HEIGHT, WIDTH, CUT_Y, CUT_X)
    constant = tl.zeros((), COMPUTE)
    if operation == COLOR:
        constant += level * _image_mean(images, strides, CHANNELS, HEIGHT, WIDTH, CHANNELS_LAST, COMPUTE, BLOCK)
        if OFFSET:
            constant += brightness

    for tile in range(TILES):
        index = (tl.program_id(1) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = index < VALUES
        channel, y, x = _position(index, CHANNELS, HEIGHT, WIDTH, CHANNELS_LAST)
        if operation == COLOR:
            value = own * _load(images, strides, channel, y, x, inside, COMPUTE) + constant
            for other in range(CHANNELS):
                value += pixel / CHANNELS * _load(images, strides, other, y, x, inside, COMPUTE)
        else:
            kept = inside & ((y < cut_y) | (y >= cut_y + CUT_Y) | (x < cut_x) | (x >= cut_x + CUT_X))
            if TRANSPOSED:
                value = _gather_transposed(
                    images, strides, move, back, channel, y, x, kept, HEIGHT, WIDTH, REACH_Y, REACH_X, COMPUTE
                )
            else:
                value = _gather(images, strides, move, channel, y, x, kept, HEIGHT, WIDTH, COMPUTE)
        tl.store(output + index, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _colour(first, second, third, COMPUTE: tl.constexpr):
    """Return the factors of a value, of its pixel's mean and of its image's mean, and the constant, of color.

    They are brightness, saturation and contrast in that order, multiplied out; both means are of the input.
    """
    brightness = first.to(COMPUTE) - 0.5
    saturation = second.to(COMPUTE) * 2
    contrast = third.to(COMPUTE) + 0.5
    return contrast * saturation, contrast * (1 - saturation), 1 - contrast, brightness


@triton.jit
def _crop_shift(operation, first, second, PAD_Y: tl.constexpr, PAD_X: tl.constexpr, COMPUTE: tl.constexpr):
    """Return the offset, down and across in whole pixels, at which a crop reads."""
    shift_y = tl.where(operation == CROP, tl.floor(first * (2 * PAD_Y + 1)) - PAD_Y, 0.0)
    shift_x = tl.where(operation == CROP, tl.floor(second * (2 * PAD_X + 1)) - PAD_X, 0.0)
    return shift_y.to(COMPUTE), shift_x.to(COMPUTE)


@triton.jit
def _moves(
    operation,
    first,
    second,
    shift,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    MAX_ANGLE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Return the maps from output pixel to source and from input pixel to image, as `_displacement` takes them."""
    first, second = first.to(COMPUTE), second.to(COMPUTE)
    shift_y, shift_x = shift
    stretch_y = tl.where(operation == SCALE, 1 / MAX_SCALE - 1 + first * (MAX_SCALE - 1 / MAX_SCALE), 0.0)
    stretch_x = tl.where(operation == SCALE, 1 / MAX_SCALE - 1 + second * (MAX_SCALE - 1 / MAX_SCALE), 0.0)
    stretch_x = tl.where((operation == FLIP) & (first < 0.5), -2.0, stretch_x)
    angle = tl.where(operation == ROTATE, (first - 0.5) * (2 * MAX_ANGLE), 0.0)
    sine, half = _sine(angle), _sine(angle / 2)
    turn = -2 * half * half
    skew_y, skew_x = sine * (HEIGHT / WIDTH), -sine * (WIDTH / HEIGHT)
    move = (turn + stretch_y, skew_y, skew_x, turn + stretch_x, shift_y, shift_x)
    stretch_y, stretch_x = -stretch_y / (1 + stretch_y), -stretch_x / (1 + stretch_x)
    back = (turn + stretch_y, -skew_y, -skew_x, turn + stretch_x, -shift_y, -shift_x)
    return move, back


@triton.jit
def _sine(angle):
    """Return the sine by its Taylor series, which is accurate to float64 up to 15 degrees.

    The library's sine is as accurate, but its code for large angles uses local memory.
    """
    square = angle * angle
    series = square * 0 + 1
    for step in tl.static_range(7):
        order = 2 * (7 - step)
        series = 1 - square / (order * (order + 1)) * series
    return angle * series


@triton.jit
def _displacement(move, y, x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return how far down and across a map moves a pixel: a 2x2 matrix times its offset from the centre, plus a shift.

    A displacement is a few pixels where a position may be a hundred, so its fraction has more correct digits.
    """
    yy, yx, xy, xx, shift_y, shift_x = move
    y, x = y - (HEIGHT - 1) / 2, x - (WIDTH - 1) / 2
    return yy * y + yx * x + shift_y, xy * y + xx * x + shift_x


@triton.jit
def _cut_corner(
    operation, first, second, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CUT_Y: tl.constexpr, CUT_X: tl.constexpr
):
    """Return the first row and column of the cleared square, which may cross the border; outside without cutout."""
    corner_y = tl.floor(first * (HEIGHT + 1 - CUT_Y % 2)).to(tl.int32) - CUT_Y // 2
    corner_x = tl.floor(second * (WIDTH + 1 - CUT_X % 2)).to(tl.int32) - CUT_X // 2
    return tl.where(operation == CUTOUT, corner_y, HEIGHT), corner_x


@triton.jit
def _image_mean(
    images,
    strides,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the mean of one image's values, added in the same order by every program."""
    total = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, CHANNELS * HEIGHT * WIDTH, BLOCK):
        index = start + tl.arange(0, BLOCK)
        channel, y, x = _position(index, CHANNELS, HEIGHT, WIDTH, CHANNELS_LAST)
        total += _load(images, strides, channel, y, x, index < CHANNELS * HEIGHT * WIDTH, COMPUTE)
    return tl.sum(total) / (CHANNELS * HEIGHT * WIDTH)


@triton.jit
def _position(index, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return channel, row and column of a value from its index in a contiguous image."""
    if CHANNELS_LAST:
        channel, place = index % CHANNELS, index // CHANNELS
    else:
        channel, place = index // (HEIGHT * WIDTH), index % (HEIGHT * WIDTH)
    return channel, place // WIDTH, place % WIDTH


@triton.jit
def _load(images, strides, channel, y, x, mask, COMPUTE: tl.constexpr):
    """Load values of one image, zero where masked, with 64-bit strides: these may span a whole data set."""
    channel_stride, row_stride, column_stride = strides
    offset = channel * channel_stride + y * row_stride + x * column_stride
    return tl.load(images + offset, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _tap(
    images, strides, weight, channel, y, x, kept, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr
):
    """Return a weight times a value, which is zero outside the image and not read if the weight is zero."""
    inside = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    return weight * _load(images, strides, channel, y, x, kept & inside & (weight > 0), COMPUTE)


@triton.jit
def _tent(distance):
    """Return the bilinear weight at a distance along one axis, in pixels."""
    return tl.maximum(1 - tl.abs(distance), 0)


@triton.jit
def _gather(
    images, strides, move, channel, y, x, kept, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr
):
    """Interpolate values bilinearly at the sources of output pixels."""
    move_y, move_x = _displacement(move, y, x, HEIGHT, WIDTH)
    whole_y, whole_x = tl.floor(move_y), tl.floor(move_x)
    value = tl.zeros(y.shape, COMPUTE)
    for step_y in tl.static_range(2):
        for step_x in tl.static_range(2):
            weight = _tent(move_y - whole_y - step_y) * _tent(move_x - whole_x - step_x)
            tap_y, tap_x = y + whole_y.to(tl.int32) + step_y, x + whole_x.to(tl.int32) + step_x
            value += _tap(images, strides, weight, channel, tap_y, tap_x, kept, HEIGHT, WIDTH, COMPUTE)
    return value


@triton.jit
def _gather_transposed(
    images,
    strides,
    move,
    back,
    channel,
    y,
    x,
    kept,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Compute gradients of input pixels: the weighted sum of the output pixels whose source is within a pixel."""
    back_y, back_x = _displacement(back, y, x, HEIGHT, WIDTH)
    near_y, near_x = tl.floor(back_y + 0.5).to(tl.int32), tl.floor(back_x + 0.5).to(tl.int32)
    value = tl.zeros(y.shape, COMPUTE)
    for step_y in range(-REACH_Y, REACH_Y + 1):
        for step_x in range(-REACH_X, REACH_X + 1):
            away_y, away_x = near_y + step_y, near_x + step_x
            move_y, move_x = _displacement(move, y + away_y, x + away_x, HEIGHT, WIDTH)
            weight = _tent(away_y + move_y) * _tent(away_x + move_x)
            value += _tap(images, strides, weight, channel, y + away_y, x + away_x, kept, HEIGHT, WIDTH, COMPUTE)
    return value
