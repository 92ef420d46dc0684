"""Numbers and cities of the needles."""

from __future__ import annotations

import hashlib

_CITIES = (
    "Accra Ankara Athens Baku Bergen Berlin Bogota Boston Bratislava Bremen Cairo Cardiff Chicago Cork "
    "Dakar Delhi Denver Dhaka Dublin Geneva Genoa Ghent Graz Hanoi Havana Helsinki Istanbul Jakarta Kabul "
    "Kyiv Kyoto Lagos Leeds Lima Lisbon London Lyon Madrid Malmo Manila Milan Minsk Mumbai Munich Nairobi "
    "Naples Osaka Oslo Ottawa Paris Perth Prague Quito Riga Rome Santiago Seoul Seville Sofia Sydney "
    "Tallinn Tbilisi Tokyo Toronto Tunis Turin Utrecht Vienna Vilnius Warsaw Zagreb Zurich"
)
CITIES = _CITIES.split()

SAMPLES = 8  # cells of one length and depth, or place, that are surely told apart
GOLDEN = 0.618033988749895  # of the places: steps of this lie far apart, however many there are


def needle_number(seed: int, digits: int, length: int, depth: float, sample: int) -> str:
    """The number of `digits` digits (none of them a leading zero) that this cell hides.

    Cells are numbered (depths, then samples, then lengths modulo a prime) and the seed permutes that, so
    that cells of a grid get different numbers although none of them knows the grid: with 7 digits for
    depths by 0.1% and 1,123 lengths, with 4 digits for depths by 1% and 11 lengths (such as 256, 512, ...).
    What is left is for `check_numbers` to refuse.
    """
    size = 9 * 10 ** (digits - 1)
    steps = 10 if digits >= 7 else 1  # of depth in a percent
    num_depths = 100 * steps + 1
    num_lengths = _prime_up_to(size // (num_depths * SAMPLES))
    length_index = (length + sample // SAMPLES) % num_lengths
    index = round(steps * depth) + num_depths * (sample % SAMPLES + SAMPLES * length_index)
    return str(10 ** (digits - 1) + _permute(index % size, size, f"{seed}"))


def place_number(seed: int, digits: int, place: int, sample: int) -> str:
    """The number of the needle at this place, counted in steps from the start.

    Places differ up to 9 x 10^(digits - 1) / 8 steps; samples past the eighth go through them from elsewhere.
    """
    size = 9 * 10 ** (digits - 1)
    num_places = size // SAMPLES
    place = (place + round(GOLDEN * num_places) * (sample // SAMPLES)) % num_places
    return str(10 ** (digits - 1) + _permute(sample % SAMPLES + SAMPLES * place, size, f"{seed}"))


def _prime_up_to(number: int) -> int:
    """The largest prime up to `number`, 1 where there is none."""
    for candidate in range(min(number, 10007), 1, -1):
        if all(candidate % divisor for divisor in range(2, int(candidate**0.5) + 1)):
            return candidate
    return 1


def _permute(index: int, size: int, key: str) -> int:
    """A permutation of 0..size-1 by key: a Feistel network over the next even power of two, walked until
    it lands inside (Black and Rogaway, Ciphers with arbitrary finite domains, 2002)."""
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            digest = hashlib.sha256(f"{key} {turn} {right}".encode()).digest()
            left, right = right, left ^ (int.from_bytes(digest[:8], "little") & mask)
        index = left << half | right
        if index < size:
            return index
