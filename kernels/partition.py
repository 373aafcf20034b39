"""Decoding of small images and their siamese augmentation, or the transpose of both, in one launch.

A sheet holds ``PARTITION`` x ``PARTITION`` small images. Decoding enlarges one to the sheet's size, bilinearly: a line
of pixels reads the small line it lies in and, with a share of at most a half, the next one on its side; at the border
there is no next one. So the decoded image's mean is the small image's. The transpose is a gather too: a small pixel
sums, over the rows that show its image, the decoded pixels that read it, in a fixed order.
"""

import triton
import triton.language as tl

from .augmentation import (
    BLOCK,
    COLOR,
    ROTATE,
    SCALE,
    WARPS,
    _colour,
    _crop_shift,
    _cut_corner,
    _displacement,
    _gather_transposed,
    _image_mean,
    _load,
    _moves,
    _position,
    _tap,
    _tent,
)

__all__ = ["BLOCK", "WARPS", "partition_forward_kernel", "partition_transposed_kernel"]


@triton.jit
def partition_forward_kernel(
    sheets,
    operations,
    uniforms,
    groups,
    chosen,
    output,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTITION: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    CUT_Y: tl.constexpr,
    CUT_X: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    MAX_ANGLE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    HAS_CHOSEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode and augment row ``program_id(0)``; the programs along axis 1 compute ``BLOCK`` of its values each.

    Args:
        sheets: [S, C, H, W], any float type and strides (in values).
        operations: int64 [G], contiguous, one code per group.
        uniforms: float32 [G, 3], contiguous, in [0, 1).
        groups: int64 [B], contiguous; without ``HAS_GROUPS`` row i belongs to group i.
        chosen: int64 [B], contiguous, numbers of small images; without ``HAS_CHOSEN`` row i shows small image i.
        output: [B, C, H, W], contiguous in NCHW or, with ``CHANNELS_LAST``, in channels_last.
        PARTITION: small images along each side of a sheet; divides H and W.
        PAD_Y, PAD_X, CUT_Y, CUT_X, MAX_SCALE, MAX_ANGLE: as in `augmentation_kernel`.
        OFFSET: add the brightness, the part that does not depend on the image.
    """
    COMPUTE: tl.constexpr = tl.float64 if sheets.dtype.element_ty == tl.float64 else tl.float32
    VALUES: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    HIGH: tl.constexpr = HEIGHT // PARTITION
    WIDE: tl.constexpr = WIDTH // PARTITION
    row = tl.program_id(0).to(tl.int64)
    number = tl.load(chosen + row) if HAS_CHOSEN else row
    group = tl.load(groups + row) if HAS_GROUPS else row
    operation = tl.load(operations + group)
    first = tl.load(uniforms + group * 3)
    second = tl.load(uniforms + group * 3 + 1)
    third = tl.load(uniforms + group * 3 + 2)
    strides = (tl.cast(channel_stride, tl.int64), tl.cast(row_stride, tl.int64), tl.cast(column_stride, tl.int64))
    sheets += number // (PARTITION * PARTITION) * batch_stride
    sheets += number // PARTITION % PARTITION * HIGH * row_stride + number % PARTITION * WIDE * column_stride
    output += row * VALUES

    own, pixel, level, brightness = _colour(first, second, third, COMPUTE)
    shift = _crop_shift(operation, first, second, PAD_Y, PAD_X, COMPUTE)
    move, _ = _moves(operation, first, second, shift, HEIGHT, WIDTH, MAX_SCALE, MAX_ANGLE, COMPUTE)
    cut_y, cut_x = _cut_corner(operation, first, second, HEIGHT, WIDTH, CUT_Y, CUT_X)
    constant = tl.zeros((), COMPUTE)
    if operation == COLOR:
        constant += level * _image_mean(sheets, strides, CHANNELS, HIGH, WIDE, CHANNELS_LAST, COMPUTE, BLOCK)
        if OFFSET:
            constant += brightness

    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < VALUES
    channel, y, x = _position(index, CHANNELS, HEIGHT, WIDTH, CHANNELS_LAST)
    if operation == COLOR:
        value = own * _decoded(sheets, strides, channel, y, x, inside, HIGH, WIDE, PARTITION, COMPUTE) + constant
        for other in range(CHANNELS):
            read = _decoded(sheets, strides, other, y, x, inside, HIGH, WIDE, PARTITION, COMPUTE)
            value += pixel / CHANNELS * read
    else:
        kept = inside & ((y < cut_y) | (y >= cut_y + CUT_Y) | (x < cut_x) | (x >= cut_x + CUT_X))
        value = _gather_decoded(sheets, strides, move, channel, y, x, kept, HEIGHT, WIDTH, PARTITION, COMPUTE)
    tl.store(output + index, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def partition_transposed_kernel(
    gradient,
    operations,
    uniforms,
    groups,
    order,
    starts,
    output,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTITION: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    CUT_Y: tl.constexpr,
    CUT_X: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    MAX_ANGLE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    HAS_CHOSEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute small image ``program_id(0)``'s gradient; programs along axis 1 compute ``BLOCK`` of its values each.

    Args:
        gradient: [B, C, H, W], of the augmented images, any float type and strides (in values).
        order: int64 [B], contiguous, the rows ordered by the small image that they show.
        starts: int64 [S * PARTITION * PARTITION + 1], contiguous, where each small image's rows start in ``order``.
            Without ``HAS_CHOSEN`` small image i is shown by row i, and neither is read.
        output: [S, C, H, W], contiguous in NCHW or, with ``CHANNELS_LAST``, in channels_last.
        REACH_Y, REACH_X: largest distance, pixels, of the output pixels that read a small pixel from its image.

    The other arguments are those of `partition_forward_kernel`.
    """
    COMPUTE: tl.constexpr = tl.float64 if gradient.dtype.element_ty == tl.float64 else tl.float32
    HIGH: tl.constexpr = HEIGHT // PARTITION
    WIDE: tl.constexpr = WIDTH // PARTITION
    VALUES: tl.constexpr = CHANNELS * HIGH * WIDE
    number = tl.program_id(0).to(tl.int64)
    first_row = tl.load(starts + number) if HAS_CHOSEN else number
    last_row = tl.load(starts + number + 1) if HAS_CHOSEN else number + 1
    strides = (tl.cast(channel_stride, tl.int64), tl.cast(row_stride, tl.int64), tl.cast(column_stride, tl.int64))
    output += number // (PARTITION * PARTITION) * (CHANNELS * HEIGHT * WIDTH)
    corner = number // PARTITION % PARTITION * (HIGH * WIDTH) + number % PARTITION * WIDE
    output += corner * (CHANNELS if CHANNELS_LAST else 1)

    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < VALUES
    channel, y, x = _position(index, CHANNELS, HIGH, WIDE, CHANNELS_LAST)
    total = tl.zeros([BLOCK], COMPUTE)
    for at in range(first_row, last_row):
        row = tl.load(order + at) if HAS_CHOSEN else at
        group = tl.load(groups + row) if HAS_GROUPS else row
        operation = tl.load(operations + group)
        first = tl.load(uniforms + group * 3)
        second = tl.load(uniforms + group * 3 + 1)
        third = tl.load(uniforms + group * 3 + 2)
        image = gradient + row * batch_stride
        own, pixel, level, _ = _colour(first, second, third, COMPUTE)
        shift = _crop_shift(operation, first, second, PAD_Y, PAD_X, COMPUTE)
        move, back = _moves(operation, first, second, shift, HEIGHT, WIDTH, MAX_SCALE, MAX_ANGLE, COMPUTE)
        cut_y, cut_x = _cut_corner(operation, first, second, HEIGHT, WIDTH, CUT_Y, CUT_X)
        if operation == COLOR:
            mean = _image_mean(image, strides, CHANNELS, HEIGHT, WIDTH, CHANNELS_LAST, COMPUTE, BLOCK)
            total += _colour_transposed(
                image, strides, own, pixel, level * mean, channel, y, x, inside,
                CHANNELS, HIGH, WIDE, PARTITION, COMPUTE,
            )  # fmt: skip
        elif (operation == SCALE) | (operation == ROTATE):
            if PARTITION == 1:
                total += _gather_transposed(
                    image, strides, move, back, channel, y, x, inside, HEIGHT, WIDTH, REACH_Y, REACH_X, COMPUTE
                )
            else:
                total += _warp_transposed(
                    image, strides, move, back, channel, y, x, inside,
                    HEIGHT, WIDTH, PARTITION, REACH_Y, REACH_X, COMPUTE,
                )  # fmt: skip
        else:
            total += _copy_transposed(
                image, strides, back, cut_y, cut_x, channel, y, x, inside,
                HEIGHT, WIDTH, PARTITION, CUT_Y, CUT_X, COMPUTE,
            )  # fmt: skip
    # By rows of the small image, which lie apart in the sheet: whole rows are stored in wide pieces.
    if CHANNELS_LAST:
        place = index // (WIDE * CHANNELS) * (WIDTH * CHANNELS) + index % (WIDE * CHANNELS)
    else:
        place = (index // (HIGH * WIDE) * HEIGHT + index // WIDE % HIGH) * WIDTH + index % WIDE
    tl.store(output + place, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _share(line, LENGTH: tl.constexpr, PARTITION: tl.constexpr, COMPUTE: tl.constexpr):
    """Return the small line that a line of pixels lies in, the other one that it reads, and the weight of the other.

    ``LENGTH`` is the number of small lines. Only lines of the decoded image have meaningful results.
    """
    twice = 2 * (line % PARTITION) + 1 - PARTITION
    near = line // PARTITION
    other = near + tl.where(twice < 0, -1, 1)
    share = tl.abs(twice).to(COMPUTE) * (0.5 / PARTITION)
    return near, other, tl.where((other >= 0) & (other < LENGTH), share, 0.0)


@triton.jit
def _weight(line, small, LENGTH: tl.constexpr, PARTITION: tl.constexpr, COMPUTE: tl.constexpr):
    """Return the weight with which a line of the decoded image reads one of ``LENGTH`` small lines.

    It falls from 1 at the small line's middle to 0 at its neighbours'; lines beyond the middle of the first and of the
    last read only these, and lines outside the image nothing.
    """
    distance = ((line - small * PARTITION).to(COMPUTE) - (PARTITION - 1) / 2) / PARTITION
    distance = tl.maximum(distance, tl.where(small == 0, 0.0, -1.0))
    distance = tl.minimum(distance, tl.where(small == LENGTH - 1, 0.0, 1.0))
    return tl.where((line >= 0) & (line < LENGTH * PARTITION), 1 - tl.abs(distance), 0.0)


@triton.jit
def _decoded(
    images,
    strides,
    channel,
    y,
    x,
    mask,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    PARTITION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Return pixels of a decoded image, zero where masked; what has no weight is not read."""
    near_y, other_y, share_y = _share(y, HIGH, PARTITION, COMPUTE)
    near_x, other_x, share_x = _share(x, WIDE, PARTITION, COMPUTE)
    value = _load(images, strides, channel, near_y, near_x, mask, COMPUTE)
    if PARTITION > 1:
        beside, beyond = mask & (share_x > 0), mask & (share_y > 0)
        value = (1 - share_x) * value + share_x * _load(images, strides, channel, near_y, other_x, beside, COMPUTE)
        next_value = (1 - share_x) * _load(images, strides, channel, other_y, near_x, beyond, COMPUTE)
        next_value += share_x * _load(images, strides, channel, other_y, other_x, beyond & beside, COMPUTE)
        value = (1 - share_y) * value + share_y * next_value
    return value


@triton.jit
def _gather_decoded(
    images,
    strides,
    move,
    channel,
    y,
    x,
    kept,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTITION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Interpolate decoded images bilinearly at the sources of output pixels, as augmentation's `_gather` does."""
    move_y, move_x = _displacement(move, y, x, HEIGHT, WIDTH)
    whole_y, whole_x = tl.floor(move_y), tl.floor(move_x)
    value = tl.zeros(y.shape, COMPUTE)
    for step_y in range(2):
        for step_x in range(2):
            weight = _tent(move_y - whole_y - step_y) * _tent(move_x - whole_x - step_x)
            tap_y, tap_x = y + whole_y.to(tl.int32) + step_y, x + whole_x.to(tl.int32) + step_x
            inside = (tap_y >= 0) & (tap_y < HEIGHT) & (tap_x >= 0) & (tap_x < WIDTH)
            value += weight * _decoded(
                images, strides, channel, tap_y, tap_x, kept & inside & (weight > 0),
                HEIGHT // PARTITION, WIDTH // PARTITION, PARTITION, COMPUTE,
            )  # fmt: skip
    return value


@triton.jit
def _colour_transposed(
    images,
    strides,
    own,
    pixel,
    constant,
    channel,
    y,
    x,
    inside,
    CHANNELS: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    PARTITION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sum the gradients under color of the decoded pixels that read small pixels."""
    value = tl.zeros(y.shape, COMPUTE)
    for step_y in range(-(PARTITION // 2), PARTITION + PARTITION // 2):
        for step_x in range(-(PARTITION // 2), PARTITION + PARTITION // 2):
            far_y, far_x = y * PARTITION + step_y, x * PARTITION + step_x
            weight = _weight(far_y, y, HIGH, PARTITION, COMPUTE) * _weight(far_x, x, WIDE, PARTITION, COMPUTE)
            read = inside & (weight > 0)
            decoded = own * _load(images, strides, channel, far_y, far_x, read, COMPUTE) + constant
            for other in range(CHANNELS):
                decoded += pixel / CHANNELS * _load(images, strides, other, far_y, far_x, read, COMPUTE)
            value += weight * decoded
    return value


@triton.jit
def _copy_transposed(
    images,
    strides,
    back,
    cut_y,
    cut_x,
    channel,
    y,
    x,
    inside,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTITION: tl.constexpr,
    CUT_Y: tl.constexpr,
    CUT_X: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sum the gradients, under operations that copy whole pixels, of the decoded pixels that read small pixels."""
    value = tl.zeros(y.shape, COMPUTE)
    for step_y in range(-(PARTITION // 2), PARTITION + PARTITION // 2):
        for step_x in range(-(PARTITION // 2), PARTITION + PARTITION // 2):
            far_y, far_x = y * PARTITION + step_y, x * PARTITION + step_x
            weight = _weight(far_y, y, HEIGHT // PARTITION, PARTITION, COMPUTE)
            weight *= _weight(far_x, x, WIDTH // PARTITION, PARTITION, COMPUTE)
            kept = (far_y < cut_y) | (far_y >= cut_y + CUT_Y) | (far_x < cut_x) | (far_x >= cut_x + CUT_X)
            back_y, back_x = _displacement(back, far_y, far_x, HEIGHT, WIDTH)
            from_y, from_x = far_y + tl.floor(back_y + 0.5).to(tl.int32), far_x + tl.floor(back_x + 0.5).to(tl.int32)
            value += _tap(images, strides, weight, channel, from_y, from_x, kept & inside, HEIGHT, WIDTH, COMPUTE)
    return value


@triton.jit
def _warp_transposed(
    images,
    strides,
    move,
    back,
    channel,
    y,
    x,
    inside,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTITION: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sum the gradients of the output pixels whose source, scaled or rotated, reads small pixels.

    One gather for both steps: from a small pixel over the decoded pixels and from each over the output pixels that read
    it would be three times as many loads.
    """
    middle_y = y.to(COMPUTE) * PARTITION + (PARTITION - 1) / 2
    middle_x = x.to(COMPUTE) * PARTITION + (PARTITION - 1) / 2
    back_y, back_x = _displacement(back, middle_y, middle_x, HEIGHT, WIDTH)
    near_y, near_x = tl.floor(middle_y + back_y + 0.5).to(tl.int32), tl.floor(middle_x + back_x + 0.5).to(tl.int32)
    value = tl.zeros(y.shape, COMPUTE)
    for step_y in range(-REACH_Y, REACH_Y + 1):
        for step_x in range(-REACH_X, REACH_X + 1):
            far_y, far_x = near_y + step_y, near_x + step_x
            move_y, move_x = _displacement(move, far_y, far_x, HEIGHT, WIDTH)
            weight = _tap_weight(move_y, far_y, y, HEIGHT // PARTITION, PARTITION, COMPUTE)
            weight *= _tap_weight(move_x, far_x, x, WIDTH // PARTITION, PARTITION, COMPUTE)
            value += _tap(images, strides, weight, channel, far_y, far_x, inside, HEIGHT, WIDTH, COMPUTE)
    return value


@triton.jit
def _tap_weight(move, line, small, LENGTH: tl.constexpr, PARTITION: tl.constexpr, COMPUTE: tl.constexpr):
    """Return the weight with which a line of the output reads a small line, along one axis, through its two taps."""
    whole = tl.floor(move)
    first = line + whole.to(tl.int32)
    weight = _tent(move - whole) * _weight(first, small, LENGTH, PARTITION, COMPUTE)
    return weight + _tent(move - whole - 1) * _weight(first + 1, small, LENGTH, PARTITION, COMPUTE)
