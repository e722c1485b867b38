"""What one matrix must satisfy: a share of zeros, or so many zeros in every m consecutive inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compression_dags.errors import InputError


@dataclass(frozen=True)
class Pattern:
    """Attributes:
    sparsity: share of zeros asked for, in [0, 1).
    m: group length of an N:M pattern; None is unstructured.
    zeros: of every m consecutive inputs.
    """

    sparsity: float
    m: int | None = None
    zeros: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity {self.sparsity} is not in [0, 1)")
        if (self.m is None) != (self.zeros is None):
            raise InputError("an N:M pattern needs both m and zeros")
        if self.m is not None and self.zeros is not None and not 0 <= self.zeros < self.m:
            raise InputError(
                f"pattern with {self.zeros} zeros of every {self.m}: zeros must be at least 0 and below {self.m}"
            )

    @classmethod
    def unstructured(cls, sparsity: float) -> Pattern:
        return cls(sparsity)

    @classmethod
    def n_of_m(cls, keep_n: int, m: int) -> Pattern:
        """`n_of_m(2, 4)` keeps 2 of every 4."""
        if not 1 <= keep_n <= m:
            raise InputError(f"pattern {keep_n}:{m}: must keep at least 1 and at most {m} of every {m}")
        return cls((m - keep_n) / m, m, m - keep_n)

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """`2:4` → keeps 2 of every 4."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match:
            raise InputError(f"pattern {text!r} is not N:M, such as 2:4 or 4:8")
        return cls.n_of_m(int(match[1]), int(match[2]))

    def check_row(self, columns: int, name: str, block: int | None = None) -> None:
        """Refuse a row of `columns` inputs, or a sweep in blocks, that the groups do not fit.

        Raises:
            InputError: naming the matrix.
        """
        if self.m is None:
            return
        if columns % self.m:
            raise InputError(f"{name}: rows of {columns} inputs are not a multiple of {self.m}")
        if block is not None and block % self.m:
            raise InputError(f"{name}: the sweep's block of {block} columns is not a multiple of {self.m}")
