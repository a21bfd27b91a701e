"""PHI-S: one scale for all channels of a teacher's tokens, whatever their covariance (RADIO's, arXiv 2410.01680).

Tokens x of mean μ and covariance Σ = U Λ Uᵀ become (H Uᵀ / φ) (x - μ). H is orthonormal and all its entries have the
size 1/√D (a Hadamard matrix over √D), so each channel's variance is the mean of the eigenvalues, φ². Dividing by φ
makes it 1. The map is a rotation and one scale: angles and ratios of distances stay, and it can be inverted.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.errors import ConfigError


def mean_and_covariance(tokens: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D], float64, of all tokens in some batches [..., D] of any float type.

    Raises:
        ConfigError: there are no tokens, or some that are not finite.
    """
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for batch in tokens:
        flat = batch.reshape(-1, batch.shape[-1]).double()
        count, total, products = count + len(flat), total + flat.sum(0), products + flat.T @ flat
    if not count or not products.isfinite().all():
        raise ConfigError("the teacher gave no tokens to measure, or some that are not finite: check its weights")
    mean = total / count
    return mean, products / count - mean.outer(mean)


def phi_s_rotation(covariance: Tensor) -> Tensor:
    """The scaled rotation H Uᵀ / φ of PHI-S, float64 [D, D], for a covariance [D, D].

    Raises:
        ConfigError: no Hadamard matrix of D rows is known here, or the tokens don't vary at all.
    """
    mix = hadamard(len(covariance))
    if mix is None:
        raise ConfigError(
            f"target_norm=phi_s knows no Hadamard matrix of {len(covariance)} channels: use target_norm=channel"
        )
    scale = covariance.double().diagonal().mean().sqrt()
    if not scale > 0:
        raise ConfigError("target_norm=phi_s: the teacher's tokens are all the same, check its weights")
    eigenvectors = torch.linalg.eigh(covariance.double()).eigenvectors
    rotation: Tensor = mix @ eigenvectors.T / (len(covariance) ** 0.5 * scale)
    return rotation


def hadamard(size: int) -> Tensor | None:
    """A matrix of ±1, float64 [size, size], with orthogonal rows; None where these constructions give none.

    Sylvester's doubling of a matrix by Paley (1933): from a prime q = 3 mod 4 one of q + 1 rows, from a prime
    q = 1 mod 4 one of 2 (q + 1) rows. They give the widths of all common ViTs: 192, 384, 768, 1024, 1152, 1280, 1408...
    """
    doubling = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size in (1, 2):
        return doubling[:size, :size]
    if size < 1 or size % 4:
        return None
    if _is_prime(size - 1):
        return _bordered(size - 1, sign=-1) + torch.eye(size, dtype=torch.float64)
    half = hadamard(size // 2)
    if half is not None:
        return torch.kron(doubling, half)
    q = size // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(q, sign=1), doubling) + torch.kron(torch.eye(q + 1, dtype=torch.float64), turned)
    return None


def _bordered(q: int, sign: int) -> Tensor:
    """Paley's conference matrix [q + 1, q + 1] of a prime q: 0 on the diagonal, ±1 elsewhere, orthogonal rows.

    Args:
        sign: of its first column against its first row: 1 for q = 1 mod 4, -1 for q = 3 mod 4.
    """
    residue = torch.full((q,), -1.0, dtype=torch.float64)
    residue[(torch.arange(1, q) ** 2) % q] = 1
    residue[0] = 0
    numbers = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = residue[(numbers[:, None] - numbers) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
