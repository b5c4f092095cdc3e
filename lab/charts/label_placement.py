"""Places labels beside their points so that no label covers another: pure geometry, in pixels."""

import math

import numpy as np

# Directions to try, best first, in degrees. The running best falls from left to right, so no kept point can be to the
# lower left of another.
DIRECTIONS = [225, 250, 200, 180, 270, 290, 315, 45, 90, 70, 20, 0, 340, 135, 160, 110]
DISTANCES = [10, 22, 40, 65, 95]  # from the point to the label; at 95 it is still clear which point is meant
GAP = 3  # between two labels
CLOSE = 7  # a leader must not come closer to a point that is not its own: about the radius of a disc
# The cost of a place; the place with the lowest cost wins. One step in DIRECTIONS costs 1.
PER_PIXEL = 0.3  # of distance: some three directions are tried before the next distance
PER_COVERED = 8  # for each soft point under the label: worth half of the directions
CENTRED = 0.3  # |cos| or |sin| of the direction below which the label is centred on the point along that axis


def box_at(point, size, angle, distance):
    """(left, bottom, right, top) of a label in this direction (degrees) from the point. `distance` is from the point to
    its nearest corner or side."""
    (x, y), (w, h) = point, size
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    left = x + distance * cos - w * (0.5 if abs(cos) < CENTRED else cos < 0)
    bottom = y + distance * sin - h * (0.5 if abs(sin) < CENTRED else sin < 0)
    return left, bottom, left + w, bottom + h


def inside(points, box, gap=0):
    """How many of the points (n, 2) are in the box, or closer to it than `gap`."""
    left, bottom, right, top = box
    x, y = points[:, 0], points[:, 1]
    return int(((x > left - gap) & (x < right + gap) & (y > bottom - gap) & (y < top + gap)).sum())


def apart(a, b):
    """Whether the two boxes are more than GAP apart."""
    return a[2] + GAP < b[0] or b[2] + GAP < a[0] or a[3] + GAP < b[1] or b[3] + GAP < a[1]


def leader(point, box, n=12):
    """(n, 2): points on the line from the point to the nearest place in its box."""
    spot = [min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])]
    return np.linspace(point, spot, n)


def passes(line, points, own):
    """Whether the leader comes close to one of the points (n, 2) that is not its own."""
    others = points[np.abs(points - own).max(axis=1) > 1]
    return bool((np.abs(line[:, None] - others[None]).max(axis=2) < CLOSE).any())


def place(points, sizes, area, hard, soft):
    """For each point the box of its label, or None if there is no room. Earlier points choose first.

    points: (x, y) each; sizes: (width, height) each; area: the box that all labels must be in; hard: (n, 2), points that
    no label may cover; soft: (m, 2), points that it should rather not cover."""
    placed, leaders, boxes, every = [], np.empty((0, 2)), [], np.array(points)
    for point, size in zip(points, sizes, strict=True):
        best, cost, best_leader = None, math.inf, None
        for distance in DISTANCES:
            if PER_PIXEL * distance >= cost:
                break
            for rank, angle in enumerate(DIRECTIONS):
                box = box_at(point, size, angle, distance)
                price = PER_PIXEL * distance + rank + PER_COVERED * inside(soft, box)
                if price >= cost or box[0] < area[0] or box[1] < area[1] or box[2] > area[2] or box[3] > area[3]:
                    continue
                line = leader(point, box)
                if (
                    all(apart(box, other) for other in placed)
                    and not inside(hard, box, GAP)
                    and not inside(leaders, box)
                    and not any(inside(line, other) for other in placed)
                    and not passes(line, every, point)
                ):
                    best, cost, best_leader = box, price, line
        boxes.append(best)
        if best:
            placed.append(best)
            leaders = np.concatenate([leaders, best_leader])
    return boxes
